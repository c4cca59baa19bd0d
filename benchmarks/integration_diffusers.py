"""The posteriors of diffusers' autoencoders before and after `fastvae.integrations.diffusers.fuse`.

    python benchmarks/integration_diffusers.py [--rounds 30]

prints one table as Markdown. Needs `pip install diffusers==0.42.1`, and no GPU.

The columns "diffusers" have the library's posterior, the columns "fused" what `fuse` puts in its place. Launches, bytes
and memory are those of the path with kernels. The launches are counted: what PyTorch dispatches (`eager_cost.Cost`),
and the kernels that Triton's interpreter runs. The bytes of a kernel are those of fastvae's list of operations, which
`tests/test_traffic.py` checks. The memory is the most that is allocated at a time. The interpreter is slow, so the
three are measured on small parameters of as many dimensions, and are multiplied by the number of elements. The times
are CPU times of one thread, where no kernels run; the two posteriors are timed alternately. The table has the least of
each, and the median of the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from math import prod
from pathlib import Path
from time import process_time
from typing import Any, NamedTuple

import torch
from diffusers.models.autoencoders.autoencoder_oobleck import OobleckDiagonalGaussianDistribution
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime.interpreter import InterpretedFunction

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import fastvae
from eager_cost import Cost
from fastvae.integrations.diffusers import CorrectPosterior, OobleckPosterior, Posterior
from fastvae.operations import named, operations
from memory_meters import peak_memory

Shape = tuple[int, ...]


class Case(NamedTuple):
    what: str
    library: type
    fused: type
    shape: Shape  # of the parameters
    use: Callable[[Any], list[Tensor]]
    operations: tuple[str, ...]  # of fastvae's list, whose bytes are those of the kernels of this case
    trains: bool = True

    @property
    def small(self) -> Shape:
        return tuple(min(size, limit) for size, limit in zip(self.shape, (2, 32, 8, 8, 8), strict=False))


def training(posterior: Any) -> list[Tensor]:
    return [posterior.sample(), posterior.kl()]


def sampling(posterior: Any) -> list[Tensor]:
    return [posterior.sample()]


def mode(posterior: Any) -> list[Tensor]:
    return [posterior.mode()]


GAUSSIAN, OOBLECK = DiagonalGaussianDistribution, OobleckDiagonalGaussianDistribution
IMAGES, IMAGE, VIDEO, SOUNDS = (4, 8, 64, 64), (1, 32, 128, 128), (1, 32, 5, 60, 104), (4, 128, 1024)
BOTH, EACH = ("gaussian_sample_kl_packed",), ("gaussian_sample", "gaussian_kl")
CASES = (
    Case("images, `sample` and `kl`, training", GAUSSIAN, Posterior, IMAGES, training, BOTH),
    Case("an image, `sample` and `kl`, training", GAUSSIAN, Posterior, IMAGE, training, BOTH),
    Case("a video, `sample` and `kl`, training", GAUSSIAN, Posterior, VIDEO, training, EACH),
    Case("the same with `correct=True`", GAUSSIAN, CorrectPosterior, VIDEO, training, BOTH),
    Case("sounds, `sample` and `kl`, training", OOBLECK, OobleckPosterior, SOUNDS, training, BOTH),
    Case("images, `sample`, no gradient", GAUSSIAN, Posterior, IMAGES, sampling, EACH[:1], False),
    Case("images, `mode`, no gradient", GAUSSIAN, Posterior, IMAGES, mode, (), False),
)


class FusedCost(Cost):
    """And the launches of Triton's kernels, without what the interpreter does around them."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket is torch.ops.aten.randint:  # the seed of noise, which a GPU's generator has
            return function(*args, **(kwargs or {}))
        return super().__torch_dispatch__(function, types, args, kwargs)

    def __enter__(self) -> FusedCost:
        self._run = run = InterpretedFunction.run

        def counted(*arguments: Any, **options: Any) -> Any:
            self.launches += 1
            with _disable_current_modes():
                return run(*arguments, **options)

        InterpretedFunction.run = counted
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        InterpretedFunction.run = self._run


def step(case: Case, cls: type, parameters: Tensor, upstream: list[Tensor]) -> list[Tensor]:
    """The posterior, what is asked of it, and where it trains its gradient."""
    with torch.set_grad_enabled(case.trains):
        outputs = case.use(cls(parameters))
    if case.trains:
        torch.autograd.grad(outputs, parameters, upstream)
    return outputs


def prepared(case: Case, cls: type, shape: Shape) -> Callable[[], Any]:
    """The step as a function of nothing. It has run once, so that what is allocated for good is."""
    parameters = torch.randn(shape, requires_grad=case.trains)
    upstream = [torch.ones_like(output) for output in case.use(cls(parameters))]
    step(case, cls, parameters, upstream)
    return lambda: step(case, cls, parameters, upstream)


def moved(case: Case, cls: type, run: Callable[[], Any]) -> tuple[int, float]:
    """Launches and bytes."""
    if cls is case.library:
        with Cost() as cost:
            run()
        return cost.launches, cost.bytes
    with FusedCost() as cost:
        run()
    every = [named(operations())[name] for name in case.operations]
    directions = [
        (it, direction) for it in every for direction in it.directions if case.trains or direction == "forward"
    ]
    per_element = sum(sum(it.bytes_per_element(direction)) for it, direction in directions)
    return cost.launches, cost.bytes + per_element * prod(case.small) / 2


def costs(case: Case, cls: type) -> tuple[int, float, float]:
    """Launches, MB moved, and MB allocated."""
    with fastvae.use_backend("triton"):
        run = prepared(case, cls, case.small)
        launches, read_and_written = moved(case, cls, run)
        peak = peak_memory(run)
    scale = prod(case.shape) / prod(case.small) / 1e6
    return launches, scale * read_and_written, scale * peak


def times(case: Case, rounds: int) -> tuple[float, float, float]:
    """Milliseconds of either posterior on the CPU, and the median of the ratio of the library's to the fused."""
    runs = [prepared(case, cls, case.shape) for cls in (case.library, case.fused)]
    found: list[list[float]] = [[], []]
    for _ in range(rounds):
        for run, each in zip(runs, found, strict=True):
            start = process_time()
            run()
            each.append(1e3 * (process_time() - start))
    ratio = statistics.median(before / after for before, after in zip(*found, strict=True))
    return min(found[0]), min(found[1]), ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--costs", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.costs:
        print(json.dumps([[costs(case, cls) for cls in (case.library, case.fused)] for case in CASES]))
        return
    torch.set_num_threads(1)
    # In a process of its own, in which Triton is imported with its interpreter.
    command = [sys.executable, str(Path(__file__)), "--costs"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    pairs = ("launches", "MB moved", "MB allocated", "CPU ms, no kernels")
    titles = ["", "parameters", *(f"{name}: {who}" for name in pairs for who in ("diffusers", "fused")), "ratio"]
    lines = [titles, ["---", "---", *["--:"] * (len(titles) - 2)]]
    for case, (before, after) in zip(CASES, json.loads(output.splitlines()[-1]), strict=True):
        pairs_of_case = zip(before, after, (0, 1, 1), strict=True)
        cells = [f"{value:.{digits}f}" for *pair, digits in pairs_of_case for value in pair]
        slow, fast, ratio = times(case, arguments.rounds)
        lines.append([case.what, str(list(case.shape)), *cells, f"{slow:.2f}", f"{fast:.2f}", f"{ratio:.2f}"])
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))


if __name__ == "__main__":
    main()
