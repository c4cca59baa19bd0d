"""The two kernels of every likelihood whose elements are independent.

This module handles memory, tiles and sums. The formula is TERM, a Triton function of a tile of each parameter and of
the target (`fastvae.likelihoods.Term`). `likelihood.py` has the launchers.
"""

import triton
import triton.language as tl

from .numerics import load_scalar
from .tiles import UNSPECIALIZED, drew_last_ticket, program_tile, sum_groups_in_order, sum_in_order

# The gradient of kl is one number. Each program writes it to so many samples, one for each thread of 4 warps.
KL_PER_PROGRAM = tl.constexpr(128)

# If the tensors are one row, whose size 16 does not divide, up to 15 elements are left over. Program 0 takes them, as a
# tile of this size.
TAIL = tl.constexpr(16)


@triton.jit
def load_target(target_ptr, inside, UNIT: tl.constexpr):
    """The target in float32; if UNIT, bytes are read as t / 255."""
    target = tl.load(target_ptr, mask=inside, other=0)
    if UNIT and target_ptr.dtype.element_ty == tl.uint8:
        return target.to(tl.float32) * (1.0 / 255.0)
    return target.to(tl.float32)


@triton.jit
def evaluate(
    parameter_ptrs, target_ptr, base, offsets, target_base, target_offsets, inside,
    TERM: tl.constexpr, SETTINGS: tl.constexpr, SLOPES: tl.constexpr, UNIT: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """(value, slopes) of the elements at base + offsets in each parameter. The target has its own base and offsets."""
    parameters = ()
    for k in tl.static_range(len(parameter_ptrs)):
        parameter = tl.load(parameter_ptrs[k] + base + offsets, mask=inside, other=0.0).to(tl.float32)
        parameters = parameters + (parameter,)  # noqa: RUF005 - Triton knows no *
    target = load_target(target_ptr + target_base + target_offsets, inside, UNIT)
    value, slopes = TERM(parameters, target, SETTINGS, FAST)
    tl.static_assert(len(slopes) == SLOPES, "a term returns a slope for each parameter, and for a target that has one")
    tl.static_assert(value.shape == target.shape, "a term returns a value of the shape of its target")
    return value, slopes


@triton.jit
def store_gradients(gradient_ptrs, slopes, factor, base, offsets, inside, WANTED: tl.constexpr):
    """gradients[k] = factor * slopes[WANTED[k]] at base + offsets."""
    for k in tl.static_range(len(WANTED)):
        # As tl.constexpr, because triton 3.6 does not hand on an element of a constant tuple as a constant.
        gradient = factor * slopes[tl.constexpr(WANTED[k])]
        tl.store(gradient_ptrs[k] + base + offsets, gradient.to(gradient_ptrs[k].dtype.element_ty), mask=inside)


@triton.jit
def places(first_row, first_column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, VECTOR: tl.constexpr):
    """(row [ROWS, 1], column [1, COLUMNS], inside [ROWS, COLUMNS]) of a tile.

    A thread takes VECTOR neighbours, 16 bytes of the widest tensor. With more it would need several vector loads. Each
    load of a warp would then have gaps, and the warp would request each sector twice.
    """
    row = tl.arange(0, ROWS)[:, None]
    column = tl.max_contiguous(tl.arange(0, COLUMNS), VECTOR)[None, :]
    return row.to(tl.int64), column, (row < rows - first_row) & (column < columns - first_column)


@triton.jit
def from_start(first_row, first_column, row, column, units, ALIGNMENT: tl.constexpr):
    """(base, offsets [ROWS, COLUMNS]) of a tile's elements. The distance between rows is units * ALIGNMENT."""
    stride = tl.cast(units, tl.int64) * ALIGNMENT
    return first_row * stride + first_column, row * stride + column


@triton.jit
def store_share(values_ptr, number, count, PER_PROGRAM: tl.constexpr):
    """values[:count] = number. Each program stores PER_PROGRAM of them."""
    index = tl.program_id(0).to(tl.int64) * PER_PROGRAM + tl.arange(0, PER_PROGRAM)
    tl.store(values_ptr + index, number.to(values_ptr.dtype.element_ty), mask=index < count)


@triton.jit
def store_values(
    total, kl_ptr, loss_ptr, reconstruction_ptr, mean_kl_ptr, beta, weight, kl_stride, batch, inverse_batch,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The three values of `elbo_loss` from the sum of the elements. `weight` is already divided by the batch."""
    reconstruction = weight * total
    mean_kl = sum_in_order(kl_ptr, batch, kl_stride, BLOCK) * inverse_batch
    kl_weight = load_scalar(beta)
    tl.store(reconstruction_ptr, reconstruction)
    tl.store(mean_kl_ptr, mean_kl)
    tl.store(loss_ptr, tl.fma(kl_weight, mean_kl, reconstruction))


# Triton need not specialise on these counts and distances, because ALIGNMENT says what divides them.
NUMBERS = (*UNSPECIALIZED, "column_units", "stride_units", "target_units", "tail")


@triton.jit(do_not_specialize=NUMBERS)
def value_kernel(
    parameter_ptrs, target_ptr, kl_ptr, loss_ptr, reconstruction_ptr, mean_kl_ptr, gradient_ptrs, kl_grad_ptr,
    partial_ptr, ticket_ptr, beta, weight, grad_scale,
    rows, column_units, stride_units, target_units, chunks, tail, kl_stride, batch, scale,
    TERM: tl.constexpr, SETTINGS: tl.constexpr, SLOPES: tl.constexpr, SLOPE_FACTOR: tl.constexpr,
    UNIT: tl.constexpr, WANTED: tl.constexpr,
    FLAT: tl.constexpr, PER_ROW: tl.constexpr, HAS_TAIL: tl.constexpr, ALIGNMENT: tl.constexpr, VECTOR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """loss = scale * sum TERM.

    With kl: reconstruction = weight * scale * sum TERM, mean_kl = scale * sum kl, loss = reconstruction + beta *
    mean_kl. Gradients are those of grad_scale * loss: weight * scale * grad_scale * slope for each parameter whose
    number is in WANTED, and kl_grad = beta * scale * grad_scale, one number written to all samples.
    Shapes: each parameter [rows, columns] at a distance of stride_units, the target of target_units, gradients dense;
    kl [batch] at distance kl_stride, kl_grad dense; loss float32 [rows] if PER_ROW, else [] as everything else. Units
    are of ALIGNMENT elements, also those of the columns. With HAS_TAIL there is one row, and `tail` more elements
    follow its columns. beta, weight and grad_scale are numbers or pointers to one. If several programs share a sum,
    partial is float32 [programs] and ticket int32 [1], zero; else both are None.
    Bytes per float32 element: reads 8 (5 with a uint8 target), writes 0 (4 with gradients); 4 more of each for each
    further parameter, 8 more per program for partial sums, 4 per sample for kl, and 4 for its gradient.
    Launches: 1. Roundings: a term those of the likelihood, a gradient 5 more than a slope, the values 4 more and one
    per level of a sum. Deterministic: no floating-point atomics, partial sums are added in order.
    """
    if kl_grad_ptr is not None:
        kl_grad = load_scalar(beta) * scale * load_scalar(grad_scale)
        store_share(kl_grad_ptr, kl_grad, batch, KL_PER_PROGRAM)

    columns = tl.cast(column_units, tl.int64) * ALIGNMENT
    first_row, first_column = program_tile(chunks, FLAT, ROWS, COLUMNS)
    row, column, inside = places(first_row, first_column, rows, columns, ROWS, COLUMNS, VECTOR)
    base, offsets = from_start(first_row, first_column, row, column, stride_units, ALIGNMENT)
    target_base, target_offsets = from_start(first_row, first_column, row, column, target_units, ALIGNMENT)
    value, slopes = evaluate(
        parameter_ptrs, target_ptr, base, offsets, target_base, target_offsets, inside,
        TERM, SETTINGS, SLOPES, UNIT, FAST,
    )  # fmt: skip
    terms = tl.where(inside, value, 0.0)
    if len(WANTED) > 0:
        factor = load_scalar(weight) * scale * load_scalar(grad_scale) * SLOPE_FACTOR
        base, offsets = first_row * columns + first_column, row * columns + column
        store_gradients(gradient_ptrs, slopes, factor, base, offsets, inside, WANTED)

    if partial_ptr is None:
        if kl_ptr is not None:
            store_values(
                tl.sum(terms), kl_ptr, loss_ptr, reconstruction_ptr, mean_kl_ptr, beta, load_scalar(weight) * scale,
                kl_stride, batch, scale, BLOCK,
            )  # fmt: skip
        elif PER_ROW:
            own_row = first_row + tl.arange(0, ROWS)
            tl.store(loss_ptr + own_row, tl.sum(terms, axis=1) * scale, mask=own_row < rows)
        else:
            tl.store(loss_ptr, tl.sum(terms) * scale)
    else:
        total = tl.sum(terms)
        if HAS_TAIL:
            if tl.program_id(0) == 0:
                place = tl.arange(0, TAIL)
                last_value, last_slopes = evaluate(
                    parameter_ptrs, target_ptr, columns, place, columns, place, place < tail,
                    TERM, SETTINGS, SLOPES, UNIT, FAST,
                )  # fmt: skip
                total += tl.sum(tl.where(place < tail, last_value, 0.0))
                if len(WANTED) > 0:
                    store_gradients(gradient_ptrs, last_slopes, factor, columns, place, place < tail, WANTED)
        tl.store(partial_ptr + tl.program_id(0), total)
        if drew_last_ticket(ticket_ptr):
            if kl_ptr is not None:
                total = sum_in_order(partial_ptr, tl.num_programs(0), 1, BLOCK)
                store_values(
                    total, kl_ptr, loss_ptr, reconstruction_ptr, mean_kl_ptr, beta, load_scalar(weight) * scale,
                    kl_stride, batch, scale, BLOCK,
                )  # fmt: skip
            else:
                groups = rows if PER_ROW else 1
                sum_groups_in_order(partial_ptr, loss_ptr, groups, tl.num_programs(0) // groups, scale, GROUPS, BLOCK)


@triton.jit(do_not_specialize=NUMBERS)
def gradient_kernel(
    parameter_ptrs, target_ptr, loss_grad_ptr, reconstruction_grad_ptr, mean_kl_grad_ptr, gradient_ptrs, kl_grad_ptr,
    beta, weight,
    rows, column_units, stride_units, target_units, chunks, tail, loss_grad_stride, batch, scale,
    TERM: tl.constexpr, SETTINGS: tl.constexpr, SLOPES: tl.constexpr, SLOPE_FACTOR: tl.constexpr,
    UNIT: tl.constexpr, WANTED: tl.constexpr,
    FLAT: tl.constexpr, PER_ROW: tl.constexpr, HAS_TAIL: tl.constexpr, ALIGNMENT: tl.constexpr, VECTOR: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """scale * weight * (loss_grad + reconstruction_grad) * slope for each parameter, and the target as the last of
    them, whose number is in WANTED; and kl_grad = scale * (beta * loss_grad + mean_kl_grad), one number written to all
    samples.

    Shapes: as in `value_kernel`; loss_grad float32 [rows] at distance loss_grad_stride if PER_ROW, else [] as the two
    others. A missing upstream gradient is None and counts as 0. kl_grad [batch], or None.
    Bytes per float32 element: reads 8 (5 with a uint8 target), writes 4 (8 with both gradients); 4 more of each for
    each further parameter, and 4 more per sample for kl_grad.
    Launches: 1. Roundings: 5 more than a slope of the likelihood. Deterministic.
    """
    if kl_grad_ptr is not None:
        mean_kl_grad = 0.0
        if mean_kl_grad_ptr is not None:
            mean_kl_grad += tl.load(mean_kl_grad_ptr)
        if loss_grad_ptr is not None:
            mean_kl_grad += load_scalar(beta) * tl.load(loss_grad_ptr)
        store_share(kl_grad_ptr, mean_kl_grad * scale, batch, KL_PER_PROGRAM)

    if len(WANTED) > 0:
        columns = tl.cast(column_units, tl.int64) * ALIGNMENT
        first_row, first_column = program_tile(chunks, FLAT, ROWS, COLUMNS)
        row, column, inside = places(first_row, first_column, rows, columns, ROWS, COLUMNS, VECTOR)
        if PER_ROW:
            loss_grads = loss_grad_ptr + (first_row + row) * loss_grad_stride
            loss_grad = tl.load(loss_grads, mask=row < rows - first_row, other=0.0)
            factor = (SLOPE_FACTOR * scale) * loss_grad.to(tl.float32)
        else:
            value_grad = 0.0
            if reconstruction_grad_ptr is not None:
                value_grad += tl.load(reconstruction_grad_ptr)
            if loss_grad_ptr is not None:
                value_grad += tl.load(loss_grad_ptr).to(tl.float32)
            factor = (SLOPE_FACTOR * scale) * value_grad * load_scalar(weight)
        base, offsets = from_start(first_row, first_column, row, column, stride_units, ALIGNMENT)
        target_base, target_offsets = from_start(first_row, first_column, row, column, target_units, ALIGNMENT)
        _, slopes = evaluate(
            parameter_ptrs, target_ptr, base, offsets, target_base, target_offsets, inside,
            TERM, SETTINGS, SLOPES, UNIT, FAST,
        )  # fmt: skip
        base, offsets = first_row * columns + first_column, row * columns + column
        store_gradients(gradient_ptrs, slopes, factor, base, offsets, inside, WANTED)
        if HAS_TAIL:
            if tl.program_id(0) == 0:
                place = tl.arange(0, TAIL)
                _value, last_slopes = evaluate(
                    parameter_ptrs, target_ptr, columns, place, columns, place, place < tail,
                    TERM, SETTINGS, SLOPES, UNIT, FAST,
                )  # fmt: skip
                store_gradients(gradient_ptrs, last_slopes, factor, columns, place, place < tail, WANTED)
