"""The kernel for likelihoods with parameters that are smaller than the target: a number for each column, such as a
gene, for each channel, or one for all.

A smaller parameter is read without a copy. Its gradient is a sum over the batch, so a program keeps its columns and
goes through the rows. `smaller.py` launches this kernel.
"""

import triton
import triton.language as tl

from .elementwise import load_target, store_values
from .numerics import load_scalar
from .tiles import UNSPECIALIZED, drew_last_ticket, sum_groups_in_order, sum_in_order
from .upstream import factor_of_slopes, in_elements, store_kl_gradient

# What a parameter has a number for: each element, each column, each group of columns; or one for all. Numbers, because
# triton 3.9 takes no text in a constant tuple.
ELEMENT, COLUMN, GROUP, SCALAR = (tl.constexpr(kind) for kind in range(4))


@triton.jit
def sum_partials(partial_ptr, sums_ptr, outer, size, inner, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """sums[j] = the sum over o and i of partial[o, j, i], partial float32 [outer, size, inner]. The order depends on
    these three numbers only, because there is one compiled form.
    """
    count = outer * inner
    first = 0
    while first < size:
        column = first + tl.arange(0, COLUMNS)
        total = tl.zeros([BLOCK, COLUMNS], tl.float32)
        start = 0
        while start < count:
            index = start + tl.arange(0, BLOCK)
            place = ((index // inner) * size * inner + index % inner)[:, None] + column[None, :] * inner
            inside = (index < count)[:, None] & (column < size)[None, :]
            # .cg as in `tiles.sum_in_order`
            total += tl.load(partial_ptr + place, mask=inside, other=0.0, cache_modifier=".cg")
            start += BLOCK
        sums = tl.sum(total, axis=0)
        tl.store(sums_ptr + column, sums.to(sums_ptr.dtype.element_ty), mask=column < size)
        first += COLUMNS


@triton.jit
def load_smaller(ptr, KIND: tl.constexpr, columns, group, inside):
    """A parameter that a program reads once, in float32; 0 for kind ELEMENT."""
    if KIND == COLUMN:
        x = tl.load(ptr + columns, mask=inside, other=0.0).to(tl.float32)
    elif KIND == GROUP:
        x = tl.load(ptr + group).to(tl.float32)
    elif KIND == SCALAR:
        x = tl.load(ptr).to(tl.float32)
    else:
        x = 0.0
    return x


@triton.jit
def load_element(ptr, small, KIND: tl.constexpr, offsets, inside):
    """A parameter of a tile. It is loaded if it has a number for each element."""
    if KIND == ELEMENT:
        x = tl.load(ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    else:
        x = small
    return x


@triton.jit
def store_sum(partial_ptr, KIND: tl.constexpr, sums, columns, inside):
    """Store the sum over a program's rows: one for each column, or one in all."""
    if KIND == COLUMN:
        tl.store(partial_ptr + columns, tl.sum(sums, axis=0)[None, :], mask=inside)
    else:
        tl.store(partial_ptr + tl.program_id(0), tl.sum(sums))


@triton.jit
def finish_sum(partial_ptr, sums_ptr, KIND: tl.constexpr, blocks, groups, columns, chunks):
    """Add the partial sums that the programs stored by `store_sum`."""
    if KIND == COLUMN:
        sum_partials(partial_ptr, sums_ptr, blocks, groups * columns, 1, 32, 128)
    elif KIND == GROUP:
        sum_partials(partial_ptr, sums_ptr, blocks, groups, chunks, 32, 128)
    else:
        sum_partials(partial_ptr, sums_ptr, 1, 1, tl.num_programs(0), 1, 1024)


NUMBERS = (*UNSPECIALIZED, "column_units", "stride_units", "target_units", "groups", "blocks", "rows_per_sample")


@triton.jit(do_not_specialize=NUMBERS)
def broadcast_kernel(
    parameter_ptrs, target_ptr, kl_ptr, loss_ptr, reconstruction_ptr, mean_kl_ptr,
    loss_grad_ptr, reconstruction_grad_ptr, mean_kl_grad_ptr, gradient_ptrs, kl_grad_ptr, sum_ptrs,
    total_ptr, partial_ptrs, ticket_ptr, beta, weight, grad_scale,
    rows, column_units, stride_units, target_units, groups, chunks, blocks, rows_per_sample,
    kl_stride, loss_grad_stride, batch, scale,
    TERM: tl.constexpr, SETTINGS: tl.constexpr, SLOPES: tl.constexpr, SLOPE_FACTOR: tl.constexpr, UNIT: tl.constexpr,
    KINDS: tl.constexpr, WANTED: tl.constexpr, SUMMED: tl.constexpr, PER_ROW: tl.constexpr, ALIGNMENT: tl.constexpr,
    VECTOR: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """With loss_ptr, the values of `elementwise.value_kernel` and the gradients of grad_scale * loss; without it, the
    gradients of `elementwise.gradient_kernel`.

    Shapes: the target [rows, groups, columns], rows at a distance of target_units, parameters of kind ELEMENT the
    same at a distance of stride_units. A parameter of kind COLUMN is [groups, columns], of kind GROUP [groups], of
    kind SCALAR [1]. rows_per_sample rows are one sample. gradient_ptrs has a gradient for each slope in WANTED, dense
    and of the target's shape; sum_ptrs one for each in SUMMED, of its parameter's shape. total (None without values)
    is float32 [programs], or [rows, groups * chunks] if PER_ROW. partial_ptrs, one for each of SUMMED, are float32
    [blocks, groups, columns] for a COLUMN, else [programs]. ticket is int32 [1], zero. Units are of ALIGNMENT
    elements.
    A program has one of `chunks` tiles of columns of one group, and every blocks-th tile of rows.
    Bytes per float32 element: reads 8 (5 with a uint8 target), writes 0 (4 with gradients); 4 more of each for each
    further parameter of kind ELEMENT, 8 per column of a block, or per program, for each sum, and 8 more per program.
    Launches: 1. Roundings: as in `elementwise`; a sum has one more for each tile of rows of its program and for each
    level of a sum. Deterministic: no floating-point atomics, sums are added in order.
    """
    if kl_grad_ptr is not None:
        store_kl_gradient(kl_grad_ptr, loss_ptr, loss_grad_ptr, mean_kl_grad_ptr, beta, grad_scale, scale, batch)

    columns = in_elements(column_units, ALIGNMENT)
    stride = in_elements(stride_units, ALIGNMENT)
    target_stride = in_elements(target_units, ALIGNMENT)
    program, tiles = tl.program_id(0).to(tl.uint32), tl.cast(groups * chunks, tl.uint32)
    block, tile = (program // tiles).to(tl.int64), program % tiles
    group = (tile // tl.cast(chunks, tl.uint32)).to(tl.int64)
    within = (tile % tl.cast(chunks, tl.uint32)).to(tl.int64) * COLUMNS
    first_column = group * columns + within
    column = tl.max_contiguous(tl.arange(0, COLUMNS), VECTOR)[None, :]
    inside_column = column < columns - within
    row = tl.arange(0, ROWS)[:, None]

    small = ()
    for k in tl.static_range(len(KINDS)):
        # Triton folds a constant only where it is an argument. Of a name of its own: to the loop below, which has a
        # tile where this has a number, the same name would be one variable.
        one = load_smaller(parameter_ptrs[k], tl.constexpr(KINDS[k]), first_column + column, group, inside_column)
        small = small + (one,)  # noqa: RUF005 - Triton knows no *

    factor = scale * SLOPE_FACTOR
    if loss_ptr is not None or not PER_ROW:
        factor = factor_of_slopes(loss_ptr, loss_grad_ptr, reconstruction_grad_ptr, weight, grad_scale, factor)

    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    sums = ()
    for _ in tl.static_range(len(SUMMED)):
        sums = sums + (tl.zeros([ROWS, COLUMNS], tl.float32),)  # noqa: RUF005
    first_row = block * ROWS
    while first_row < rows:
        inside_row = row < rows - first_row
        inside = inside_row & inside_column
        offsets = (first_row + row) * stride + first_column + column
        parameters = ()
        for k in tl.static_range(len(KINDS)):
            x = load_element(parameter_ptrs[k], small[k], tl.constexpr(KINDS[k]), offsets, inside)
            parameters = parameters + (x,)  # noqa: RUF005
        at_target = target_ptr + (first_row + row) * target_stride + first_column + column
        value, slopes = TERM(parameters, load_target(at_target, inside, UNIT), SETTINGS, FAST)
        tl.static_assert(
            len(slopes) == SLOPES, "a term returns a slope for each parameter, and for a target that has one"
        )
        if loss_ptr is not None:
            value = tl.where(inside, value, 0.0)
            if PER_ROW:
                at_total = total_ptr + (first_row + row) * tiles.to(tl.int64) + tile
                tl.store(at_total, tl.sum(value, axis=1)[:, None], mask=inside_row)
            else:
                total += value
        upstream = factor
        if PER_ROW and loss_ptr is None:
            at_grad = loss_grad_ptr + (first_row + row) // rows_per_sample * loss_grad_stride
            upstream = factor * tl.load(at_grad, mask=inside_row, other=0.0).to(tl.float32)
        dense = (first_row + row) * (columns * groups) + first_column + column
        for k in tl.static_range(len(WANTED)):
            gradient = tl.broadcast_to(upstream * slopes[tl.constexpr(WANTED[k])], [ROWS, COLUMNS])
            tl.store(gradient_ptrs[k] + dense, gradient.to(gradient_ptrs[k].dtype.element_ty), mask=inside)
        added = ()
        for k in tl.static_range(len(SUMMED)):
            gradient = tl.where(inside, upstream * slopes[tl.constexpr(SUMMED[k])], 0.0)
            added = added + (sums[k] + gradient,)  # noqa: RUF005
        sums = added
        first_row += tl.cast(blocks, tl.int64) * ROWS

    if loss_ptr is not None:
        if not PER_ROW:
            tl.store(total_ptr + tl.program_id(0), tl.sum(total))
    for k in tl.static_range(len(SUMMED)):
        at_partial = block * (columns * groups) + first_column + column
        store_sum(partial_ptrs[k], tl.constexpr(KINDS[tl.constexpr(SUMMED[k])]), sums[k], at_partial, inside_column)

    if drew_last_ticket(ticket_ptr):
        if loss_ptr is not None:
            if PER_ROW:
                count = tl.cast(rows_per_sample, tl.int32) * groups * chunks
                sum_groups_in_order(total_ptr, loss_ptr, batch, count, scale, 32, 32)
            else:
                sum_of_terms = sum_in_order(total_ptr, tl.num_programs(0), 1, 1024)
                if kl_ptr is not None:
                    store_values(
                        sum_of_terms, kl_ptr, loss_ptr, reconstruction_ptr, mean_kl_ptr, beta,
                        load_scalar(weight) * scale, kl_stride, batch, scale, 1024,
                    )  # fmt: skip
                else:
                    tl.store(loss_ptr, sum_of_terms * scale)
        for k in tl.static_range(len(SUMMED)):
            finish_sum(
                partial_ptrs[k], sum_ptrs[k], tl.constexpr(KINDS[tl.constexpr(SUMMED[k])]),
                blocks, groups, columns, chunks,
            )  # fmt: skip
