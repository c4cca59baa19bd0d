"""Launching the kernels of `general_backward`: the gradients of what `general_posterior` launches."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .general_backward import general_backward_kernel, score_kernel
from .general_posterior import (
    rows_at_once,
    scale_constants,
    scale_numbers,
    shared_constants,
    strides_of_z,
    tile_constants,
    tiles_of,
)
from .launch import Plan, launch, make_plan, ticket
from .layout import dense_strides, dense_strides_of, in_format_of, in_order_of, remembered, with_strides
from .moments import Layout, read_moments, second_half
from .noise import NO_RNG, noise_arguments, starts_on_quad
from .prior import PriorLayout, read_prior
from .tiles import reduction_scale

if TYPE_CHECKING:
    from fastvae.reference.gaussian import General


@remembered
def plan_backward(
    posterior: General,
    layout: Layout,
    prior: PriorLayout,
    itemsize: int,
    strides: tuple[int, ...],
    weight: str,
    per_row: bool,
    shared: bool,
    on_quad: bool,
) -> tuple[Plan, int]:
    """And the number of partial sums of each gradient of a shared prior. strides: of the rows of the gradients of mu
    and of the prior, of kl_grad, and of the rows and samples of log_q_grad; shared: whether a gradient is a
    sum over rows.
    """
    tiling, blocks = tiles_of(layout, shared, per_row, itemsize, True)
    plan = make_plan(
        tiling.chunks * blocks,
        tiling.num_warps,
        *scale_numbers(posterior),
        posterior.free_bits,
        tiling.rows,
        tiling.columns,
        layout.row_stride,
        strides[0],
        prior.mu_stride,
        prior.second_stride,
        strides[1],
        tiling.chunks,
        blocks,
        max(1, posterior.samples),
        *strides[2:],
        reduction_scale(posterior.reduction, layout.batch, layout.event),
        **shared_constants(posterior, prior),
        **tile_constants(posterior, layout, tiling, itemsize, on_quad),
        WEIGHT=weight,
        BLOCK=rows_at_once(tiling, blocks) if shared else 1,
    )
    return plan, blocks * layout.event if shared and blocks > 1 else 0


def needed_of(
    mu: Tensor, second: Tensor | None, prior_mu: Tensor | None, prior_second: Tensor | None, needed: Sequence[bool]
) -> list[Tensor]:
    """The tensors that get gradients."""
    tensors = mu, second, prior_mu, prior_second
    return [tensor for tensor, need in zip(tensors, needed, strict=True) if need and tensor is not None]


def general_backward(
    posterior: General,
    mu: Tensor,
    second: Tensor | None,
    prior_mu: Tensor | None,
    prior_second: Tensor | None,
    strides: Sequence[int],
    needed: Sequence[bool],
    z_grad: Tensor | None,
    kl_grad: Tensor | None,
    log_q_grad: Tensor | None,
    kl: Tensor | None,
    eps: Tensor | None,
    *rng: Any,
) -> list[Tensor]:
    """The gradients of those of the four tensors that are needed. strides: those that mu had in forward; kl: what
    forward wrote, where there are free bits.
    """
    mu = in_order_of(mu, tuple(strides))
    inputs = needed_of(mu, second, prior_mu, prior_second, needed)
    read_mu, read_second, layout = read_moments(mu, second, posterior.dim)
    prior = read_prior(prior_mu, prior_second, posterior.dim, layout)
    # In the order that is read; only an input that was copied has a gradient of other strides.
    of_packed = dense_strides(read_mu)
    gradients = [
        tensor.new_empty_strided(
            tensor.shape,
            of_packed if second is None and tensor is mu else dense_strides_of(tensor.shape, layout.strides),
        )
        for tensor in inputs
    ]
    if layout.batch * layout.event == 0:
        for gradient in gradients:
            gradient.zero_()  # that of a shared prior has elements all the same
        return in_format_of(inputs, gradients)
    each = iter(gradients)
    mu_grad, second_grad = _halves(each, needed[0], needed[1], second is None, layout, posterior.dim)
    prior_mu_grad, prior_second_grad = _halves(each, needed[2], needed[3], prior_second is None, layout, posterior.dim)
    noise = noise_arguments(rng, mu.device, layout.event) if z_grad is not None and eps is None else NO_RNG
    weight, kl_grad_stride = "one", 0
    if kl_grad is not None:
        kl_grad = kl_grad.resolve_neg()
        if posterior.per_dimension and any(stride != 0 for stride in kl_grad.stride()):
            weight, kl_grad = "column", with_strides(kl_grad, layout.strides[1:])
        elif posterior.reduction == "none" and kl_grad.stride(0):
            weight, kl_grad_stride = "row", kl_grad.stride(0)
    log_q_strides = [0, 0]
    if log_q_grad is not None:
        log_q_grad = log_q_grad.resolve_neg()
        log_q_strides = [log_q_grad.stride(-1), log_q_grad.stride(0) if posterior.samples else 0]
    shared = (prior.layout.mu_shared and needed[2]) or (
        prior.layout.second_shared and (needed[2] if prior_second is None else needed[3])
    )
    has_gaps = kl_grad is not None and prior.mu is not None and prior.layout.has_gaps(layout.event)
    plan, partials = plan_backward(
        posterior,
        layout,
        prior.layout,
        mu.element_size(),
        (
            _row_stride(mu_grad, second_grad),
            # The rows of those that are not shared lie alike.
            _row_stride(
                None if prior.layout.mu_shared else prior_mu_grad,
                None if prior.layout.second_shared else prior_second_grad,
            ),
            kl_grad_stride,
            *log_q_strides,
        ),
        weight,
        weight != "one" or kl is not None or log_q_grad is not None or has_gaps,
        shared,
        starts_on_quad(noise[-1]),
    )
    partial_mu, partial_second = (
        mu.new_empty(partials, dtype=torch.float32) if partials and is_shared and gradient is not None else None
        for is_shared, gradient in (
            (prior.layout.mu_shared, prior_mu_grad),
            (prior.layout.second_shared, prior_second_grad),
        )
    )
    launch(
        general_backward_kernel,
        plan,
        mu.device,
        read_mu,
        read_second,
        prior.mu,
        prior.second,
        None if eps is None else with_strides(eps, strides_of_z(posterior, layout)[1]),
        None if z_grad is None else with_strides(z_grad, strides_of_z(posterior, layout)[1]),
        kl_grad,
        None if kl is None or kl_grad is None else with_strides(kl, layout.strides[1:]),
        log_q_grad,
        mu_grad,
        second_grad,
        prior_mu_grad,
        prior_second_grad,
        partial_mu,
        partial_second,
        ticket(mu.device) if partials else None,
        *noise,
    )
    return in_format_of(inputs, gradients)


def _halves(
    gradients: Any, first: bool, other: bool, packed: bool, layout: Layout, dim: int
) -> tuple[Tensor | None, Tensor | None]:
    """The next gradients of two halves, of those that are needed."""
    if not packed:
        return next(gradients) if first else None, next(gradients) if other else None
    if not first:
        return None, None
    gradient = next(gradients)
    return gradient, second_half(gradient, torch.Size((gradient.shape[0], *layout.shape[1:])), dim)


def _row_stride(*gradients: Tensor | None) -> int:
    return next((gradient.stride(0) for gradient in gradients if gradient is not None), 0)


@remembered
def plan_score(posterior: General, layout: Layout, itemsize: int, strides: tuple[int, int], on_quad: bool) -> Plan:
    tiling, blocks = tiles_of(layout, False, True, itemsize, True)
    return make_plan(
        tiling.chunks * blocks,
        tiling.num_warps,
        *scale_numbers(posterior),
        tiling.rows,
        tiling.columns,
        layout.row_stride,
        tiling.chunks,
        max(1, posterior.samples),
        *strides,
        **scale_constants(posterior),
        **tile_constants(posterior, layout, tiling, itemsize, on_quad),
    )


def score(
    posterior: General,
    mu: Tensor,
    second: Tensor | None,
    strides: Sequence[int],
    log_q_grad: Tensor,
    eps: Tensor | None,
    *rng: Any,
) -> Tensor:
    """The gradient of log_q in z, where log_q is a function of z alone. strides: those that mu had in forward."""
    mu, second, layout = read_moments(in_order_of(mu, tuple(strides)), second, posterior.dim)
    shape, z_strides = strides_of_z(posterior, layout)
    z_grad = mu.new_empty_strided(shape, z_strides)
    if prod(shape) == 0:
        return z_grad
    noise = noise_arguments(rng, mu.device, layout.event) if eps is None else NO_RNG
    log_q_grad = log_q_grad.resolve_neg()
    of_log_q = log_q_grad.stride(-1), log_q_grad.stride(0) if posterior.samples else 0
    launch(
        score_kernel,
        plan_score(posterior, layout, mu.element_size(), of_log_q, starts_on_quad(noise[-1])),
        mu.device,
        second,
        None if eps is None else with_strides(eps, z_strides),
        log_q_grad,
        z_grad,
        *noise,
    )
    return z_grad
