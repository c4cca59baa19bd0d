"""Autograd of the diagonal Gaussian posterior.

Saved for backward: mu and logvar (or the packed moments), a given eps, and the pair (seed, offset) from which
backward makes the noise again, in the memory order that mu had in forward. Neither the noise nor the standard deviation
is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvae import random
from fastvae.autograd.registration import apply, is_differentiated, is_traced, refuse_vmap, register
from fastvae.kernels import gaussian as kernels
from fastvae.kernels.layout import Strides, empty_gradients, in_order_of
from fastvae.reference.precision import in_float32

_RNG = "Tensor? seed_tensor, Tensor? offset_tensor, int seed, int offset, SymInt batch_offset"
_operations = torch.ops.fastvae


def _fake_sample(mu: Tensor, logvar: Tensor, *noise: Any) -> Tensor:
    return kernels.allocate_z(kernels.read_moments(mu, logvar, 1))


def _fake_kl(mu: Tensor, logvar: Tensor, reduction: str, free_bits: float) -> Tensor:
    return kernels.allocate_kl(kernels.read_moments(mu, logvar, 1), reduction)


def _fake_sample_kl(
    mu: Tensor, logvar: Tensor | None, dim: int, reduction: str, free_bits: float, *noise: Any
) -> tuple[Tensor, Tensor]:
    moments = kernels.read_moments(mu, logvar, dim)
    return kernels.allocate_z(moments), kernels.allocate_kl(moments, reduction)


def _fake_backward(
    mu: Tensor,
    logvar: Tensor | None,
    strides: Sequence[int],
    dim: int,
    reduction: str,
    free_bits: float,
    z_grad: Tensor | None,
    kl_grad: Tensor | None,
    kl: Tensor | None,
    needs_mu: bool,
    needs_logvar: bool,
    *noise: Any,
) -> list[Tensor]:
    if logvar is None:
        return empty_gradients(mu)
    return empty_gradients(*[tensor for tensor, needed in ((mu, needs_mu), (logvar, needs_logvar)) if needed])


def _backward(mu: Tensor, logvar: Tensor | None, strides: Sequence[int], *others: Any) -> list[Tensor]:
    """strides: those that mu had in forward."""
    return kernels.gaussian_backward(in_order_of(mu, tuple(strides)), logvar, *others)


register(
    f"gaussian_sample(Tensor mu, Tensor logvar, Tensor? eps, {_RNG}) -> Tensor", kernels.gaussian_sample, _fake_sample
)
register(
    "gaussian_kl(Tensor mu, Tensor logvar, str reduction, float free_bits) -> Tensor", kernels.gaussian_kl, _fake_kl
)
register(
    "gaussian_sample_kl(Tensor mu, Tensor? logvar, int dim, str reduction, float free_bits, Tensor? eps, "
    f"{_RNG}) -> (Tensor, Tensor)",
    kernels.gaussian_sample_kl,
    _fake_sample_kl,
)
register(
    "gaussian_backward(Tensor mu, Tensor? logvar, SymInt[] strides, int dim, str reduction, float free_bits, "
    f"Tensor? z_grad, Tensor? kl_grad, Tensor? kl, bool needs_mu, bool needs_logvar, Tensor? eps, {_RNG}) -> Tensor[]",
    _backward,
    _fake_backward,
)


def _save(
    ctx: Any,
    kl: Tensor | None,
    mu: Tensor,
    logvar: Tensor | None,
    dim: int,
    reduction: str,
    free_bits: float,
    eps: Tensor | None,
    *rng: Any,
) -> None:
    seed_tensor, offset_tensor, *ctx.numbers = rng
    ctx.save_for_backward(mu, logvar, eps, seed_tensor, offset_tensor, kl if free_bits else None)
    ctx.options = mu.stride(), dim, reduction, free_bits
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, z_grad: Tensor | None, kl_grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of (mu, logvar), or of (moments, None)."""
    if z_grad is None and kl_grad is None:
        return None, None
    mu, logvar, eps, seed_tensor, offset_tensor, kl = ctx.saved_tensors
    rng = seed_tensor, offset_tensor, *ctx.numbers
    tensors = mu, logvar, z_grad, kl_grad, kl, eps, seed_tensor, offset_tensor
    if is_differentiated(*tensors):
        return _differentiable_gradients(mu, logvar, *ctx.options, z_grad, kl_grad, kl, eps, *rng)
    needs_mu, needs_logvar = ctx.needs_input_grad[:2]
    launcher = _operations.gaussian_backward if is_traced(*tensors) else _backward
    gradients = launcher(mu, logvar, *ctx.options, z_grad, kl_grad, kl, needs_mu, needs_logvar, eps, *rng)
    if logvar is None:
        return gradients[0], None
    return gradients[0] if needs_mu else None, gradients[-1] if needs_logvar else None


def _differentiable_gradients(
    mu: Tensor,
    logvar: Tensor | None,
    strides: Strides,
    dim: int,
    reduction: str,
    free_bits: float,
    z_grad: Tensor | None,
    kl_grad: Tensor | None,
    kl: Tensor | None,
    eps: Tensor | None,
    *rng: Any,
) -> tuple[Tensor, Tensor | None]:
    """The formulas of the backward kernels in plain PyTorch, around the same noise."""
    mu = in_order_of(mu, strides)
    layout = kernels.read_moments(mu, logvar, dim).layout
    wide_mu, wide_logvar = map(in_float32, mu.chunk(2, dim) if logvar is None else (mu, logvar))
    mu_grad = torch.zeros_like(wide_mu)
    logvar_grad = torch.zeros_like(wide_mu)
    if z_grad is not None:
        if eps is None:
            # mu = logvar = 0 makes z the noise itself. Through the registered operation, because the tensors may be
            # those of a torch.func transform, also of one that has ended.
            zero = wide_mu.new_empty_strided(layout.shape, layout.strides).zero_()
            eps = _operations.gaussian_sample(zero, zero, None, *rng)
        wide_grad = in_float32(z_grad)
        mu_grad = mu_grad + wide_grad
        logvar_grad = logvar_grad + 0.5 * wide_grad * torch.exp(0.5 * wide_logvar) * in_float32(eps)
    if kl_grad is not None:
        scale = in_float32(kl_grad) * kernels.reduction_scale(reduction, layout.batch, layout.event)
        if kl is not None:
            scale = torch.where(kl.detach() <= free_bits, 0.0, scale)
        if reduction == "none":
            scale = scale.view(-1, *[1] * (wide_mu.ndim - 1))
        mu_grad = mu_grad + scale * wide_mu
        logvar_grad = logvar_grad + 0.5 * scale * torch.expm1(wide_logvar)
    if logvar is None:
        return torch.cat((mu_grad, logvar_grad), dim).to(mu.dtype), None
    return mu_grad.to(mu.dtype), logvar_grad.to(mu.dtype)


class GaussianSample(torch.autograd.Function):
    """z of (mu, logvar, eps, *rng)."""

    # The parameters one by one: torch.compile counts them to tell this form from forward(ctx, ...).
    @staticmethod
    def forward(
        mu: Tensor,
        logvar: Tensor,
        eps: Tensor | None,
        seed_tensor: Tensor | None,
        offset_tensor: Tensor | None,
        seed: int,
        offset: int,
        batch_offset: int,
    ) -> Tensor:
        operations = _operations if is_traced(mu, logvar, eps, seed_tensor, offset_tensor) else kernels
        return operations.gaussian_sample(mu, logvar, eps, seed_tensor, offset_tensor, seed, offset, batch_offset)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        mu, logvar, eps, *rng = inputs
        _save(ctx, None, mu, logvar, 1, "none", 0.0, eps, *rng)

    @staticmethod
    def backward(ctx: Any, z_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, z_grad, None), None, None, None, None, None, None

    vmap = refuse_vmap("gaussian_sample")


class GaussianKL(torch.autograd.Function):
    """kl of (mu, logvar, reduction, free_bits)."""

    @staticmethod
    def forward(mu: Tensor, logvar: Tensor, reduction: str, free_bits: float) -> Tensor:
        return (_operations if is_traced(mu, logvar) else kernels).gaussian_kl(mu, logvar, reduction, free_bits)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        mu, logvar, reduction, free_bits = inputs
        _save(ctx, output, mu, logvar, 1, reduction, free_bits, None, *kernels.NO_RNG)

    @staticmethod
    def backward(ctx: Any, kl_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, None, kl_grad), None, None

    vmap = refuse_vmap("gaussian_kl")


class GaussianSampleKL(torch.autograd.Function):
    """(z, kl) of (mu, logvar, dim, reduction, free_bits, eps, *rng); with logvar None, mu holds both, halves along
    dim.
    """

    @staticmethod
    def forward(
        mu: Tensor,
        logvar: Tensor | None,
        dim: int,
        reduction: str,
        free_bits: float,
        eps: Tensor | None,
        seed_tensor: Tensor | None,
        offset_tensor: Tensor | None,
        seed: int,
        offset: int,
        batch_offset: int,
    ) -> tuple[Tensor, Tensor]:
        operations = _operations if is_traced(mu, logvar, eps, seed_tensor, offset_tensor) else kernels
        return operations.gaussian_sample_kl(
            mu, logvar, dim, reduction, free_bits, eps, seed_tensor, offset_tensor, seed, offset, batch_offset
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _save(ctx, output[1], *inputs)

    @staticmethod
    def backward(ctx: Any, z_grad: Tensor | None, kl_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, z_grad, kl_grad), None, None, None, None, None, None, None, None, None

    vmap = refuse_vmap("gaussian_sample_kl(_packed)")


def _noise(
    tensor: Tensor, eps: Tensor | None, generator: torch.Generator | None, batch_offset: int | None
) -> tuple[Any, ...]:
    return kernels.NO_RNG if eps is not None else (*random.reserve(tensor.device, generator), batch_offset or 0)


def gaussian_sample(
    mu: Tensor, logvar: Tensor, eps: Tensor | None, generator: torch.Generator | None, batch_offset: int | None
) -> Tensor:
    return apply(GaussianSample, mu, logvar, eps, *_noise(mu, eps, generator, batch_offset))


def gaussian_kl(mu: Tensor, logvar: Tensor, reduction: str, free_bits: float) -> Tensor:
    if free_bits and reduction == "batchmean":
        return apply(GaussianKL, mu, logvar, "per_dimension", free_bits).sum()
    return apply(GaussianKL, mu, logvar, reduction, free_bits)


def gaussian_sample_kl(
    mu: Tensor,
    logvar: Tensor | None,
    dim: int,
    reduction: str,
    free_bits: float,
    eps: Tensor | None,
    generator: torch.Generator | None,
    batch_offset: int | None,
) -> tuple[Tensor, Tensor]:
    noise = _noise(mu, eps, generator, batch_offset)
    if free_bits and reduction == "batchmean":
        z, kl = apply(GaussianSampleKL, mu, logvar, dim, "per_dimension", free_bits, eps, *noise)
        return z, kl.sum()
    return apply(GaussianSampleKL, mu, logvar, dim, reduction, free_bits, eps, *noise)
