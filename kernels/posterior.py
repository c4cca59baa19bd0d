"""Launch the kernels of the diagonal Gaussian posterior: `gaussian`, and `dimensions` for sums over the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .dimensions import dimensions_backward_kernel, dimensions_forward_kernel
from .gaussian import gaussian_backward_kernel, gaussian_forward_kernel
from .launch import Plan, launch, make_plan, ticket
from .layout import dense_strides, in_format_of, in_order_of, remembered, with_strides
from .moments import Layout, Moments, read_moments, second_half
from .noise import NO_RNG, noise_arguments, run_length, starts_on_quad
from .tiles import Tiling, empty_sum, power_of_2, reduction_scale, sum_blocks

if TYPE_CHECKING:
    from fastvae.reference.gaussian import Posterior

# What the last program adds up alone: 128 numbers per thread. Not measured on a GPU.
_MOST_PARTIAL_SUMS = 16384


def allocate(posterior: Posterior, moments: Moments) -> list[Tensor]:
    """z and kl, those that the posterior asks for."""
    mu, _, layout = moments
    results = []
    if posterior.draws:
        results.append(mu.new_empty_strided(layout.shape, layout.strides))
    if posterior.per_dimension:
        results.append(mu.new_empty_strided(layout.shape[1:], layout.strides[1:], dtype=torch.float32))
    elif posterior.diverges:
        results.append(mu.new_empty([layout.batch] if posterior.reduction == "none" else [], dtype=torch.float32))
    return results


def cut_columns(rows: int, columns: int, itemsize: int) -> tuple[Tiling, int]:
    """Tiles for sums over rows, and the blocks that share the tiles of the same columns.

    A tile has two vectors of 16 bytes per thread and tensor. Its rows have one or two cache lines of 128 bytes if there
    are enough columns. No figure here was measured on a GPU.
    """
    width = min(max(4, power_of_2(columns)), 64)
    height = min(2 * 128 * 16 // itemsize // width, power_of_2(rows))
    tiling = Tiling(rows, columns, height, width, 4)
    most = max(1, _MOST_PARTIAL_SUMS // (tiling.chunks * width))
    return tiling, min(-(-rows // height), most)


@remembered
def plan_forward(posterior: Posterior, layout: Layout, itemsize: int, on_quad: bool) -> tuple[Plan, int]:
    """And the number of partial sums."""
    per_row = posterior.diverges and posterior.reduction == "none"
    tiling = layout.tiles(per_row, itemsize)
    groups, count = (tiling.rows, tiling.chunks) if per_row else (1, tiling.programs if posterior.diverges else 1)
    plan = make_plan(
        tiling.programs,
        tiling.num_warps,
        tiling.rows,
        tiling.columns,
        layout.row_stride,
        tiling.chunks,
        0.5 * reduction_scale(posterior.reduction, layout.batch, layout.event),
        INNER=layout.inner,
        FLAT=tiling.rows == 1,
        RUN=run_length(tiling, itemsize, on_quad),
        PER_ROW=per_row,
        ROWS=tiling.tile_rows,
        COLUMNS=tiling.tile_columns,
        **sum_blocks(groups, count),
    )
    return plan, tiling.programs if count > 1 else 0


@remembered
def plan_dimensions_forward(posterior: Posterior, layout: Layout, itemsize: int, on_quad: bool) -> tuple[Plan, int]:
    """And the number of partial sums."""
    tiling, blocks = cut_columns(layout.batch, layout.event, itemsize)
    plan = make_plan(
        tiling.chunks * blocks,
        tiling.num_warps,
        posterior.free_bits,
        tiling.rows,
        tiling.columns,
        layout.row_stride,
        tiling.chunks,
        blocks,
        0.5 / layout.batch,
        INNER=layout.inner,
        RUN=run_length(tiling, itemsize, on_quad),
        ROWS=tiling.tile_rows,
        COLUMNS=tiling.tile_columns,
        BLOCK=4096 // tiling.tile_columns if blocks > 1 else 1,
    )
    return plan, blocks * layout.event if blocks > 1 else 0


def gaussian(posterior: Posterior, mu: Tensor, logvar: Tensor | None, eps: Tensor | None, *rng: Any) -> list[Tensor]:
    """z and kl, those that the posterior asks for. free_bits, here and below, only with "per_dimension"."""
    moments = read_moments(mu, logvar, posterior.dim)
    mu, logvar, layout = moments
    results = allocate(posterior, moments)
    kl = results[-1] if posterior.diverges else None
    if layout.batch * layout.event == 0:
        if kl is not None:
            # The mean of each dimension over nothing is NaN, but where there are no dimensions.
            kl.fill_(float("nan") if posterior.per_dimension else empty_sum(posterior.reduction, layout.batch))
        return results
    z = results[0] if posterior.draws else None
    drawn = posterior.draws and eps is None
    noise = noise_arguments(rng, mu.device, layout.event) if drawn else NO_RNG
    if posterior.per_dimension:
        kernel, make = dimensions_forward_kernel, plan_dimensions_forward
    else:
        kernel, make = gaussian_forward_kernel, plan_forward
    plan, partials = make(posterior, layout, mu.element_size(), starts_on_quad(noise[-1]))
    launch(
        kernel,
        plan,
        mu.device,
        mu,
        logvar,
        None if eps is None else with_strides(eps, layout.strides),
        z,
        kl,
        mu.new_empty(partials, dtype=torch.float32) if partials else None,
        ticket(mu.device) if partials else None,
        *noise,
    )
    return results


@remembered
def plan_backward(
    reduction: str, layout: Layout, itemsize: int, grad_row_stride: int, kl_grad_stride: int, on_quad: bool
) -> Plan:
    tiling = layout.tiles(kl_grad_stride != 0, itemsize)
    return make_plan(
        tiling.programs,
        tiling.num_warps,
        tiling.rows,
        tiling.columns,
        layout.row_stride,
        grad_row_stride,
        tiling.chunks,
        kl_grad_stride,
        reduction_scale(reduction, layout.batch, layout.event),
        INNER=layout.inner,
        FLAT=tiling.rows == 1,
        RUN=run_length(tiling, itemsize, on_quad),
        ROWS=tiling.tile_rows,
        COLUMNS=tiling.tile_columns,
    )


@remembered
def plan_dimensions_backward(
    free_bits: float, layout: Layout, itemsize: int, grad_row_stride: int, per_column: bool, on_quad: bool
) -> Plan:
    tiling = layout.tiles(True, itemsize)
    return make_plan(
        tiling.programs,
        tiling.num_warps,
        free_bits,
        tiling.rows,
        tiling.columns,
        layout.row_stride,
        grad_row_stride,
        tiling.chunks,
        1.0 / layout.batch,
        INNER=layout.inner,
        FLAT=tiling.rows == 1,
        RUN=run_length(tiling, itemsize, on_quad),
        PER_COLUMN=per_column,
        ROWS=tiling.tile_rows,
        COLUMNS=tiling.tile_columns,
    )


def needed_of(mu: Tensor, logvar: Tensor | None, needed: Sequence[bool]) -> list[Tensor]:
    """The tensors that need gradients."""
    if logvar is None:
        return [mu]
    return [tensor for tensor, need in zip((mu, logvar), needed, strict=True) if need]


def gaussian_backward(
    posterior: Posterior,
    mu: Tensor,
    logvar: Tensor | None,
    strides: Sequence[int],
    needed: Sequence[bool],
    z_grad: Tensor | None,
    kl_grad: Tensor | None,
    kl: Tensor | None,
    eps: Tensor | None,
    *rng: Any,
) -> list[Tensor]:
    """The gradient of packed moments, or the gradients of mu and logvar that are needed. strides: the strides of mu in
    forward. kl: the kl that forward wrote, if there are free bits.
    """
    mu = in_order_of(mu, tuple(strides))
    inputs = needed_of(mu, logvar, needed)
    # In the order that was read; only an input that was copied has a gradient of other strides.
    moments = read_moments(mu, logvar, posterior.dim)
    layout = moments.layout
    written = dense_strides(mu) if logvar is None else layout.strides
    gradients = [tensor.new_empty_strided(tensor.shape, written) for tensor in inputs]
    if layout.batch * layout.event == 0:
        return in_format_of(inputs, gradients)
    if logvar is None:
        each_gradient = gradients[0], second_half(gradients[0], layout.shape, posterior.dim)
    else:
        each_gradient = gradients[0] if needed[0] else None, gradients[-1] if needed[1] else None
    drawn = z_grad is not None and eps is None
    noise = noise_arguments(rng, mu.device, layout.event) if drawn else NO_RNG
    kl_grad = None if kl_grad is None else kl_grad.resolve_neg()
    of_layout = layout, mu.element_size(), written[0]
    on_quad = starts_on_quad(noise[-1])
    kernel: Any
    if posterior.per_dimension and kl_grad is not None:
        kernel = dimensions_backward_kernel
        per_column = any(stride != 0 for stride in kl_grad.stride())
        plan = plan_dimensions_backward(posterior.free_bits, *of_layout, per_column, on_quad)
        upstream = (
            with_strides(kl_grad, layout.strides[1:]) if per_column else kl_grad,
            None if kl is None else with_strides(kl, layout.strides[1:]),
        )
    else:
        kernel = gaussian_backward_kernel
        kl_grad_stride = 0 if kl_grad is None or posterior.reduction != "none" else kl_grad.stride(0)
        plan = plan_backward(posterior.reduction, *of_layout, kl_grad_stride, on_quad)
        upstream = (kl_grad,)
    launch(
        kernel,
        plan,
        mu.device,
        moments.mu,
        moments.logvar,
        None if eps is None else with_strides(eps, layout.strides),
        None if z_grad is None else with_strides(z_grad, layout.strides),
        *upstream,
        *each_gradient,
        *noise,
    )
    return in_format_of(inputs, gradients)
