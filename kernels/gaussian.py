"""Kernels of the diagonal Gaussian posterior: sampling, its divergence from N(0, I), and the gradients of both."""

import triton
import triton.language as tl

from .moments import moments_tile
from .noise import noise_tile
from .numerics import exp, exp_half, expm1, expm1_minus, to_float32
from .tiles import UNSPECIALIZED, drew_last_ticket, program_tile, sum_groups_in_order, tile_offsets


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
