"""A part of another library's training step, as the library has it and fused; the programs `integration_*.py` use it.

A table has these columns, each for both. Forward and backward are counted and measured together.

- Launches and bytes: what PyTorch dispatches (`Cost` of `eager_cost.py`), and the launches of fastvae's kernels for an
  H200, which a stand-in for its driver receives and does not run. The bytes of a launch are those of the tensors that
  it is given, each counted once. A wait is a number that Python reads from a tensor.
- Peak: the most that is allocated at a time, for the same launches.
- Time: of one thread of the CPU, where no kernels run. It is the least of each, and the median over the rounds of the
  ratio of alternating runs.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import process_time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eager_cost import Cost, size_in_memory
from stand_in import stand_in

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from memory_meters import peak_memory

Step = Callable[[], Any]


class Part(NamedTuple):
    name: str
    size: str
    make: Callable[[bool], Step]  # given whether it is fused; the step is forward and backward


class Counted(Cost):
    """With the launches of kernels, and the waits."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.waits += function is torch.ops.aten._local_scalar_dense.default
        return super().__torch_dispatch__(function, types, args, kwargs)

    def launch(self, *arguments: Any) -> None:
        """In place of the driver's."""
        self.launches += 1
        self.bytes += sum({id(it): size_in_memory(it) for it in arguments if isinstance(it, Tensor)}.values())


def cost(part: Part, fused: bool) -> tuple[Counted, int]:
    """What is counted, and the bytes of the peak."""
    step, counted = part.make(fused), Counted()
    with stand_in(counted.launch):
        step()  # the first call makes what is kept for later ones
        counted.launches = counted.bytes = counted.waits = 0
        with counted:
            step()
        return counted, peak_memory(step)


def times(part: Part, rounds: int) -> tuple[float, float, float]:
    """Milliseconds of the library's and of the fused one, and the median of their ratios."""
    steps = [part.make(fused) for fused in (False, True)]
    found: list[list[float]] = [[], []]
    for k in range(rounds + 1):
        for step, each in zip(steps, found, strict=True):
            start = process_time()
            step()
            if k:
                each.append(1e3 * (process_time() - start))
    ratio = statistics.median(before / after for before, after in zip(*found, strict=True))
    return min(found[0]), min(found[1]), ratio


def print_table(library: str, parts: Sequence[Part], rounds: int) -> None:
    """As Markdown, line by line."""
    torch.set_num_threads(1)
    columns = ["launches", "MB moved", "peak MB", "CPU ms"]
    titles = ["", "size", *(f"{name}: {who}" for name in columns for who in (library, "fused")), f"{library} / fused"]
    print(f"| {' | '.join(titles)} |\n|---|---|{'--:|' * (len(titles) - 2)}")
    for part in parts:
        both = [cost(part, fused) for fused in (False, True)]
        cells = [f"{it.launches}" + f", {it.waits} waits" * (it.waits > 0) for it, _ in both]
        cells += [f"{it.bytes / 1e6:.2f}" for it, _ in both] + [f"{peak / 1e6:.2f}" for _, peak in both]
        cells += [f"{it:.2f}" for it in times(part, rounds)]
        print(f"| {part.name} | {part.size} | {' | '.join(cells)} |", flush=True)
