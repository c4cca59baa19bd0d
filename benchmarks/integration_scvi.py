"""The loss of scvi-tools' VAE before and after `fastvae.integrations.scvi.fuse`; see `drop_in.py`.

    python benchmarks/integration_scvi.py [WORD ...] [--rounds 15]

The loss is what runs between the outputs of the networks and the loss: the sample of z, the distributions, the
divergences and the log-likelihood. The encoder and the decoder return tensors that are given. A whole step is that of
the module with its networks, without the optimizer and the loader. It needs scvi-tools, and no GPU.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, NamedTuple

import torch
from scvi.module import VAE
from torch import Tensor

from drop_in import Part, Step, main
from fastvae.integrations.scvi import LIKELIHOODS, fuse

LATENT = 10  # scvi-tools' default


class Case(NamedTuple):
    likelihood: str
    dispersion: str
    cells: int
    genes: int

    @property
    def text(self) -> str:
        per = {"gene": ", a dispersion for each gene", "gene-batch": ", for each gene and batch"}
        which = per[self.dispersion] if self.likelihood in LIKELIHOODS else ""
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
    px_r = [module.px_r] if case.likelihood in LIKELIHOODS else []
    return [loc, logvar, rate, *px_r, *[logits] * (case.likelihood == "zinb")]


def step_of(case: Case, whole: bool, fused: bool) -> Step:
    tensors, module = batch_of(case), module_of(case)
    if fused:
        fuse(module)
    wanted = list(module.parameters()) if whole else with_given_networks(module, case)
    return lambda: torch.autograd.grad(module(tensors)[2].loss, wanted, allow_unused=True)


PARTS = [
    *[Part(it.text, it.size, functools.partial(step_of, it, False)) for it in CASES],
    *[Part(f"{it.text}, a whole step", it.size, functools.partial(step_of, it, True), counted=False) for it in CASES],
]

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(PARTS, __doc__)
