"""Kernels of the diagonal Gaussian posterior: sampling, its divergence from N(0, I), and the gradients of both."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dimensions import dimensions_backward, dimensions_forward
from .launch import Plan, launch, make_plan, ticket
from .layout import dense_strides, in_format_of, remembered, with_strides
from .moments import Layout, Moments, cut_moments, moments_tile, read_moments, second_half
from .noise import NO_RNG, Rng, noise_arguments, noise_tile, run_length, starts_on_quad
from .numerics import exp, exp_half, expm1, expm1_minus, to_float32
from .tiles import (
    UNSPECIALIZED,
    drew_last_ticket,
    empty_sum,
    program_tile,
    reduction_scale,
    sum_blocks,
    sum_groups_in_order,
    tile_offsets,
)


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=("seed_ptr", "offset_ptr"))
def gaussian_forward_kernel(
    mu_ptr, logvar_ptr, eps_ptr, z_ptr, kl_ptr, partial_ptr, ticket_ptr,
    seed_ptr, offset_ptr, seed: tl.int64, offset: tl.int64, first_position,
    rows, columns, row_stride, chunks, kl_scale,
    INNER: tl.constexpr, FLAT: tl.constexpr, RUN: tl.constexpr, PER_ROW: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """z = mu + exp(logvar / 2) * eps (unless z_ptr is None), and kl = kl_scale * sum (mu^2 + exp(logvar) - 1 -
    logvar) (unless kl_ptr is None).

    Shapes: mu and logvar [rows, columns] at distance row_stride; eps (None: made from seed and offset) and z [rows,
    columns], dense; kl float32 [rows] if PER_ROW, else []. Where no program owns a whole sum, partial is float32
    [programs] and ticket int32 [1], zero.
    Bytes per float32 element: reads 8 (12 with eps), writes 4 (0 without z); 8 more per program where there are
    partial sums.
    Launches: 1. Roundings: z 6; a term of kl 10; and one per level of a sum (how they are counted: `numerics`).
    Deterministic: no floating-point atomics, partial sums are added in the order of their elements.
    """
    first_row, first_column = program_tile(chunks, FLAT, ROWS, COLUMNS)
    row = tl.arange(0, ROWS)
    inside_row = row < rows - first_row
    inside = inside_row[:, None] & (tl.arange(0, COLUMNS) < columns - first_column)[None, :]
    source, offsets = moments_tile(first_column, INNER, COLUMNS)
    source += first_row * row_stride
    offsets = row.to(tl.int64)[:, None] * row_stride + offsets[None, :]
    mu = to_float32(tl.load(mu_ptr + source + offsets, mask=inside, other=0.0), FAST)
    logvar = to_float32(tl.load(logvar_ptr + source + offsets, mask=inside, other=0.0), FAST)

    if z_ptr is not None:
        position = first_row * columns + first_column
        eps = noise_tile(
            eps_ptr, seed_ptr, offset_ptr, seed, offset, first_position, position, columns, inside,
            RUN, ROWS, COLUMNS, FAST,
        )  # fmt: skip
        z = tl.fma(exp_half(logvar, FAST), eps, mu)
        at = z_ptr + position + tile_offsets(columns, ROWS, COLUMNS)
        tl.store(at, z.to(z_ptr.dtype.element_ty), mask=inside)

    if kl_ptr is not None:
        # A second exponential: the square of the first would have twice its error. Outside of the tensor the term is 0.
        terms = tl.fma(mu, mu, expm1_minus(logvar, exp(logvar, FAST)))
        if partial_ptr is None:
            if PER_ROW:
                tl.store(kl_ptr + first_row + row, tl.sum(terms, axis=1) * kl_scale, mask=inside_row)
            else:
                tl.store(kl_ptr, tl.sum(terms) * kl_scale)
        else:
            tl.store(partial_ptr + tl.program_id(0), tl.sum(terms))
            if drew_last_ticket(ticket_ptr):
                groups = rows if PER_ROW else 1
                sum_groups_in_order(partial_ptr, kl_ptr, groups, tl.num_programs(0) // groups, kl_scale, GROUPS, BLOCK)


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=("seed_ptr", "offset_ptr"))
def gaussian_backward_kernel(
    mu_ptr, logvar_ptr, eps_ptr, z_grad_ptr, kl_grad_ptr, mu_grad_ptr, logvar_grad_ptr,
    seed_ptr, offset_ptr, seed: tl.int64, offset: tl.int64, first_position,
    rows, columns, row_stride, grad_row_stride, chunks, kl_grad_stride, kl_scale,
    INNER: tl.constexpr, FLAT: tl.constexpr, RUN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """mu_grad = z_grad + kl_grad * mu and logvar_grad = (z_grad * exp(logvar / 2) * eps + kl_grad * (exp(logvar) -
    1)) / 2, kl_grad times kl_scale.

    Shapes: mu and logvar [rows, columns] at distance row_stride, their gradients at distance grad_row_stride; z_grad
    and eps (None: made again from seed and offset) [rows, columns], dense; kl_grad float32 [rows] at distance
    kl_grad_stride, or [] with stride 0. A missing upstream gradient is None and counts as 0; a gradient nobody needs
    is None and is not computed.
    Bytes per float32 element: reads 12 (16 with eps, 8 without z_grad, 8 without kl_grad), writes 8. Launches: 1.
    Deterministic. Roundings: mu_grad 3; logvar_grad 10.
    """
    first_row, first_column = program_tile(chunks, FLAT, ROWS, COLUMNS)
    row = tl.arange(0, ROWS)
    inside_row = row < rows - first_row
    inside = inside_row[:, None] & (tl.arange(0, COLUMNS) < columns - first_column)[None, :]
    base, offsets = moments_tile(first_column, INNER, COLUMNS)
    source = base + first_row * row_stride
    source_offsets = row.to(tl.int64)[:, None] * row_stride + offsets[None, :]
    result = base + first_row * grad_row_stride
    result_offsets = row.to(tl.int64)[:, None] * grad_row_stride + offsets[None, :]
    position = first_row * columns + first_column

    mu_grad = tl.zeros([ROWS, COLUMNS], tl.float32)
    logvar_grad = tl.zeros([ROWS, COLUMNS], tl.float32)
    if logvar_grad_ptr is not None:
        logvar = to_float32(tl.load(logvar_ptr + source + source_offsets, mask=inside, other=0.0), FAST)
    if z_grad_ptr is not None:
        dense = tile_offsets(columns, ROWS, COLUMNS)
        z_grad = to_float32(tl.load(z_grad_ptr + position + dense, mask=inside, other=0.0), FAST)
        mu_grad = z_grad
        if logvar_grad_ptr is not None:
            eps = noise_tile(
                eps_ptr, seed_ptr, offset_ptr, seed, offset, first_position, position, columns, inside,
                RUN, ROWS, COLUMNS, FAST,
            )  # fmt: skip
            logvar_grad = z_grad * (exp_half(logvar, FAST) * eps)
    if kl_grad_ptr is not None:
        kl_grad = (
            tl.load(kl_grad_ptr + (first_row + row) * kl_grad_stride, mask=inside_row, other=0.0)[:, None] * kl_scale
        )
        if mu_grad_ptr is not None:
            mu = to_float32(tl.load(mu_ptr + source + source_offsets, mask=inside, other=0.0), FAST)
            mu_grad = tl.fma(kl_grad, mu, mu_grad)
        if logvar_grad_ptr is not None:
            logvar_grad = tl.fma(kl_grad, expm1(logvar, exp(logvar, FAST)), logvar_grad)
    if mu_grad_ptr is not None:
        tl.store(mu_grad_ptr + result + result_offsets, mu_grad.to(mu_grad_ptr.dtype.element_ty), mask=inside)
    if logvar_grad_ptr is not None:
        tl.store(
            logvar_grad_ptr + result + result_offsets,
            (0.5 * logvar_grad).to(logvar_grad_ptr.dtype.element_ty),
            mask=inside,
        )


def allocate_z(moments: Moments) -> Tensor:
    return moments.mu.new_empty_strided(moments.layout.shape, moments.layout.strides)


def allocate_kl(moments: Moments, reduction: str) -> Tensor:
    layout = moments.layout
    if reduction == "per_dimension":
        return moments.mu.new_empty_strided(layout.shape[1:], layout.strides[1:], dtype=torch.float32)
    return moments.mu.new_empty([layout.batch] if reduction == "none" else [], dtype=torch.float32)


@remembered
def plan_forward(layout: Layout, itemsize: int, reduction: str, with_kl: bool, on_quad: bool) -> tuple[Plan, int]:
    """And the number of partial sums."""
    per_row = with_kl and reduction == "none"
    tiling = cut_moments(layout, per_row, itemsize)
    groups, count = (tiling.rows, tiling.chunks) if per_row else (1, tiling.programs if with_kl else 1)
    plan = make_plan(
        tiling.programs,
        tiling.num_warps,
        tiling.rows,
        tiling.columns,
        layout.row_stride,
        tiling.chunks,
        0.5 * reduction_scale(reduction, layout.batch, layout.event),
        INNER=layout.inner,
        FLAT=tiling.rows == 1,
        RUN=run_length(tiling, itemsize, on_quad),
        PER_ROW=per_row,
        ROWS=tiling.tile_rows,
        COLUMNS=tiling.tile_columns,
        **sum_blocks(groups, count),
    )
    return plan, tiling.programs if count > 1 else 0


def gaussian_forward(
    moments: Moments, z: Tensor | None, kl: Tensor | None, reduction: str, eps: Tensor | None, rng: Rng
) -> None:
    """Fill z and kl, whichever is given."""
    mu, logvar, layout = moments
    if layout.batch * layout.event == 0:
        if kl is not None:
            kl.fill_(empty_sum(reduction, layout.batch))
        return
    drawn = z is not None and eps is None
    noise = noise_arguments(rng, mu.device, layout.event) if drawn else NO_RNG
    plan, partials = plan_forward(layout, mu.element_size(), reduction, kl is not None, starts_on_quad(noise[-1]))
    launch(
        gaussian_forward_kernel,
        plan,
        mu.device,
        mu,
        logvar,
        None if eps is None else with_strides(eps, layout.strides),
        z,
        kl,
        kl.new_empty(partials) if kl is not None and partials else None,
        ticket(mu.device) if partials else None,
        *noise,
    )


def gaussian_sample(mu: Tensor, logvar: Tensor, eps: Tensor | None, *rng: Any) -> Tensor:
    moments = read_moments(mu, logvar, 1)
    z = allocate_z(moments)
    gaussian_forward(moments, z, None, "none", eps, rng)
    return z


def gaussian_kl(mu: Tensor, logvar: Tensor, reduction: str, free_bits: float) -> Tensor:
    """free_bits, here and below, only with the reduction "per_dimension"."""
    moments = read_moments(mu, logvar, 1)
    kl = allocate_kl(moments, reduction)
    if reduction == "per_dimension":
        dimensions_forward(moments, None, kl, free_bits, None, NO_RNG)
    else:
        gaussian_forward(moments, None, kl, reduction, None, NO_RNG)
    return kl


def gaussian_sample_kl(
    mu: Tensor, logvar: Tensor | None, dim: int, reduction: str, free_bits: float, eps: Tensor | None, *rng: Any
) -> tuple[Tensor, Tensor]:
    moments = read_moments(mu, logvar, dim)
    z, kl = allocate_z(moments), allocate_kl(moments, reduction)
    if reduction == "per_dimension":
        dimensions_forward(moments, z, kl, free_bits, eps, rng)
    else:
        gaussian_forward(moments, z, kl, reduction, eps, rng)
    return z, kl


@remembered
def plan_backward(
    layout: Layout, itemsize: int, reduction: str, grad_row_stride: int, kl_grad_stride: int, on_quad: bool
) -> Plan:
    tiling = cut_moments(layout, kl_grad_stride != 0, itemsize)
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


def gaussian_backward(
    mu: Tensor,
    logvar: Tensor | None,
    dim: int,
    reduction: str,
    free_bits: float,
    z_grad: Tensor | None,
    kl_grad: Tensor | None,
    kl: Tensor | None,
    needs_mu: bool,
    needs_logvar: bool,
    eps: Tensor | None,
    *rng: Any,
) -> list[Tensor]:
    """The gradient of packed moments, or of those of mu and logvar that need it. kl: what forward wrote, where there
    are free bits.
    """
    moments = read_moments(mu, logvar, dim)
    layout = moments.layout
    inputs = [mu] if logvar is None else [t for t, needed in ((mu, needs_mu), (logvar, needs_logvar)) if needed]
    # In the order that was read; only an input that was copied has a gradient of other strides.
    strides = dense_strides(mu) if logvar is None else layout.strides
    gradients = [tensor.new_empty_strided(tensor.shape, strides) for tensor in inputs]
    if logvar is None:
        mu_grad, logvar_grad = gradients[0], second_half(gradients[0], layout.shape, dim)
    else:
        mu_grad, logvar_grad = gradients[0] if needs_mu else None, gradients[-1] if needs_logvar else None
    empty = layout.batch * layout.event == 0
    if not empty and reduction == "per_dimension" and kl_grad is not None:
        dimensions_backward(
            moments, z_grad, kl_grad, kl, free_bits, eps, rng, mu_grad, logvar_grad, grad_row_stride=strides[0]
        )
    elif not empty:
        drawn = z_grad is not None and eps is None
        noise = noise_arguments(rng, mu.device, layout.event) if drawn else NO_RNG
        kl_grad = None if kl_grad is None else kl_grad.resolve_neg()
        kl_grad_stride = 0 if kl_grad is None or reduction != "none" else kl_grad.stride(0)
        on_quad = starts_on_quad(noise[-1])
        launch(
            gaussian_backward_kernel,
            plan_backward(layout, mu.element_size(), reduction, strides[0], kl_grad_stride, on_quad),
            mu.device,
            moments.mu,
            moments.logvar,
            None if eps is None else with_strides(eps, layout.strides),
            None if z_grad is None else with_strides(z_grad, layout.strides),
            kl_grad,
            mu_grad,
            logvar_grad,
            *noise,
        )
    return in_format_of(inputs, gradients)
