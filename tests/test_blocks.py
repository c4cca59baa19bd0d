"""Large batches on the CPU, which are computed in blocks: the results are those of the formula on the whole batch."""

from __future__ import annotations

import pytest
import torch

import fastvae
import fastvae.functional as F
from fastvae.likelihoods import Bernoulli, Gaussian, Likelihood, NegativeBinomial
from fastvae.reference import blocks
from own_likelihood import LearnedGaussian

BATCH, GENES = 10, 7
SHAPES = [(BATCH, GENES), (GENES,), (), (1, 1), (BATCH, 1)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "_PER_THREAD", 3 * GENES)  # three samples each, and one in the last
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with fastvae.use_backend("reference"):
        yield


def inputs(likelihood: Likelihood, shape: tuple[int, ...]) -> list[torch.Tensor]:
    """The second parameter of this shape."""
    tensors = list(likelihood.draw((BATCH, GENES), torch.Generator().manual_seed(0)))
    tensors[1] = tensors[1][tuple(slice(size) for size in (1,) * (2 - len(shape)) + shape)].reshape(shape)
    return [tensor.double().requires_grad_(k < 2) for k, tensor in enumerate(tensors)]


@pytest.mark.parametrize("reduction", ["none", "batchmean", "sum", "mean"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("likelihood", [Gaussian(), NegativeBinomial(), LearnedGaussian()], ids=str)
def test_values_and_gradients(likelihood, shape, reduction):
    """Also where samples have weights, and of a likelihood whose slopes torch derives."""
    *parameters, target = inputs(likelihood, shape)
    assert blocks.rows_of_a_block((*parameters, target)) == 3
    loss = F.negative_log_likelihood(tuple(parameters), target, likelihood, reduction=reduction)
    terms = likelihood.formula(*parameters, target)
    of_samples = terms.sum(1)
    whole = {"none": of_samples, "batchmean": of_samples.mean(), "sum": terms.sum(), "mean": terms.mean()}[reduction]
    torch.testing.assert_close(loss, whole)
    upstream = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    found = torch.autograd.grad(loss, parameters, upstream, create_graph=True)
    expected = torch.autograd.grad(whole, parameters, upstream, create_graph=True)
    torch.testing.assert_close(found, expected)
    of_blocks = torch.autograd.grad(loss, parameters, upstream)
    torch.testing.assert_close(of_blocks, tuple(gradient.detach() for gradient in expected))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("likelihood", [Gaussian(), NegativeBinomial(), LearnedGaussian()], ids=str)
def test_value_and_gradient_at_once(likelihood, shape):
    *parameters, target = inputs(likelihood, shape)
    kl = torch.rand(BATCH, dtype=torch.float64)
    values, (gradients, _) = F.elbo_value_and_grad(tuple(parameters), target, kl, likelihood=likelihood)
    whole = likelihood.formula(*parameters, target).sum(1).mean()
    torch.testing.assert_close(values.reconstruction, whole.detach())
    torch.testing.assert_close(gradients, torch.autograd.grad(whole, parameters))


def test_bytes_beside_float64():
    """They are divided in the precision of the parameters."""
    logits = torch.linspace(-3, 3, BATCH * GENES, dtype=torch.float64).view(BATCH, GENES)
    images = torch.arange(BATCH * GENES, dtype=torch.uint8).view(BATCH, GENES)
    found = F.negative_log_likelihood(logits, images, Bernoulli(), reduction="none")
    expected = F.negative_log_likelihood(logits, images.double() / 255, Bernoulli(), reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


def test_what_is_not_computed_in_blocks():
    *parameters, target = inputs(Gaussian(), (GENES,))
    assert blocks.rows_of_a_block((*parameters, target.requires_grad_())) is None
    assert blocks.rows_of_a_block([tensor[:5] for tensor in inputs(Gaussian(), (BATCH, 1))]) is None  # too few
    seen = []
    torch.func.grad(lambda mean: seen.append(blocks.rows_of_a_block((mean, target))) or mean.sum())(target.detach())
    assert seen == [None]
