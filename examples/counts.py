"""Train a VAE on counts of molecules in simulated cells, and compare its likelihood with Poisson's.

    python examples/counts.py                      zero-inflated negative binomial, about a minute on two cores
    python examples/counts.py --likelihood nb      negative binomial

The program simulates cells of a few types, which differ in some of their genes. Each cell has its own number of
molecules. The variance of a count is larger than its mean, and some counts are missed. The VAE does not see the types.
Its encoder reads log(1 + counts), its decoder returns each gene's share of a cell's molecules, and every gene has a
dispersion. It is compared with the same VAE with a Poisson likelihood, and with a Poisson likelihood that has one share
per gene for all cells.

On a CUDA device every step runs the fused operations, elsewhere plain PyTorch.

Files in --out, each written atomically:
    latent_map.png    the means of the test cells' posteriors, coloured by type
    summary.json      every number that is printed, with settings and versions
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastvae
import fastvae.functional as F
from fastvae import plots
from fastvae.evaluation import principal_components
from fastvae.functional import ELBO
from fastvae.likelihoods import Likelihood, NegativeBinomial, Poisson, ZeroInflatedNegativeBinomial
from fastvae.nn import ELBOLoss, GaussianSamplingKL
from fastvae.program import Parser, UserError, choose_device, positive_integer, prepare_folder, run_program, seed
from fastvae.training import versions, write_summary

LIKELIHOODS = {"zinb": ZeroInflatedNegativeBinomial(), "nb": NegativeBinomial()}
FILES = ("latent_map.png", "summary.json")
TYPES = 6
HIDDEN, LATENT = 128, 8
BATCH_SIZE, LEARNING_RATE = 128, 3e-3


class Cells(NamedTuple):
    """counts: [N, G], float32, because a byte ends at 255. types: [N], from 0 to TYPES - 1."""

    counts: Tensor
    types: Tensor


def simulate(cells: int, genes: int) -> Cells:
    """Cells drawn from zero-inflated negative binomials.

    In each type a tenth of the genes is more or less active than in the others, by a factor e in the usual case.
    """
    types = torch.randint(TYPES, (cells,))
    marks = torch.randn(TYPES, genes) * (torch.rand(TYPES, genes) < 0.1)
    shares = torch.softmax(1.2 * torch.randn(genes) + marks, 1)[types]
    library = torch.exp(0.4 * torch.randn(cells, 1)) * 3 * genes  # the molecules of a cell
    dispersion = torch.exp(0.5 * torch.randn(genes) + 0.5)
    rate = torch.distributions.Gamma(dispersion, dispersion).sample((cells,)) * library * shares
    missed = torch.rand(cells, genes) < 0.4 * torch.rand(genes)
    return Cells(torch.where(missed, 0.0, torch.poisson(rate)), types)


class CountVAE(nn.Module):
    """A variational autoencoder of counts [B, G], given how many molecules each cell has."""

    def __init__(self, genes: int, likelihood: Likelihood) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(genes, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2 * LATENT))
        self.sample = GaussianSamplingKL()
        self.decoder = nn.Sequential(nn.Linear(LATENT, HIDDEN), nn.ReLU())
        self.shares = nn.Linear(HIDDEN, genes)
        names = likelihood.parameters
        self.log_dispersion = nn.Parameter(torch.zeros(genes)) if "dispersion" in names else None
        self.zero_logits = nn.Linear(HIDDEN, genes) if "zero_logits" in names else None
        self.loss = ELBOLoss(likelihood)

    def encode(self, counts: Tensor) -> Tensor:
        """The moments [mu | logvar], [B, 2 LATENT]."""
        moments: Tensor = self.encoder(torch.log1p(counts))
        return moments

    def decode(self, z: Tensor, library: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The likelihood's parameters; library [B, 1]. The dispersion is [G]: it is read where it lies."""
        hidden = self.decoder(z)
        log_mean = torch.log_softmax(self.shares(hidden), 1) + library.log()
        if self.log_dispersion is None:
            return log_mean  # Poisson's parameter
        parameters = log_mean.exp(), self.log_dispersion.exp()
        return parameters if self.zero_logits is None else (*parameters, self.zero_logits(hidden))

    def forward(self, counts: Tensor) -> ELBO:
        """The negative evidence lower bound of a batch, in nats per cell."""
        z, kl = self.sample(self.encode(counts))
        elbo: ELBO = self.loss(self.decode(z, library_of(counts)), counts, kl)
        return elbo


def library_of(counts: Tensor) -> Tensor:
    return counts.sum(1, keepdim=True).clamp(min=1)  # so that an empty cell has a logarithm


def trained(likelihood: Likelihood, counts: Tensor, epochs: int) -> CountVAE:
    model = CountVAE(counts.shape[1], likelihood).to(counts.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    for _ in range(epochs):
        for batch in torch.split(torch.randperm(len(counts), device=counts.device), BATCH_SIZE):
            loss = model(counts[batch]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


def constant_rates(train: Tensor, test: Tensor) -> float:
    """-log p of test cells under Poisson rates that are each gene's share of all molecules, times the cell's."""
    shares = (train.sum(0) + 1) / (train.sum() + train.shape[1])  # a gene without a count gets a share too
    return F.negative_log_likelihood(torch.log(library_of(test) * shares), test, Poisson()).item()


def same_type_beside(mu: Tensor, types: Tensor) -> float:
    """The share of cells whose nearest neighbour, by mu [N, K], is of their type."""
    distances = torch.cdist(mu, mu).fill_diagonal_(torch.inf)
    return (types[distances.argmin(1)] == types).double().mean().item()


def main() -> int:
    """Run the program; returns its exit code."""
    return run_program("counts.py", run)


def run() -> None:
    arguments = parse_arguments()
    if arguments.cells < 10:
        raise UserError(f"--cells must be at least 10, because a fifth of them is for the test, got {arguments.cells}")
    plots.require_matplotlib()
    device = choose_device(arguments.device)
    folder = prepare_folder(arguments.out, FILES)
    torch.manual_seed(arguments.seed)
    counts, types = simulate(arguments.cells, arguments.genes)  # on the CPU: the same on every device
    training, test = counts.to(device).tensor_split([4 * len(counts) // 5])
    types = types[len(training) :].to(device)
    backend = fastvae.backend_for(training)
    print(f"backend    {backend}")
    print(
        f"data       {len(training):,} training and {len(test):,} test cells of {TYPES} types, {counts.shape[1]:,} "
        f"genes; {(counts == 0).double().mean():.0%} of the counts are 0"
    )

    results: dict[str, dict[str, float]] = {}
    for name, likelihood in ((arguments.likelihood, LIKELIHOODS[arguments.likelihood]), ("poisson", Poisson())):
        start = time.perf_counter()
        model = trained(likelihood, training, arguments.epochs)
        with torch.no_grad():
            bound, mu = model(test).loss.item(), model.encode(test).chunk(2, 1)[0]
        seconds, beside = time.perf_counter() - start, same_type_beside(mu, types)
        results[name] = {"negative_elbo": bound, "same_type_beside": beside, "seconds": seconds}
        print(
            f"{name:<10} -log p(x) at most {bound:.2f} nats per test cell; the nearest cell is of the same type for "
            f"{beside:.1%}; {seconds:.0f} s"
        )
        if name != "poisson":
            points, share = principal_components(mu)
            plots.plot_latent_map(
                folder / "latent_map.png",
                points,
                types,
                axis_labels=("first principal component of mu", f"second; the two show {share:.0%} of the variance"),
                title=f"Posterior means of {len(mu):,} test cells, coloured by type, {name}",
            )
    constant = constant_rates(training, test)
    print(f"constant   -log p(x) is {constant:.2f} nats per test cell: Poisson, with the same shares for all cells")
    write_summary(
        folder / "summary.json",
        {
            "models": results,
            "constant_rates": constant,
            "settings": {**vars(arguments), "out": str(folder)},
            "backend": backend._asdict(),
            "versions": versions(),
        },
    )
    print(f"written    {folder}: {', '.join(FILES)}")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--likelihood", choices=LIKELIHOODS, default="zinb", help="of the counts, default: zinb")
    parser.add_argument("--cells", type=positive_integer, default=5000, help="default: 5000, a fifth for the test")
    parser.add_argument("--genes", type=positive_integer, default=500, help="default: 500")
    parser.add_argument("--epochs", type=positive_integer, default=30, help="default: 30")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seed", type=seed, default=0, help="of every random number, default: 0")
    parser.add_argument("--out", type=Path, metavar="DIR", default=Path("runs", "counts"), help="default: runs/counts")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
