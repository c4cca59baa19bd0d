"""Kernels of the divergence of each dimension: the mean over the batch of KL(N(mu, exp(logvar)) || N(0, I)) for each
element of the event. They also compute the sample of the posterior, and the gradients of both.
"""

import triton
import triton.language as tl

from .moments import moments_tile
from .noise import noise_tile
from .numerics import exp, exp_half, expm1, expm1_minus, to_float32
from .tiles import UNSPECIALIZED, drew_last_ticket, program_tile, tile_offsets


@triton.jit(do_not_specialize=(*UNSPECIALIZED, "blocks"), do_not_specialize_on_alignment=("seed_ptr", "offset_ptr"))
def dimensions_forward_kernel(
    mu_ptr, logvar_ptr, eps_ptr, z_ptr, kl_ptr, partial_ptr, ticket_ptr,
    seed_ptr, offset_ptr, seed: tl.int64, offset: tl.int64, first_position, free_bits,
    rows, columns, row_stride, chunks, blocks, kl_scale,
    INNER: tl.constexpr, RUN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """kl = max(kl_scale * sum_rows (mu^2 + exp(logvar) - 1 - logvar), free_bits), and z = mu + exp(logvar / 2) * eps
    (unless z_ptr is None).

    Shapes: mu and logvar [rows, columns] at distance row_stride; eps (None: made from seed and offset) and z [rows,
    columns], dense; kl float32 [columns]. A program has the columns of one of `chunks` tiles and every blocks-th tile
    of rows; with more than one block, partial is float32 [blocks, columns] and ticket int32 [1], zero.
    Bytes per float32 element: reads 8 (12 with eps), writes 4 (0 without z); 4 per column,
    and 8 per column and block for partial sums.
    Launches: 1. Roundings: z 6; a term of kl 10; and one per tile of rows and per level of a sum.
    Deterministic: no floating-point atomics, sums are added in the order of their rows.
    """
    program, tiles = tl.program_id(0).to(tl.uint32), tl.cast(chunks, tl.uint32)
    block = (program // tiles).to(tl.int64)
    first_column = (program % tiles).to(tl.int64) * COLUMNS
    row = tl.arange(0, ROWS)
    inside_column = tl.arange(0, COLUMNS) < columns - first_column
    base, offsets = moments_tile(first_column, INNER, COLUMNS)
    offsets = row.to(tl.int64)[:, None] * row_stride + offsets[None, :]

    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    first_row = block * ROWS
    while first_row < rows:
        inside = (row < rows - first_row)[:, None] & inside_column[None, :]
        source = base + first_row * row_stride
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
        # Outside of the tensor the term is 0.
        total += tl.fma(mu, mu, expm1_minus(logvar, exp(logvar, FAST)))
        first_row += tl.cast(blocks, tl.int64) * ROWS

    sums = tl.sum(total, axis=0)
    if partial_ptr is None:
        kl = at_least(sums * kl_scale, free_bits)
        tl.store(kl_ptr + first_column + tl.arange(0, COLUMNS), kl, mask=inside_column)
    else:
        at = partial_ptr + block * columns + first_column + tl.arange(0, COLUMNS)
        tl.store(at, sums, mask=inside_column)
        if drew_last_ticket(ticket_ptr):
            finish(partial_ptr, kl_ptr, columns, blocks, kl_scale, free_bits, COLUMNS, BLOCK)


@triton.jit
def sum_blocks_in_order(partial_ptr, column, columns, blocks, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """The sums of some columns over partial sums [blocks, columns], added in an order that depends on `blocks` only."""
    total = tl.zeros([BLOCK, COLUMNS], tl.float32)
    start = 0
    while start < blocks:
        index = start + tl.arange(0, BLOCK)
        inside = (index < blocks)[:, None] & (column < columns)[None, :]
        # .cg as in `tiles.sum_in_order`
        total += tl.load(
            partial_ptr + index[:, None] * columns + column[None, :], mask=inside, other=0.0, cache_modifier=".cg"
        )
        start += BLOCK
    return tl.sum(total, axis=0)


@triton.jit
def finish(
    partial_ptr, kl_ptr, columns, blocks, kl_scale, free_bits, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Add the partial sums [blocks, columns] to kl, in an order that depends on `blocks` only, because there is one
    compiled form.
    """
    first = 0
    while first < columns:
        column = first + tl.arange(0, COLUMNS)
        sums = sum_blocks_in_order(partial_ptr, column, columns, blocks, COLUMNS, BLOCK)
        kl = at_least(sums * kl_scale, free_bits)
        tl.store(kl_ptr + column, kl, mask=column < columns)
        first += COLUMNS


@triton.jit
def at_least(kl, free_bits):
    """The larger of the two numbers. NaN stays NaN."""
    return tl.where(kl <= free_bits, free_bits, kl)


@triton.jit(do_not_specialize=UNSPECIALIZED, do_not_specialize_on_alignment=("seed_ptr", "offset_ptr"))
def dimensions_backward_kernel(
    mu_ptr, logvar_ptr, eps_ptr, z_grad_ptr, kl_grad_ptr, kl_ptr, mu_grad_ptr, logvar_grad_ptr,
    seed_ptr, offset_ptr, seed: tl.int64, offset: tl.int64, first_position, free_bits,
    rows, columns, row_stride, grad_row_stride, chunks, kl_scale,
    INNER: tl.constexpr, FLAT: tl.constexpr, RUN: tl.constexpr, PER_COLUMN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """mu_grad = z_grad + weight * mu and logvar_grad = (z_grad * exp(logvar / 2) * eps + weight * (exp(logvar) - 1)) /
    2, where weight = kl_scale * kl_grad, but 0 where kl is not above free_bits.

    Shapes: as in `gaussian.gaussian_backward_kernel`, but kl_grad float32 [columns] if PER_COLUMN, else [], and kl,
    what forward wrote, [columns] (None: without free bits).
    Bytes per float32 element: reads 12 (16 with eps, 8 without z_grad), writes 8; 8 more per column of a tile.
    Launches: 1. Deterministic. Roundings: mu_grad 3; logvar_grad 10.
    """
    first_row, first_column = program_tile(chunks, FLAT, ROWS, COLUMNS)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside_column = column < columns - first_column
    inside = (row < rows - first_row)[:, None] & inside_column[None, :]
    base, offsets = moments_tile(first_column, INNER, COLUMNS)
    source = base + first_row * row_stride
    source_offsets = row.to(tl.int64)[:, None] * row_stride + offsets[None, :]
    result = base + first_row * grad_row_stride
    result_offsets = row.to(tl.int64)[:, None] * grad_row_stride + offsets[None, :]
    position = first_row * columns + first_column

    at = first_column + column
    if PER_COLUMN:
        weight = tl.load(kl_grad_ptr + at, mask=inside_column, other=0.0) * kl_scale
    else:
        kl_grad = tl.load(kl_grad_ptr) * kl_scale
        weight = tl.zeros([COLUMNS], tl.float32) + kl_grad
    if kl_ptr is not None:
        kl = tl.load(kl_ptr + at, mask=inside_column, other=0.0)
        weight = tl.where(kl <= free_bits, 0.0, weight)
    weight = weight[None, :]
    if z_grad_ptr is not None:
        dense = tile_offsets(columns, ROWS, COLUMNS)
        z_grad = to_float32(tl.load(z_grad_ptr + position + dense, mask=inside, other=0.0), FAST)
    if mu_grad_ptr is not None:
        mu = to_float32(tl.load(mu_ptr + source + source_offsets, mask=inside, other=0.0), FAST)
        mu_grad = weight * mu
        if z_grad_ptr is not None:
            mu_grad = tl.fma(weight, mu, z_grad)
        tl.store(mu_grad_ptr + result + result_offsets, mu_grad.to(mu_grad_ptr.dtype.element_ty), mask=inside)
    if logvar_grad_ptr is not None:
        logvar = to_float32(tl.load(logvar_ptr + source + source_offsets, mask=inside, other=0.0), FAST)
        slope = expm1(logvar, exp(logvar, FAST))
        logvar_grad = weight * slope
        if z_grad_ptr is not None:
            eps = noise_tile(
                eps_ptr, seed_ptr, offset_ptr, seed, offset, first_position, position, columns, inside,
                RUN, ROWS, COLUMNS, FAST,
            )  # fmt: skip
            logvar_grad = tl.fma(weight, slope, z_grad * (exp_half(logvar, FAST) * eps))
        tl.store(
            logvar_grad_ptr + result + result_offsets,
            (0.5 * logvar_grad).to(logvar_grad_ptr.dtype.element_ty),
            mask=inside,
        )
