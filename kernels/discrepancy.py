"""Kernels of the maximum mean discrepancy of two sets of vectors, and of its gradients.

Rows of z and of the prior are numbered as one set: tiles of z first, then tiles of the prior, none of both. No pair of
rows leaves the registers: backward computes each kernel again. Squared distances are sums of squared differences.
"""

import triton
import triton.language as tl

from .mixture import add_parts, add_to
from .numerics import exp, product, reciprocal
from .tiles import UNSPECIALIZED, drew_last_ticket

# Differences of numbers up to it are finite, and squares of what two larger ones differ by are infinite, or 0.
LARGE = tl.constexpr(2.0**126)
# In what blocks the last program adds the sums of programs: of most problems, there is one.
OF_PROGRAMS = tl.constexpr(256)
NUMBERS = (
    *UNSPECIALIZED, "prior_rows", "first_tile", "z_tiles", "all_tiles", "tiles", "parts", "pairs", "prior_pairs",
    "first_prior", "all_rows",
)  # fmt: skip


@triton.jit
def load_tile(
    z_ptr, prior_ptr, tile, z_tiles, rows, prior_rows, start, dims, z_stride, z_step, prior_stride, prior_step,
    ROWS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """Of a tile of both sets, dimensions from `start`: float32 [ROWS, DIMS], 0 beyond the last."""
    dim = start + tl.arange(0, DIMS)
    inside, column = (dim < dims)[None, :], dim.to(tl.int64)[None, :]
    row = row_of(tile, z_tiles, ROWS)[:, None]
    if tile < z_tiles:
        x = tl.load(z_ptr + row * z_stride + column * z_step, mask=(row < rows) & inside, other=0.0).to(tl.float32)
    else:
        at = prior_ptr + row * prior_stride + column * prior_step
        x = tl.load(at, mask=(row < prior_rows) & inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def row_of(tile, z_tiles, ROWS: tl.constexpr):
    """The rows of a tile in their own set, int64 [ROWS]."""
    return tl.where(tile < z_tiles, tile, tile - z_tiles) * ROWS + tl.arange(0, ROWS)


@triton.jit
def differences(
    z_ptr, prior_ptr, tile, other, z_tiles, rows, prior_rows, start, dims,
    z_stride, z_step, prior_stride, prior_step, FINITE: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """Rows of a tile less those of another, [ROWS, ROWS, DIMS], of dimensions from `start`. FINITE: of numbers that are
    clamped, so that a slope of 0 times a difference is 0. Only differences whose square is infinite change by that, or
    of NaN.
    """
    own = load_tile(
        z_ptr, prior_ptr, tile, z_tiles, rows, prior_rows, start, dims,
        z_stride, z_step, prior_stride, prior_step, ROWS, DIMS,
    )  # fmt: skip
    others = load_tile(
        z_ptr, prior_ptr, other, z_tiles, rows, prior_rows, start, dims,
        z_stride, z_step, prior_stride, prior_step, ROWS, DIMS,
    )  # fmt: skip
    if FINITE:
        own = tl.minimum(tl.maximum(own, -LARGE), LARGE)
        others = tl.minimum(tl.maximum(others, -LARGE), LARGE)
    return own[:, None, :] - others[None, :, :]


@triton.jit
def squared_distances(
    z_ptr, prior_ptr, tile, other, z_tiles, rows, prior_rows, dims,
    z_stride, z_step, prior_stride, prior_step, ROWS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """Of the rows of a tile and those of another, [ROWS, ROWS]."""
    squares = tl.zeros([ROWS, ROWS, DIMS], tl.float32)
    start = 0
    while start < dims:
        d = differences(
            z_ptr, prior_ptr, tile, other, z_tiles, rows, prior_rows, start, dims,
            z_stride, z_step, prior_stride, prior_step, False, ROWS, DIMS,
        )  # fmt: skip
        squares += d * d
        start += DIMS
    return tl.sum(squares, axis=2)


@triton.jit
def are_pairs(tile, other, z_tiles, rows, prior_rows, ROWS: tl.constexpr):
    """Whether the tiles are of one set, and which of their rows are pairs, [ROWS, ROWS]: not those beyond the last of
    a set, nor a row with itself.
    """
    in_z, other_in_z = tile < z_tiles, other < z_tiles
    row, column = row_of(tile, z_tiles, ROWS), row_of(other, z_tiles, ROWS)
    inside = row < tl.where(in_z, rows, prior_rows)
    other_inside = column < tl.where(other_in_z, rows, prior_rows)
    same = in_z == other_in_z
    itself = same & (row[:, None] == column[None, :])
    return same, inside[:, None] & other_inside[None, :] & (itself == 0)


@triton.jit(do_not_specialize=NUMBERS)
def discrepancy_kernel(
    z_ptr, prior_ptr, value_ptr, part_ptr, ticket_ptr, rates,
    rows, prior_rows, dims, z_stride, z_step, prior_stride, prior_step,
    z_tiles, all_tiles, tiles, parts, pairs, prior_pairs,
    IMQ: tl.constexpr, UNBIASED: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """value = sum k(z_i, z_j) / pairs + sum k(p_i, p_j) / prior_pairs - 2 sum k(z_i, p_j) / (rows prior_rows), the
    first two over i != j, and where not UNBIASED len(rates) (1 / rows + 1 / prior_rows) more, which is what i = j
    adds. With x = rate |z_i - p_j|^2, k is the sum over `rates` of 1 / (1 + x) (IMQ) or of e^-x.

    Shapes: z [rows, dims] and prior [prior_rows, dims] at any strides; value float32 []; rates a tuple of numbers. A
    program has a tile of rows and one of `parts` of the tiles that follow it, so many `tiles` of them. After the last
    comes the first, and a tile meets half of all: each two tiles meet once. part is float32 [2, programs], ticket
    int32 [1], zero.
    Bytes: of each two tiles that meet, their rows; 8 a program are written and read, and 4 written.
    Launches: 1. Roundings of a kernel: 4, less those that x / (1 + x) or x e^-x scales down: 8, and one for each step
    of dimensions; and one for each scale. Of the value: those of a program's sum, and one more, because the sums of
    programs are added and weighted in float64: it may be a small difference of them.
    Deterministic: no floating-point atomics, the sums of programs are added in order.
    """
    program = tl.program_id(0).to(tl.uint32)
    tile = (program // tl.cast(parts, tl.uint32)).to(tl.int64)
    part = (program % tl.cast(parts, tl.uint32)).to(tl.int64)
    own = tl.zeros([ROWS, ROWS], tl.float32)
    between = tl.zeros([ROWS, ROWS], tl.float32)
    step = part * tiles
    last = step + tiles
    # Where the number of tiles is even, the opposite tile is met by the first half of tiles.
    while (step < last) & ((2 * step < all_tiles) | ((2 * step == all_tiles) & (tile < step))):
        other = tile + step
        other = tl.where(other < all_tiles, other, other - all_tiles)
        squares = squared_distances(
            z_ptr, prior_ptr, tile, other, z_tiles, rows, prior_rows, dims,
            z_stride, z_step, prior_stride, prior_step, ROWS, DIMS,
        )  # fmt: skip
        kernels = tl.zeros([ROWS, ROWS], tl.float32)
        for k in tl.static_range(len(rates)):
            x = squares * rates[k]
            if IMQ:
                kernels += reciprocal(1.0 + x, FAST)
            else:
                kernels += exp(-x, FAST)
        same, is_pair = are_pairs(tile, other, z_tiles, rows, prior_rows, ROWS)
        kernels = tl.where(is_pair, kernels, 0.0)
        # Within one tile, each pair is there in both orders.
        own += kernels * tl.where(same, tl.where(step == 0, 1.0, 2.0), 0.0)
        between += kernels * tl.where(same, 0.0, 1.0)
        step += 1
    programs = tl.num_programs(0)
    tl.store(part_ptr + program, tl.sum(own))
    tl.store(part_ptr + programs + program, tl.sum(between))
    if drew_last_ticket(ticket_ptr):
        of_z = z_tiles * parts
        value = sum_in_float64(part_ptr, of_z) / tl.cast(pairs, tl.int64).to(tl.float64)
        value += sum_in_float64(part_ptr + of_z, programs - of_z) / tl.cast(prior_pairs, tl.int64).to(tl.float64)
        count, prior_count = tl.cast(rows, tl.int64).to(tl.float64), tl.cast(prior_rows, tl.int64).to(tl.float64)
        value -= sum_in_float64(part_ptr + programs, programs) * 2.0 / (count * prior_count)
        if not UNBIASED:
            value += len(rates) / count + len(rates) / prior_count
        tl.store(value_ptr, value.to(tl.float32))


@triton.jit
def sum_in_float64(terms_ptr, count):
    """The sum of `count` numbers float32, in an order that depends on their number only."""
    total = tl.zeros([OF_PROGRAMS], tl.float64)
    start = 0
    while start < count:
        index = start + tl.arange(0, OF_PROGRAMS)
        total += tl.load(terms_ptr + index, mask=index < count, other=0.0, cache_modifier=".cg").to(tl.float64)
        start += OF_PROGRAMS
    return tl.sum(total)


@triton.jit(do_not_specialize=NUMBERS)
def discrepancy_gradients_kernel(
    z_ptr, prior_ptr, value_grad_ptr, sums_ptr, z_grad_ptr, prior_grad_ptr, ticket_ptr, rates,
    rows, prior_rows, dims, z_stride, z_step, prior_stride, prior_step,
    first_tile, z_tiles, all_tiles, tiles, parts, first_prior, all_rows, own_factor, prior_factor, between_factor,
    IMQ: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """z_grad_i = value_grad (own_factor sum_j s(z_i, z_j) (z_i - z_j) + between_factor sum_j s(z_i, p_j) (z_i - p_j)),
    and that of the prior by prior_factor; s = sum rate k^2 (IMQ) or sum rate k, the kernel's slope by the squared
    distance but for its sign. No i = j.

    Shapes: as in `discrepancy_kernel`; value_grad []. A program has a tile of rows that need a gradient, from
    `first_tile`, and one of `parts` of the tiles of both sets, so many `tiles` of them.
    Sums are made in `sums`, float32 [parts, all_rows, dims] of the rows that need a gradient, those of the prior from
    `first_prior`, and then added and rounded to z_grad and prior_grad, dense. One that nobody needs is None; both are
    where there is one part and the sums are the gradient.
    ticket int32 [1], zero, where there are several parts.
    Bytes: of each two tiles, their rows twice; of the sums 8 for each other tile after the first, 12 for each part.
    Launches: 1. Roundings of a term: as of a kernel, and 6 more. Deterministic.
    """
    program, per_tile = tl.program_id(0).to(tl.uint32), tl.cast(parts, tl.uint32)
    tile, part = first_tile + (program // per_tile).to(tl.int64), (program % per_tile).to(tl.int64)
    in_z = tile < z_tiles
    row = row_of(tile, z_tiles, ROWS)
    inside_row = row < tl.where(in_z, rows, prior_rows)
    size = tl.cast(all_rows, tl.int64) * dims
    prior_sums_ptr = sums_ptr + tl.cast(first_prior, tl.int64) * dims
    own_sums_ptr = sums_ptr + part * size + tl.where(in_z, 0, tl.cast(first_prior, tl.int64) * dims)
    value_grad = tl.load(value_grad_ptr).to(tl.float32)
    begin = part * tiles
    last = tl.minimum(begin + tiles, all_tiles)
    other = begin
    while other < last:
        squares = squared_distances(
            z_ptr, prior_ptr, tile, other, z_tiles, rows, prior_rows, dims,
            z_stride, z_step, prior_stride, prior_step, ROWS, DIMS,
        )  # fmt: skip
        slopes = tl.zeros([ROWS, ROWS], tl.float32)
        for k in tl.static_range(len(rates)):
            x = squares * rates[k]
            if IMQ:
                kernel = reciprocal(1.0 + x, FAST)
                slopes += kernel * (kernel * rates[k])
            else:
                slopes += exp(-x, FAST) * rates[k]
        same, is_pair = are_pairs(tile, other, z_tiles, rows, prior_rows, ROWS)
        factor = value_grad * tl.where(same, tl.where(in_z, own_factor, prior_factor), between_factor)
        w = tl.where(is_pair, factor * slopes, 0.0)
        start = 0
        while start < dims:
            d = differences(
                z_ptr, prior_ptr, tile, other, z_tiles, rows, prior_rows, start, dims,
                z_stride, z_step, prior_stride, prior_step, True, ROWS, DIMS,
            )  # fmt: skip
            moved = tl.sum(product(w[:, :, None], d), axis=1)
            add_to(own_sums_ptr, row, inside_row, start + tl.arange(0, DIMS), dims, moved, other > begin)
            start += DIMS
        tl.debug_barrier()  # the next sums are read by other threads
        other += 1
    if ticket_ptr is None:
        # Of its own rows; the end of the other set's is 0.
        first = tl.min(row, axis=0) * dims
        z_end = tl.where(in_z, tl.minimum(first + ROWS * dims, tl.cast(rows, tl.int64) * dims), 0)
        prior_end = tl.where(in_z, 0, tl.minimum(first + ROWS * dims, tl.cast(prior_rows, tl.int64) * dims))
        add_both(sums_ptr, prior_sums_ptr, z_grad_ptr, prior_grad_ptr, first, z_end, prior_end, 1, size)
    elif drew_last_ticket(ticket_ptr):
        z_end, prior_end = tl.cast(rows, tl.int64) * dims, tl.cast(prior_rows, tl.int64) * dims
        start = tl.zeros([], tl.int64)
        add_both(sums_ptr, prior_sums_ptr, z_grad_ptr, prior_grad_ptr, start, z_end, prior_end, parts, size)


@triton.jit
def add_both(sums_ptr, prior_sums_ptr, z_grad_ptr, prior_grad_ptr, start, z_end, prior_end, parts, size):
    """`add_parts` of the gradients that are needed, each from `start` to its end."""
    if z_grad_ptr is not None:
        add_parts(sums_ptr, z_grad_ptr, start, z_end, parts, size)
    if prior_grad_ptr is not None:
        add_parts(prior_sums_ptr, prior_grad_ptr, start, prior_end, parts, size)
