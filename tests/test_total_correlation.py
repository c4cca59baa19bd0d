"""The divergence in three parts, against its definition in float64, on both paths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastvae
import fastvae.functional as F
from fastvae.reference import mixture
from fastvae.reference import total_correlation as reference
from pairs import LOG_2PI

NAMES = ("z", "mu", "logvar")
PARTS = F.TotalCorrelationTerms._fields
WEIGHTINGS = ("minibatch", "stratified")


@pytest.fixture(params=["reference"])
def backend(request, monkeypatch):
    """Both paths: that of the CPU in blocks of a few pairs, with a rest."""
    monkeypatch.setattr(mixture, "block_size", lambda: 20)
    monkeypatch.setattr(mixture, "_PAIRS", 50)
    monkeypatch.setattr(reference, "_TERMS", 150)
    with fastvae.use_backend(request.param):
        yield request.param


def draw(batch, dims, dtype=torch.float32) -> list[Tensor]:
    return [torch.randn(batch, dims).to(dtype).requires_grad_() for _ in NAMES]


def weight_matrix(batch: int, size: int, weighting: str) -> Tensor:
    """As the paper has it, row by row."""
    if weighting == "minibatch":
        return torch.full((batch, batch), 1 / (size * batch), dtype=torch.float64)
    m = batch - 1
    weights = torch.full((batch, batch), 1 / m, dtype=torch.float64)
    for i in range(batch):
        weights[i, i] = 1 / size
        weights[i, (i + 1) % batch] = (size - m) / (size * m)
    return weights


def naive(z, mu, logvar, size, weighting) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row, from probabilities of all pairs."""
    log_w = weight_matrix(len(z), size, weighting).log()
    each = -0.5 * ((z[:, None] - mu) ** 2 * torch.exp(-logvar) + logvar + LOG_2PI)
    own = torch.stack([each[i, i].sum() for i in range(len(z))])
    joint = torch.logsumexp(log_w + each.sum(2), 1)
    marginals = torch.logsumexp(log_w[:, :, None] + each, 1).sum(1)
    return own - joint, joint - marginals, marginals + 0.5 * (z**2 + LOG_2PI).sum(1)


def upstream(batch: int) -> list[Tensor]:
    return [torch.linspace(-1, 2, batch), torch.linspace(3, -2, batch), torch.linspace(0.5, 1, batch)]


def run(tensors, size=100, weighting="minibatch"):
    """The numbers of each row, and the gradients of all tensors."""
    values = F.total_correlation(*tensors, size, weighting, reduction="none")
    return values, torch.autograd.grad(values, tensors, [g.to(values[0].dtype) for g in upstream(len(values[0]))])


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_float64_is_computed_in_float64(weighting, backend):
    tensors = draw(9, 4, torch.float64)
    values, gradients = run(tensors, 50, weighting)
    expected = naive(*tensors, 50, weighting)
    torch.testing.assert_close(tuple(values), expected)
    of_expected = torch.autograd.grad(expected, tensors, [g.double() for g in upstream(9)])
    torch.testing.assert_close(gradients, of_expected)
