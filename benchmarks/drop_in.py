"""A part of another library's training step, before and after `fuse`; the programs `integration_*.py` use it.

    python benchmarks/integration_NAME.py [WORD ...] [--rounds 15]

prints a table as Markdown, of all parts or of those whose names contain a word. A cell is "before → after". Forward and
backward are counted and measured together.

- Launches and bytes: what PyTorch dispatches (`Cost` of `eager_cost.py`), and the launches of fastvae's kernels for an
  H200, which a stand-in for its driver receives and does not run. The bytes of a launch are those of the tensors that
  it is given, each counted once. A wait is a number that Python reads from a tensor.
- Peak: the most that is allocated at a time, with the same kernels.
- Time: of one thread of the CPU, where no kernels run. It is the least of all rounds, and the median of the ratios of
  alternating runs. With ``--rounds 0`` nothing is timed.

TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import process_time
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from eager_cost import Cost, size_in_memory
from stand_in import stand_in

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from memory_meters import peak_memory

Step = Callable[[], Any]


class Part(NamedTuple):
    name: str
    size: str
    make: Callable[[bool], Step]  # given whether it is fused; the step is forward and backward
    counted: bool = True  # not of a network that reads a sample of z, because kernels that do not run make no numbers


class Counted(Cost):
    """With the launches of kernels, and the waits."""

    waits = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.waits += function is torch.ops.aten._local_scalar_dense.default
        return super().__torch_dispatch__(function, types, args, kwargs)


class Meter:
    """One for all parts, because a kernel that was compiled for one of them is launched as it was then."""

    now = Counted()

    @classmethod
    def launch(cls, *arguments: Any) -> None:
        """In place of the driver's."""
        cls.now.launches += 1
        given = {span(it): it for it in tree_leaves(arguments) if isinstance(it, Tensor)}
        # A half of a tensor that is given too is no other memory.
        whole = [
            it
            for (start, end), it in given.items()
            if not any(a <= start and end <= b and (a, b) != (start, end) for a, b in given)
        ]
        cls.now.bytes += sum(map(size_in_memory, whole))


def span(tensor: Tensor) -> tuple[int, int]:
    """The addresses of the first and of the last element."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + last * tensor.element_size()


def counts(part: Part) -> list[str]:
    """The cells of the launches, the waits, the megabytes that are moved, and those of the peak."""
    found = []
    for fused in (False, True):
        step = part.make(fused)
        with stand_in(Meter.launch):
            step()  # the first call makes what is kept for later ones
            Meter.now = counted = Counted()
            with counted:
                step()
            Meter.now = Counted()
            peak = peak_memory(step)
        found.append((counted.launches, counted.waits, f"{counted.bytes / 1e6:.2f}", f"{peak / 1e6:.2f}"))
    return [f"{before} → {after}" for before, after in zip(*found, strict=True)]


def times(part: Part, rounds: int) -> list[str]:
    """The cells of the milliseconds, and of their ratio."""
    steps = [part.make(fused) for fused in (False, True)]
    found: list[list[float]] = [[], []]
    repeats = 1
    for k in range(rounds + 1):
        for step, each in zip(steps, found, strict=True):
            start = process_time()
            for _ in range(repeats):
                step()
            spent = process_time() - start
            if k:
                each.append(1e3 * spent / repeats)
        if not k:  # so that a measurement takes a twentieth of a second
            repeats = max(1, round(0.05 / spent))
    ratio = statistics.median(before / after for before, after in zip(*found, strict=True))
    return [f"{min(found[0]):.2f} → {min(found[1]):.2f}", f"{ratio:.2f}"]


def main(parts: Sequence[Part], description: str | None) -> None:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only parts whose names contain one of these")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    titles = ["", "size", "launches", "waits", "MB moved", "peak MB", "CPU ms", "ratio"]
    print(f"| {' | '.join(titles)} |\n|---|---|{'--:|' * (len(titles) - 2)}")
    for part in parts:
        if not arguments.words or any(word in part.name for word in arguments.words):
            counted = counts(part) if part.counted else ["-"] * 4
            timed = times(part, arguments.rounds) if arguments.rounds else ["-"] * 2
            print(f"| {' | '.join([part.name, part.size, *counted, *timed])} |", flush=True)
