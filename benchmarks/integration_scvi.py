"""The loss of scvi-tools' VAE before and after `fastvae.integrations.scvi.fuse`.

    python benchmarks/integration_scvi.py [--rounds 15]

prints a table as Markdown. The loss is what runs between the outputs of the networks and the loss, forward and
backward: the sample of z, the distributions, the divergences and the log-likelihood. The encoder and the decoder
return tensors that are given. Launches and bytes before are those that PyTorch dispatches, as in `eager_cost.py`.
After, each fused operation has those of fastvae's list of operations, and what is around it is counted. A wait is a
number that Python reads from a tensor. The peak is the most that is allocated at a time on the CPU. The times are CPU
times of one thread, of sides that take turns: the least of each, and the median of the ratios, of the loss and of a
whole step of the module. The whole step has no optimizer and no loader.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any, NamedTuple

import torch
from scvi.module import VAE
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

import fastvae.functional as F
import fastvae.integrations.scvi as integration
from eager_cost import Cost
from fastvae.operations import Operation, named, of_likelihood, of_smaller, operations

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from memory_meters import peak_memory

HIDDEN, LATENT = 128, 10  # scvi-tools' defaults


class Case(NamedTuple):
    likelihood: str
    dispersion: str
    cells: int
    genes: int

    @property
    def text(self) -> str:
        per = {"gene": ", a dispersion for each gene", "gene-batch": ", for each gene and batch"}
        which = per[self.dispersion] if self.likelihood in integration.LIKELIHOODS else ""
        return f"`{self.likelihood}`{which}"

    @property
    def size(self) -> str:
        return f"{self.cells} x {self.genes}"


CASES = (
    Case("nb", "gene", 128, 2000),
    Case("nb", "gene", 128, 20000),
    Case("zinb", "gene", 128, 2000),
    Case("zinb", "gene", 128, 20000),
    Case("zinb", "gene-batch", 128, 2000),
    Case("poisson", "gene", 128, 2000),
    Case("nb", "gene", 128, 200),
    Case("zinb", "gene", 128, 50),
)


# ------------------------------------------------------------------------------------------------------------ modules


class Given(torch.nn.Module):
    """Returns what it was given, as a network would."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, *_: Any) -> Any:
        return self.output


def module_of(case: Case) -> VAE:
    torch.manual_seed(0)
    return VAE(case.genes, n_batch=2, gene_likelihood=case.likelihood, dispersion=case.dispersion, dropout_rate=0.0)


def counts_of(case: Case) -> Tensor:
    rate = torch.distributions.Gamma(0.5, 0.5).sample((case.cells, case.genes))
    return torch.poisson(rate)


def batch_of(case: Case) -> dict[str, Tensor]:
    """As the host's loader makes it."""
    torch.manual_seed(1)
    zeros = torch.zeros(case.cells, 1, dtype=torch.long)
    return {"X": counts_of(case), "batch": torch.arange(case.cells)[:, None] % 2, "labels": zeros}


def with_given_networks(module: VAE, case: Case) -> list[Tensor]:
    """Let the networks return tensors, which are returned."""
    torch.manual_seed(2)
    shape = case.cells, case.genes
    loc, logvar = (torch.randn(case.cells, LATENT).requires_grad_() for _ in range(2))
    scale = torch.softmax(torch.randn(shape), -1)
    rate, logits = (1000 * scale).requires_grad_(), torch.randn(shape).requires_grad_()
    encoder = module.z_encoder
    encoder.encoder, encoder.mean_encoder, encoder.var_encoder = Given(loc), Given(loc), Given(logvar)
    module.decoder.forward = Given((scale, None, rate, logits)).forward
    px_r = [module.px_r] if case.likelihood in integration.LIKELIHOODS else []
    return [loc, logvar, rate, *px_r, *[logits] * (case.likelihood == "zinb")]


def sides(case: Case, whole: bool) -> dict[str, tuple[Callable[[], Tensor], list[Tensor]]]:
    """The loss of the host and of its fused copy, and what gets gradients."""
    tensors, found = batch_of(case), {}
    for side in ("before", "after"):
        module = module_of(case)
        if side == "after":
            integration.fuse(module)
        wanted = list(module.parameters()) if whole else with_given_networks(module, case)
        found[side] = (lambda module=module: module(tensors)[2].loss), wanted
    return found


def gradients(function: Callable[[], Tensor], wanted: list[Tensor]) -> None:
    torch.autograd.grad(function(), wanted, allow_unused=True)


# ----------------------------------------------------------------------------------------------- launches and bytes


class Counted(Cost):
    """And the waits."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            self.waits += 1
        return super().__torch_dispatch__(function, types, args, kwargs)

    def add(self, operation: Operation, direction: str, elements: int) -> None:
        self.launches += operation.launches[direction]
        self.bytes += elements * sum(operation.bytes_per_element(direction))


class Fused(torch.autograd.Function):
    """A fused operation, of which the list of operations is counted instead of what runs here."""

    counted: Counted

    @staticmethod
    def forward(ctx: Any, operation: Operation, call: Callable[..., Any], *tensors: Tensor) -> Any:
        Fused.counted.add(operation, "forward", tensors[0].numel())
        with _disable_current_modes(), torch.enable_grad():
            ctx.operation, ctx.leaves = operation, [it.detach().requires_grad_(it.requires_grad) for it in tensors]
            ctx.outputs = call(*ctx.leaves)
        single = isinstance(ctx.outputs, Tensor)
        return ctx.outputs.detach() if single else tuple(it.detach() for it in ctx.outputs)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        Fused.counted.add(ctx.operation, "backward", ctx.leaves[0].numel())
        with _disable_current_modes():
            needed = [it for it in ctx.leaves if it.requires_grad]
            outputs = [ctx.outputs] if isinstance(ctx.outputs, Tensor) else ctx.outputs
            each = iter(torch.autograd.grad(outputs, needed, upstream))
        return None, None, *[next(each) if it.requires_grad else None for it in ctx.leaves]


class Listed:
    """fastvae.functional, each operation counted as the list has it."""

    def gaussian_sample_kl(self, mu: Tensor, logvar: Tensor, **options: Any) -> Any:
        every = named(operations())["gaussian_sample_kl"]
        return Fused.apply(every, lambda *given: F.gaussian_sample_kl(*given, **options), mu, logvar)

    def negative_log_likelihood(self, parameters: Any, target: Tensor, likelihood: Any, **options: Any) -> Any:
        per_gene = parameters[1].ndim == 1
        every = of_smaller(likelihood, {"dispersion": "column"}) if per_gene else of_likelihood(likelihood)
        operation = next(it for it in every if it.function == "negative_log_likelihood")

        def call(*given: Tensor) -> Tensor:
            return F.negative_log_likelihood(given[:-1], given[-1], likelihood, **options)

        return Fused.apply(operation, call, *parameters, target)


def costs(case: Case) -> dict[str, tuple[Counted, Counted]]:
    """Forward and backward of each side."""
    found = {}
    small, integration.SMALL = integration.SMALL, 0  # a GPU runs kernels for any size
    integration.F = Listed()
    try:
        for side, (function, wanted) in sides(case, whole=False).items():
            forward, backward = Counted(), Counted()
            Fused.counted = forward
            with forward:
                loss = function()
            Fused.counted = backward
            upstream = torch.ones_like(loss)
            with backward:
                torch.autograd.grad(loss, wanted, upstream)
            found[side] = forward, backward
    finally:
        integration.F, integration.SMALL = F, small
    return found


# --------------------------------------------------------------------------------------------------- time and memory


def times(case: Case, whole: bool, rounds: int) -> tuple[dict[str, float], float]:
    """The least milliseconds of each side, and the median ratio."""
    found: dict[str, list[float]] = {"before": [], "after": []}
    made = sides(case, whole)
    for k in range(rounds + 1):
        for side, (function, wanted) in made.items():
            start = process_time()
            gradients(function, wanted)
            if k:
                found[side].append(1e3 * (process_time() - start))
    ratios = [before / after for before, after in zip(found["before"], found["after"], strict=True)]
    return {side: min(each) for side, each in found.items()}, statistics.median(ratios)


def counts(case: Case) -> list[str]:
    """The cells of the table that are counted."""
    cost = [*costs(case).values()]
    pairs = [
        [f"{forward.launches} + {backward.launches}" for forward, backward in cost],
        [f"{forward.waits + backward.waits}" for forward, backward in cost],
        [f"{(forward.bytes + backward.bytes) / 1e6:.1f}" for forward, backward in cost],
    ]
    return [" → ".join(pair) for pair in pairs]


def row(case: Case, rounds: int) -> list[str]:
    peaks = [peak_memory(lambda given=given: gradients(*given)) for given in sides(case, whole=False).values()]
    rounds *= max(1, 2**18 // (case.cells * case.genes))  # short times vary more
    time, ratio = times(case, False, rounds)
    _, of_step = times(case, True, rounds)
    measured = [" → ".join(f"{it:.1f}" for it in pair) for pair in ([peak / 1e6 for peak in peaks], time.values())]
    return [case.text, case.size, *counts(case), *measured, f"{ratio:.2f}", f"{of_step:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    titles = ["likelihood", "cells x genes", "launches", "waits", "MB moved", "peak MB", "CPU ms", "ratio", "of a step"]
    print(f"| {' | '.join(titles)} |\n|---|{'--:|' * (len(titles) - 1)}", flush=True)
    for case in CASES:
        print(f"| {' | '.join(row(case, rounds))} |", flush=True)


if __name__ == "__main__":
    main()
