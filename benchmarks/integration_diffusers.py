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
import os
import statistics
import sys
from collections.abc import Callable
from math import prod
from pathlib import Path
from time import process_time
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
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


def costs(case: Case, cls: type) -> tuple[int, float, float]:
    """Launches, MB moved, and MB allocated."""
    every, own = named(operations()), cls is case.fused
    per_element = sum(
        sum(every[name].bytes_per_element(direction))
        for name in case.operations
        for direction in every[name].directions
        if own and (case.trains or direction == "forward")
    )
    with fastvae.use_backend("triton"):
        run = prepared(case, cls, case.small)
        with FusedCost() if own else Cost() as cost:
            run()
        peak = peak_memory(run)
    moved = cost.bytes + per_element * prod(case.small) / 2
    scale = prod(case.shape) / prod(case.small) / 1e6
    return cost.launches, scale * moved, scale * peak


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
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    pairs = ("launches", "MB moved", "MB allocated", "CPU ms, no kernels")
    titles = ["", "parameters", *(f"{name}: {who}" for name in pairs for who in ("diffusers", "fused")), "ratio"]
    lines = [titles, ["---", "---", *["--:"] * (len(titles) - 2)]]
    for case in CASES:
        pairs_of_case = zip(costs(case, case.library), costs(case, case.fused), strict=True)
        cells = [f"{value:.{digits}f}" for pair, digits in zip(pairs_of_case, (0, 1, 1), strict=True) for value in pair]
        before, after, ratio = times(case, rounds)
        lines.append([case.what, str(list(case.shape)), *cells, f"{before:.2f}", f"{after:.2f}", f"{ratio:.2f}"])
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))


if __name__ == "__main__":
    main()
