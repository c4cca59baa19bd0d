"""What is particular to the squared error behind a sigmoid; `test_contract.py` holds it to the rest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fastvae
import fastvae.functional as F
from bounds import assert_within
from fastvae.nn import SigmoidMSELoss
from fastvae.operations import REDUCTIONS, operations
from fastvae.reference import likelihood as reference

ROUNDINGS = next(it for it in operations() if it.name == "sigmoid_mse_loss").roundings


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("x", [0.0, 17.0, -17.0, 40.0, -40.0, 80.0, -80.0])
def test_gradient_where_the_sigmoid_rounds_to_1(device, x, create_graph, backend) -> None:
    """2 (y - t) y (1 - y), with 1 - y = 1 / (1 + e^x) and not what is left of 1 - 1; and its own gradient."""
    logits = torch.full((2, 3), x, device=device, requires_grad=True)
    target = torch.full_like(logits, 0.25).detach()
    wide = logits.detach().double().requires_grad_()
    y, tail = torch.sigmoid(wide), torch.sigmoid(-wide)
    wanted = (2 * (y - 0.25) * y * tail).detach()
    with fastvae.use_backend(backend):
        loss = F.sigmoid_mse_loss(logits, target, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, logits, create_graph=create_graph)
        kl = torch.zeros(2, device=device)
        _, (fast, _) = F.elbo_value_and_grad(logits.detach(), target, kl, reconstruction_weight=2.0)
    scale = wanted.abs() * (1 + abs(x))
    assert_within(gradient, wanted, scale, ROUNDINGS["logits_grad"])
    assert_within(fast, wanted, scale, ROUNDINGS["logits_grad"])
    if create_graph:
        (second,) = torch.autograd.grad(gradient.sum(), logits)
        slope = y * tail
        exact = 2 * slope * (slope + (y - 0.25) * (tail - y))
        assert_within(second, exact, exact.abs() * (1 + abs(x)) ** 2, ROUNDINGS["logits_grad"])


def test_mean_is_mse_loss() -> None:
    logits, target = torch.randn(2, 4, 9, dtype=torch.float64)
    expected = torch.nn.functional.mse_loss(torch.sigmoid(logits), target)
    torch.testing.assert_close(F.sigmoid_mse_loss(logits, target, reduction="mean"), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck_of_the_reference(reduction) -> None:
    inputs = [x.requires_grad_() for x in torch.randn(2, 3, 2, 2, dtype=torch.float64)]

    def function(logits: Tensor, target: Tensor) -> Tensor:
        return reference.sigmoid_mse_loss(logits, target, reduction=reduction)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_module(triton_backend, device, reduction) -> None:
    inputs = torch.randn(2, 3, 5, device=device)
    module = SigmoidMSELoss(reduction=reduction)
    assert torch.equal(module(*inputs), F.sigmoid_mse_loss(*inputs, reduction=reduction))
    assert repr(module) == f"SigmoidMSELoss(reduction={reduction!r})"
    assert torch.equal(SigmoidMSELoss()(*inputs), F.sigmoid_mse_loss(*inputs, reduction="batchmean"))


def test_a_reconstruction_has_no_dimensions(device) -> None:
    x = torch.randn(2, 4, device=device)
    with pytest.raises(ValueError, match="must be one of none, batchmean, sum, mean, got 'per_dimension'"):
        F.sigmoid_mse_loss(x, x, reduction="per_dimension")
