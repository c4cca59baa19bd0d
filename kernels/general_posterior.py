"""Launching the kernels of `general`: posteriors with another prior or scale, several samples, or log-densities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .general import general_backward_kernel, general_forward_kernel, score_kernel
from .launch import Plan, launch, make_plan, ticket
from .layout import (
    Strides,
    dense_strides,
    dense_strides_of,
    has_strides,
    in_format_of,
    in_order_of,
    remembered,
    with_strides,
)
from .noise import NO_RNG, noise_arguments, run_length, starts_on_quad
from .posterior import Layout, cut_columns, packed_layout, read_moments, second_half
from .tiles import Tiling, empty_sum, reduction_scale, sum_blocks

if TYPE_CHECKING:
    from fastvae.reference.gaussian import General


class PriorLayout(NamedTuple):
    """How the prior's halves lie, each as the rows of a posterior's: `inner` as in `Layout`, the distance of its rows,
    and whether one row is that of all samples.
    """

    inner: int = 0
    mu_stride: int = 0
    second_stride: int = 0
    mu_shared: bool = False
    second_shared: bool = False

    @property
    def shared(self) -> bool:
        return self.mu_shared or self.second_shared

    def has_gaps(self, event: int) -> bool:
        """Whether its rows do not follow each other as those of a posterior do that is one row."""
        distance = 2 * event if self.inner else event
        return self.shared or self.mu_stride != distance or self.second_stride != distance


class Prior(NamedTuple):
    """The prior as the kernels take it: where both halves are packed in one tensor, `mu` is that tensor, which begins
    with mu.
    """

    mu: Tensor | None
    second: Tensor | None
    layout: PriorLayout


def read_prior(mu: Tensor | None, second: Tensor | None, dim: int, layout: Layout) -> Prior:
    """The two forms of a prior, as `read_moments` takes those of a posterior, in the order of the posterior's
    elements: as they are where they lie so, else copies.
    """
    if mu is None:
        return Prior(None, None, PriorLayout())
    shared = layout.batch != 1 and mu.shape[0] == 1
    if second is None:
        mu = _in_order(mu, layout)
        found = packed_layout(mu.shape, mu.stride(), dense_strides(mu), dim)
        stride = 0 if shared else mu.stride(0)
        return Prior(mu, second_half(mu, found.shape, dim), PriorLayout(found.inner, stride, stride, shared, shared))
    mu, second = _in_order(mu, layout), _in_order(second, layout)
    second_shared = layout.batch != 1 and second.shape[0] == 1
    strides = [0 if one else tensor.stride(0) for one, tensor in ((shared, mu), (second_shared, second))]
    return Prior(mu, second, PriorLayout(0, *strides, shared, second_shared))


def _in_order(tensor: Tensor, layout: Layout) -> Tensor:
    """The tensor with rows that are dense in the order of the posterior's."""
    strides = dense_strides_of(tensor.shape, layout.strides)
    if has_strides(tensor, (tensor.stride(0), *strides[1:])) and not tensor.is_neg():
        return tensor
    return with_strides(tensor, strides)


def strides_of_z(posterior: General, layout: Layout) -> tuple[Sequence[int], Strides]:
    """The shape and the strides of z, of which the noise is counted in memory."""
    if not posterior.samples:
        return layout.shape, layout.strides
    return (posterior.samples, *layout.shape), (layout.batch * layout.event, *layout.strides)


def allocate(posterior: General, mu: Tensor, layout: Layout) -> list[Tensor]:
    """z, kl and log_q, those that the posterior asks for."""
    results = []
    if posterior.draws:
        results.append(mu.new_empty_strided(*strides_of_z(posterior, layout)))
    if posterior.per_dimension:
        results.append(mu.new_empty_strided(layout.shape[1:], layout.strides[1:], dtype=torch.float32))
    elif posterior.diverges:
        results.append(mu.new_empty([layout.batch] if posterior.reduction == "none" else [], dtype=torch.float32))
    if posterior.log_prob:
        shape = [posterior.samples, layout.batch] if posterior.samples else [layout.batch]
        results.append(mu.new_empty(shape, dtype=torch.float32))
    return results


def _scale_numbers(posterior: General) -> list[float]:
    """scale_eps, log_eps, low and high as the kernels take them."""
    log_eps = math.log(posterior.scale_eps) if posterior.scale_eps else 0.0
    return [posterior.scale_eps, log_eps, posterior.low, posterior.high]


def _scale_constants(posterior: General) -> dict[str, Any]:
    return {
        "SCALE": posterior.scale,
        "HAS_EPS": posterior.scale_eps > 0,
        "CLAMP": posterior.low > -math.inf or posterior.high < math.inf,
    }


def _shared_constants(posterior: General, prior: PriorLayout) -> dict[str, Any]:
    return {
        **_scale_constants(posterior),
        "PRIOR_SCALE": posterior.prior_scale,
        "MU_SHARED": prior.mu_shared,
        "SECOND_SHARED": prior.second_shared,
        "SEVERAL": posterior.samples > 1,
        "PRIOR_INNER": prior.inner,
    }


def _tile_constants(posterior: General, layout: Layout, tiling: Tiling, itemsize: int, on_quad: bool) -> dict[str, Any]:
    # The second sample, too, must start on a quad.
    on_quad = on_quad and (posterior.samples < 2 or layout.batch * layout.event % 4 == 0)
    return {
        "INNER": layout.inner,
        "FLAT": tiling.rows == 1,
        "RUN": run_length(tiling, itemsize, on_quad),
        "ROWS": tiling.tile_rows,
        "COLUMNS": tiling.tile_columns,
    }


def _cut(layout: Layout, columns: bool, per_row: bool, itemsize: int) -> tuple[Tiling, int]:
    """And the blocks that share the tiles of the same columns. `columns`: for sums over rows."""
    if columns:
        return cut_columns(layout.batch, layout.event, itemsize)
    tiling = layout.tiles(per_row, itemsize)
    if tiling.tile_columns == 4096:
        # 8 numbers per thread in place of 16, of which some forms spill (sm_90, triton 3.9). Not measured on a GPU.
        tiling = replace(tiling, num_warps=16)
    return tiling, -(-tiling.rows // tiling.tile_rows)


def _block(tiling: Tiling, blocks: int) -> int:
    """In which the last program reads partial sums of columns."""
    return 4096 // tiling.tile_columns if blocks > 1 else 1


@remembered
def plan_forward(
    posterior: General, layout: Layout, prior: PriorLayout, has_prior: bool, itemsize: int, on_quad: bool
) -> tuple[Plan, int, int]:
    """And the numbers of partial sums of kl and of log_q."""
    of_rows = posterior.diverges and posterior.reduction == "none"
    per_row = of_rows or posterior.log_prob or (has_prior and prior.has_gaps(layout.event))
    tiling, blocks = _cut(layout, posterior.per_dimension, per_row, itemsize)
    programs = tiling.chunks * blocks
    finishing: dict[str, Any]
    if posterior.per_dimension:
        kl_partials = blocks * layout.event if blocks > 1 else 0
        finishing = {"SUM": "column", "GROUPS": 1, "BLOCK": _block(tiling, blocks)}
    elif of_rows:
        kl_partials = tiling.rows * tiling.chunks if tiling.chunks > 1 else 0
        finishing = {"SUM": "row", **sum_blocks(tiling.rows, tiling.chunks)}
    else:
        kl_partials = programs if posterior.diverges and programs > 1 else 0
        finishing = {"SUM": "all", **sum_blocks(1, programs if posterior.diverges else 1)}
    samples = max(1, posterior.samples)
    log_q_partials = samples * tiling.rows * tiling.chunks if posterior.log_prob and tiling.chunks > 1 else 0
    of_log_q = sum_blocks(samples * tiling.rows, tiling.chunks if posterior.log_prob else 1)
    plan = make_plan(
        programs,
        tiling.num_warps,
        *_scale_numbers(posterior),
        posterior.free_bits,
        tiling.rows,
        tiling.columns,
        layout.row_stride,
        prior.mu_stride,
        prior.second_stride,
        tiling.chunks,
        blocks,
        samples,
        0.5 * reduction_scale(posterior.reduction, layout.batch, layout.event),
        **_shared_constants(posterior, prior),
        **_tile_constants(posterior, layout, tiling, itemsize, on_quad),
        **finishing,
        Q_GROUPS=of_log_q["GROUPS"],
        Q_BLOCK=of_log_q["BLOCK"],
    )
    return plan, kl_partials, log_q_partials


def general(
    posterior: General,
    mu: Tensor,
    second: Tensor | None,
    prior_mu: Tensor | None,
    prior_second: Tensor | None,
    eps: Tensor | None,
    *rng: Any,
) -> list[Tensor]:
    """z, kl and log_q, those that the posterior asks for. free_bits, here and below, only with "per_dimension"."""
    mu, second, layout = read_moments(mu, second, posterior.dim)
    results = allocate(posterior, mu, layout)
    z = results[0] if posterior.draws else None
    kl = results[posterior.draws] if posterior.diverges else None
    log_q = results[-1] if posterior.log_prob else None
    if layout.batch * layout.event == 0:
        if kl is not None:
            # The mean of each dimension over nothing is NaN, but where there are no dimensions.
            kl.fill_(float("nan") if posterior.per_dimension else empty_sum(posterior.reduction, layout.batch))
        if log_q is not None:
            log_q.zero_()
        return results
    prior = read_prior(prior_mu, prior_second, posterior.dim, layout)
    noise = noise_arguments(rng, mu.device, layout.event) if posterior.draws and eps is None else NO_RNG
    plan, kl_partials, log_q_partials = plan_forward(
        posterior, layout, prior.layout, prior.mu is not None, mu.element_size(), starts_on_quad(noise[-1])
    )
    launch(
        general_forward_kernel,
        plan,
        mu.device,
        mu,
        second,
        prior.mu,
        prior.second,
        None if eps is None else with_strides(eps, strides_of_z(posterior, layout)[1]),
        z,
        kl,
        log_q,
        mu.new_empty(kl_partials, dtype=torch.float32) if kl_partials else None,
        mu.new_empty(log_q_partials, dtype=torch.float32) if log_q_partials else None,
        ticket(mu.device) if kl_partials or log_q_partials else None,
        *noise,
    )
    return results


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
    and of the prior's halves, of kl_grad, and of the rows and samples of log_q_grad; shared: whether a gradient is a
    sum over rows.
    """
    tiling, blocks = _cut(layout, shared, per_row, itemsize)
    plan = make_plan(
        tiling.chunks * blocks,
        tiling.num_warps,
        *_scale_numbers(posterior),
        posterior.free_bits,
        tiling.rows,
        tiling.columns,
        layout.row_stride,
        strides[0],
        prior.mu_stride,
        prior.second_stride,
        *strides[1:3],
        tiling.chunks,
        blocks,
        max(1, posterior.samples),
        *strides[3:],
        reduction_scale(posterior.reduction, layout.batch, layout.event),
        **_shared_constants(posterior, prior),
        **_tile_constants(posterior, layout, tiling, itemsize, on_quad),
        WEIGHT=weight,
        BLOCK=_block(tiling, blocks) if shared else 1,
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
            _row_stride(prior_mu_grad),
            _row_stride(prior_second_grad),
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
    tiling, blocks = _cut(layout, False, True, itemsize)
    return make_plan(
        tiling.chunks * blocks,
        tiling.num_warps,
        *_scale_numbers(posterior),
        tiling.rows,
        tiling.columns,
        layout.row_stride,
        tiling.chunks,
        max(1, posterior.samples),
        *strides,
        **_scale_constants(posterior),
        **_tile_constants(posterior, layout, tiling, itemsize, on_quad),
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
