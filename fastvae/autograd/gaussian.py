"""Autograd of the diagonal Gaussian posterior.

It saves mu and logvar (or the packed moments), a given eps, and the pair (seed, offset), from which backward recomputes
the noise in the memory order that mu had in forward. Neither the noise nor the standard deviation is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastvae import random
from fastvae.autograd.registration import apply, is_differentiated, is_traced, operations, refuse_vmap, register
from fastvae.kernels import posterior as kernels
from fastvae.kernels.layout import empty_gradients, in_order_of
from fastvae.reference.gaussian import Posterior
from fastvae.reference.precision import in_float32

# A registered operation takes the fields of a Posterior one by one.
_POSTERIOR = "bool draws, bool diverges, int dim, str reduction, float free_bits"
_NOISE = "Tensor? eps, Tensor? seed_tensor, Tensor? offset_tensor, int seed, int offset, SymInt batch_offset"
_FIELDS = len(Posterior._fields)


def _with_fields(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a Posterior and others, as one of the fields and others."""
    return lambda *arguments: function(Posterior(*arguments[:_FIELDS]), *arguments[_FIELDS:])


def _fake(posterior: Posterior, mu: Tensor, logvar: Tensor | None, *noise: Any) -> list[Tensor]:
    return kernels.allocate(posterior, kernels.read_moments(mu, logvar, posterior.dim))


def _fake_backward(
    posterior: Posterior, mu: Tensor, logvar: Tensor | None, strides: Sequence[int], needed: Sequence[bool], *_: Any
) -> list[Tensor]:
    return empty_gradients(*kernels.needed_of(mu, logvar, needed))


register(
    f"gaussian({_POSTERIOR}, Tensor mu, Tensor? logvar, {_NOISE}) -> Tensor[]",
    _with_fields(kernels.gaussian),
    _with_fields(_fake),
)
register(
    f"gaussian_backward({_POSTERIOR}, Tensor mu, Tensor? logvar, SymInt[] strides, bool[] needed, Tensor? z_grad, "
    f"Tensor? kl_grad, Tensor? kl, {_NOISE}) -> Tensor[]",
    _with_fields(kernels.gaussian_backward),
    _with_fields(_fake_backward),
)


def _differentiable_gradients(
    posterior: Posterior,
    mu: Tensor,
    logvar: Tensor | None,
    z_grad: Tensor | None,
    kl_grad: Tensor | None,
    kl: Tensor | None,
    eps: Tensor | None,
    *rng: Any,
) -> tuple[Tensor, Tensor | None]:
    """The formulas of the backward kernels in plain PyTorch, around the same noise."""
    layout = kernels.read_moments(mu, logvar, posterior.dim).layout
    wide_mu, wide_logvar = map(in_float32, mu.chunk(2, posterior.dim) if logvar is None else (mu, logvar))
    mu_grad = torch.zeros_like(wide_mu)
    logvar_grad = torch.zeros_like(wide_mu)
    if z_grad is not None:
        if eps is None:
            # mu = logvar = 0 makes z the noise itself. Through the registered operation, because the tensors may be
            # those of a torch.func transform, also of one that has ended.
            zero = wide_mu.new_empty_strided(layout.shape, layout.strides).zero_()
            (eps,) = operations.gaussian(*Posterior(True, False), zero, zero, None, *rng)
        wide_grad = in_float32(z_grad)
        mu_grad = mu_grad + wide_grad
        logvar_grad = logvar_grad + 0.5 * wide_grad * torch.exp(0.5 * wide_logvar) * in_float32(eps)
    if kl_grad is not None:
        scale = in_float32(kl_grad) * kernels.reduction_scale(posterior.reduction, layout.batch, layout.event)
        if kl is not None:
            scale = torch.where(kl.detach() <= posterior.free_bits, 0.0, scale)
        if posterior.reduction == "none":
            scale = scale.view(-1, *[1] * (wide_mu.ndim - 1))
        mu_grad = mu_grad + scale * wide_mu
        logvar_grad = logvar_grad + 0.5 * scale * torch.expm1(wide_logvar)
    if logvar is None:
        return torch.cat((mu_grad, logvar_grad), posterior.dim).to(mu.dtype), None
    return mu_grad.to(mu.dtype), logvar_grad.to(mu.dtype)


class Gaussian(torch.autograd.Function):
    """z and kl, as far as the posterior asks for them, from (posterior, mu, logvar, eps, *rng). With logvar None, mu
    holds both, as halves along posterior.dim.
    """

    # The arguments one by one: torch.compile counts them to tell this form from forward(ctx, ...).
    @staticmethod
    def forward(
        posterior: Posterior,
        mu: Tensor,
        logvar: Tensor | None,
        eps: Tensor | None,
        seed_tensor: Tensor | None,
        offset_tensor: Tensor | None,
        seed: int,
        offset: int,
        batch_offset: int,
    ) -> tuple[Tensor, ...]:
        others = mu, logvar, eps, seed_tensor, offset_tensor, seed, offset, batch_offset
        if is_traced(mu, logvar, eps, seed_tensor, offset_tensor):
            return tuple(operations.gaussian(*posterior, *others))
        return tuple(kernels.gaussian(posterior, *others))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.posterior, mu, logvar, eps, seed_tensor, offset_tensor, *ctx.numbers = inputs
        ctx.strides = mu.stride()
        kl = output[-1] if ctx.posterior.free_bits else None
        ctx.save_for_backward(mu, logvar, eps, seed_tensor, offset_tensor, kl)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        posterior = ctx.posterior
        z_grad = grads[0] if posterior.draws else None
        kl_grad = grads[-1] if posterior.diverges else None
        mu_grad = logvar_grad = None
        mu, logvar, eps, seed_tensor, offset_tensor, kl = ctx.saved_tensors
        noise = eps, seed_tensor, offset_tensor, *ctx.numbers
        tensors = mu, logvar, z_grad, kl_grad, kl, eps, seed_tensor, offset_tensor
        needed = ctx.needs_input_grad[1:3]
        if z_grad is None and kl_grad is None:
            pass
        elif is_differentiated(*tensors):
            mu = in_order_of(mu, ctx.strides)
            mu_grad, logvar_grad = _differentiable_gradients(posterior, mu, logvar, z_grad, kl_grad, kl, *noise)
        else:
            others = mu, logvar, ctx.strides, needed, z_grad, kl_grad, kl, *noise
            if is_traced(*tensors):
                found = operations.gaussian_backward(*posterior, *others)
            else:
                found = kernels.gaussian_backward(posterior, *others)
            mu_grad = found[0] if needed[0] else None
            logvar_grad = found[-1] if needed[1] else None
        return None, mu_grad, logvar_grad, None, None, None, None, None, None

    vmap = refuse_vmap("gaussian_sample, gaussian_kl or gaussian_sample_kl")


def gaussian(
    posterior: Posterior,
    mu: Tensor,
    logvar: Tensor | None,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
    batch_offset: int | None = None,
) -> tuple[Tensor, ...]:
    """z and kl, as far as the posterior asks for them."""
    rng = kernels.NO_RNG
    if posterior.draws and eps is None:
        rng = (*random.reserve(mu.device, generator), batch_offset or 0)
    if posterior.free_bits and posterior.reduction == "batchmean":
        *z, kl = apply(Gaussian, posterior._replace(reduction="per_dimension"), mu, logvar, eps, *rng)
        return *z, kl.sum()
    results: tuple[Tensor, ...] = apply(Gaussian, posterior, mu, logvar, eps, *rng)
    return results
