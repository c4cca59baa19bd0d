"""Calls that are easy to read wrongly: a batch of one, missing gradients, minus signs not yet in memory."""

from __future__ import annotations

import pytest
import torch

import fastvae
import fastvae.functional as F


def both(function, *tensors):
    """The values and gradients of a fused call and of the reference on the same tensors."""
    results = []
    for backend in ("triton", "reference"):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        with fastvae.use_backend(backend):
            outputs = function(*leaves)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            gradients = torch.autograd.grad(sum(o.sum() for o in outputs), leaves, allow_unused=True)
        results.append([*outputs, *gradients])
    return zip(*results, strict=True)


def check(function, *tensors):
    for fused, reference in both(function, *tensors):
        assert (fused is None) == (reference is None)
        if fused is not None:
            torch.testing.assert_close(fused, reference, equal_nan=True)


@pytest.mark.parametrize("shape", [(1, 6), (1, 8, 3, 5)])
def test_halves_of_a_batch_of_one(shape, device, triton_backend):
    """Contiguous to torch, although stride(0) is that of the whole."""
    mu, logvar = torch.randn(shape, device=device).chunk(2, 1)
    assert mu.is_contiguous()
    eps = torch.randn(mu.shape, device=device)
    check(lambda m, v: F.gaussian_sample(m, v, eps=eps), mu, logvar)
    check(lambda m, v: F.gaussian_kl(m, v, reduction="none"), mu, logvar)
    check(lambda m, v: F.gaussian_sample_kl(m, v, eps=eps), mu, logvar)
    check(lambda m, v: F.sigmoid_mse_loss(m, v, reduction="none"), mu, logvar)
    kl = torch.rand(1, device=device)
    check(lambda m, v: F.elbo_loss(m, v, kl).loss, mu, logvar)


def test_what_no_upstream_gradient_reaches_has_none(device, triton_backend):
    logits = torch.full((2, 3), torch.nan, device=device, requires_grad=True)
    kl = torch.rand(2, device=device, requires_grad=True)
    out = F.elbo_loss(logits, torch.zeros(2, 3, device=device), kl)
    logits_grad, kl_grad = torch.autograd.grad(out.kl, (logits, kl), allow_unused=True)
    assert logits_grad is None
    torch.testing.assert_close(kl_grad, torch.full_like(kl, 0.5))
    out = F.elbo_loss(logits, torch.zeros(2, 3, device=device), kl)
    assert torch.autograd.grad(out.reconstruction, kl, allow_unused=True) == (None,)


@pytest.mark.parametrize("output", [0, 1, 2])
def test_double_backward_of_each_value_alone(output, device, triton_backend):
    target = torch.rand(3, 4, device=device)

    def slope(logits, kl):
        loss = F.elbo_loss(logits, target, kl, beta=0.7)[output]
        gradients = torch.autograd.grad(loss, (logits, kl), create_graph=True, allow_unused=True)
        return sum(g.square().sum() for g in gradients if g is not None)

    logits, kl = torch.randn(3, 4, device=device), torch.rand(3, device=device)
    values = []
    for backend in ("triton", "reference"):
        with fastvae.use_backend(backend):
            leaves = logits.clone().requires_grad_(), kl.clone().requires_grad_()
            penalty = slope(*leaves)
            values.append(
                [penalty, *(g for g in torch.autograd.grad(penalty, leaves, allow_unused=True) if g is not None)]
                if penalty.requires_grad
                else [penalty]
            )
    for fused, reference in zip(*values, strict=False):
        torch.testing.assert_close(fused, reference)


def test_a_minus_not_yet_in_memory_of_rows_that_share_it(device, triton_backend):
    """A copy that torch makes of such a tensor need not have the order in which its gradient is written."""
    row = torch.randn(7, 1, 2, device=device, dtype=torch.complex64).conj().imag
    hidden = row.expand(7, 3, 2).detach().requires_grad_()
    plain = hidden.detach().resolve_neg().contiguous().requires_grad_()
    assert hidden.is_neg() and hidden.stride(1) == 0
    target, kl = torch.rand(7, 3, 2, device=device), torch.rand(7, device=device)
    eps = torch.randn(7, 3, 1, device=device)

    def gradients(x):
        z, divergence = F.gaussian_sample_kl_packed(x, dim=2, eps=eps)
        losses = F.sigmoid_mse_loss(x, target), F.elbo_loss(x, target, kl).loss, z.sum() + divergence.sum()
        _, (logits_grad, _) = F.elbo_value_and_grad(x, target, kl)
        return [*(torch.autograd.grad(loss, x)[0] for loss in losses), logits_grad]

    torch.testing.assert_close(gradients(hidden), gradients(plain), rtol=0, atol=0)


def test_a_minus_not_yet_in_memory_elsewhere(device, triton_backend):
    def minus(x):
        return torch._neg_view(-x)

    logits, target = torch.randn(3, 5, device=device, requires_grad=True), torch.rand(3, 5, device=device)
    moments, eps = torch.randn(3, 4, device=device, requires_grad=True), torch.randn(3, 2, device=device)
    kl, beta, grad = torch.rand(3, device=device), torch.tensor(0.5, device=device), torch.rand(3, device=device)
    for hidden in (lambda x: x, minus):
        values = F.elbo_loss(logits, target, hidden(kl), beta=hidden(beta))
        loss = F.sigmoid_mse_loss(logits, target, reduction="none")
        z, divergence = F.gaussian_sample_kl_packed(moments, eps=hidden(eps))
        results = [
            *values,
            *torch.autograd.grad(values.loss, logits, hidden(beta)),
            *torch.autograd.grad(loss, logits, hidden(grad)),
            *torch.autograd.grad((z, divergence), moments, (hidden(eps), hidden(grad))),
        ]
        if hidden is not minus:
            expected = results
    for actual, wanted in zip(results, expected, strict=True):
        assert torch.equal(actual, wanted)


def test_the_same_choice_of_backend_can_be_entered_twice():
    before = fastvae.backend_for(torch.empty(1))
    choice = fastvae.use_backend("reference")
    with choice, choice:
        assert fastvae.backend_for(torch.empty(1)).reason == "asked for"
    assert fastvae.backend_for(torch.empty(1)) == before
