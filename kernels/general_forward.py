"""The kernel of the diagonal Gaussian posterior with any prior, any scale, several samples and log-densities. With none
of these, `gaussian` and `dimensions` have the kernels.
"""

import triton
import triton.language as tl

from .dimensions import at_least, finish
from .moments import moments_tile
from .noise import noise_tile
from .numerics import exp, expm1_minus, to_float32
from .prior import read_prior_of_rows, read_shared_prior, squared_distance
from .scale import read_scale
from .tiles import UNSPECIALIZED, drew_last_ticket, sum_groups_in_order, tile_offsets

# "log_q_grad_stride" and "log_q_sample_stride" are those of sums, which are few.
SEVERAL_UNSPECIALIZED = (*UNSPECIALIZED, "blocks", "samples", "log_q_grad_stride", "log_q_sample_stride")


@triton.jit
def tile_of_program(chunks, FLAT: tl.constexpr):
    """(block, chunk): which tiles of rows, and which tile of columns, this program has."""
    program = tl.program_id(0)
    if FLAT:
        return tl.zeros([], tl.int64), program.to(tl.int64)
    program, chunks = program.to(tl.uint32), tl.cast(chunks, tl.uint32)
    return (program // chunks).to(tl.int64), (program % chunks).to(tl.int64)


@triton.jit
def draw(
    mu, logvar, std, eps_ptr, z_ptr, log_q_ptr, log_q_partial_ptr,
    seed_ptr, offset_ptr, seed, offset, first_position, position, sums, chunks, columns, inside, inside_row,
    RUN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Write a sample of a tile, whose first element is number `position` of z, and the sums of its log-densities: of
    the rows from number `sums` on.
    """
    eps = noise_tile(
        eps_ptr, seed_ptr, offset_ptr, seed, offset, first_position, position, columns, inside,
        RUN, ROWS, COLUMNS, FAST,
    )  # fmt: skip
    at = z_ptr + position + tile_offsets(columns, ROWS, COLUMNS)
    tl.store(at, tl.fma(std, eps, mu).to(z_ptr.dtype.element_ty), mask=inside)
    if log_q_ptr is not None:
        terms = tl.fma(eps, eps, logvar + 1.8378770664093453)  # log 2 pi
        total = tl.sum(tl.where(inside, terms, 0.0), axis=1)
        row = tl.arange(0, ROWS)
        if log_q_partial_ptr is None:
            tl.store(log_q_ptr + sums + row, -0.5 * total, mask=inside_row)
        else:
            tl.store(log_q_partial_ptr + sums + row * tl.cast(chunks, tl.int64), total, mask=inside_row)


@triton.jit(do_not_specialize=SEVERAL_UNSPECIALIZED, do_not_specialize_on_alignment=("seed_ptr", "offset_ptr"))
def general_forward_kernel(
    mu_ptr, second_ptr, prior_mu_ptr, prior_second_ptr, eps_ptr, z_ptr, kl_ptr, log_q_ptr,
    kl_partial_ptr, log_q_partial_ptr, ticket_ptr,
    seed_ptr, offset_ptr, seed: tl.int64, offset: tl.int64, first_position,
    scale_eps, log_eps, low, high, free_bits,
    rows, columns, row_stride, prior_mu_stride, prior_second_stride, chunks, blocks, samples, kl_scale,
    SCALE: tl.constexpr, PRIOR_SCALE: tl.constexpr, HAS_EPS: tl.constexpr, CLAMP: tl.constexpr,
    MU_SHARED: tl.constexpr, SECOND_SHARED: tl.constexpr, SEVERAL: tl.constexpr, SUM: tl.constexpr,
    INNER: tl.constexpr, PRIOR_INNER: tl.constexpr, FLAT: tl.constexpr, RUN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
    Q_GROUPS: tl.constexpr, Q_BLOCK: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """z = mu + std * eps (unless z_ptr is None), kl = kl_scale * sum (h(logvar - logvar') + (mu - mu')^2 /
    exp(logvar')) with h(x) = exp(x) - 1 - x (unless kl_ptr is None), and log_q = -sum (eps^2 + logvar + log 2 pi) / 2
    of each row (unless log_q_ptr is None). Without a prior, mu' = logvar' = 0.

    Shapes: mu, second and the prior's [rows, columns] at distances of their own (those of a prior that is shared
    [columns]); eps (None: made from seed and offset) and z [samples, rows, columns], dense; log_q float32 [samples,
    rows]; kl float32 [rows] if SUM is "row", [columns] and at least free_bits if it is "column", else []. A program has
    the columns of one of `chunks` tiles and every blocks-th tile of rows. Where no program owns a whole sum, ticket is
    int32 [1], zero, kl_partial is float32 [rows, chunks], [blocks, columns] or [programs], and log_q_partial float32
    [samples, rows, chunks].
    Bytes per float32 element: reads 8 (16 with a prior), writes 4 (0 without z, 12 of three samples); eps is 4 more
    for each sample. A prior that is shared is read once for each tile. 8 more for each partial sum.
    Launches: 1. Roundings: z 6; a term of kl 10 (26 with a prior); a term of log_q 4; of a scale other than logvar z 8
    more, sums 16 more; and one per level of a sum.
    Deterministic: no floating-point atomics, sums are added in the order of their elements.
    """
    block, chunk = tile_of_program(chunks, FLAT)
    first_column = chunk * COLUMNS
    row = tl.arange(0, ROWS)
    inside_column = tl.arange(0, COLUMNS) < columns - first_column
    base, offsets = moments_tile(first_column, INNER, COLUMNS)
    prior_base, prior_offsets = moments_tile(first_column, PRIOR_INNER, COLUMNS)
    prior_at = prior_base + prior_offsets
    shared = read_shared_prior(
        prior_mu_ptr, prior_second_ptr, prior_at, inside_column, scale_eps, log_eps, low, high,
        PRIOR_SCALE, HAS_EPS, CLAMP, MU_SHARED, SECOND_SHARED, COLUMNS, FAST,
    )  # fmt: skip

    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    first_row = block * ROWS
    while first_row < rows:
        inside_row = row < rows - first_row
        inside = inside_row[:, None] & inside_column[None, :]
        at = base + (first_row + row)[:, None] * row_stride + offsets[None, :]
        mu = to_float32(tl.load(mu_ptr + at, mask=inside, other=0.0), FAST)
        second = to_float32(tl.load(second_ptr + at, mask=inside, other=1.0), FAST)
        logvar, std, _slope, _std_slope = read_scale(second, scale_eps, log_eps, low, high, SCALE, HAS_EPS, CLAMP, FAST)
        if z_ptr is not None:
            position = first_row * columns + first_column
            sums = first_row if log_q_partial_ptr is None else first_row * chunks + chunk
            if SEVERAL:
                sample = 0
                while sample < samples:
                    draw(
                        mu, logvar, std, eps_ptr, z_ptr, log_q_ptr, log_q_partial_ptr,
                        seed_ptr, offset_ptr, seed, offset, first_position, position, sums, chunks, columns,
                        inside, inside_row, RUN, ROWS, COLUMNS, FAST,
                    )  # fmt: skip
                    position += tl.cast(rows, tl.int64) * columns
                    sums += tl.cast(rows, tl.int64) * (1 if log_q_partial_ptr is None else chunks)
                    sample += 1
            else:
                draw(
                    mu, logvar, std, eps_ptr, z_ptr, log_q_ptr, log_q_partial_ptr,
                    seed_ptr, offset_ptr, seed, offset, first_position, position, sums, chunks, columns,
                    inside, inside_row, RUN, ROWS, COLUMNS, FAST,
                )  # fmt: skip
        if kl_ptr is not None:
            if prior_mu_ptr is None:
                terms = tl.fma(mu, mu, expm1_minus(logvar, exp(logvar, FAST)))
            else:
                prior_mu, _, prior_logvar, _ = read_prior_of_rows(
                    shared, prior_mu_ptr, prior_second_ptr, prior_at, first_row + row, inside,
                    prior_mu_stride, prior_second_stride, scale_eps, log_eps, low, high,
                    PRIOR_SCALE, HAS_EPS, CLAMP, MU_SHARED, SECOND_SHARED, FAST,
                )  # fmt: skip
                squared, _by_distance = squared_distance(mu, prior_mu, prior_logvar, FAST)
                difference = logvar - prior_logvar
                terms = squared + expm1_minus(difference, exp(difference, FAST))
            # Outside of the tensor the term is not 0 for every scale.
            terms = tl.where(inside, terms, 0.0)
            if SUM == "row":
                sums_of_rows = tl.sum(terms, axis=1)
                if kl_partial_ptr is None:
                    tl.store(kl_ptr + first_row + row, sums_of_rows * kl_scale, mask=inside_row)
                else:
                    here = (first_row + row) * chunks + chunk
                    tl.store(kl_partial_ptr + here, sums_of_rows, mask=inside_row)
            else:
                total += terms
        first_row += tl.cast(blocks, tl.int64) * ROWS

    if kl_ptr is not None:
        if SUM == "column":
            sums_of_columns = tl.sum(total, axis=0)
            at = first_column + tl.arange(0, COLUMNS)
            if kl_partial_ptr is None:
                tl.store(kl_ptr + at, at_least(sums_of_columns * kl_scale, free_bits), mask=inside_column)
            else:
                tl.store(kl_partial_ptr + block * columns + at, sums_of_columns, mask=inside_column)
        elif SUM == "all":
            if kl_partial_ptr is None:
                tl.store(kl_ptr, tl.sum(total) * kl_scale)
            else:
                tl.store(kl_partial_ptr + tl.program_id(0), tl.sum(total))
    if ticket_ptr is not None:
        if drew_last_ticket(ticket_ptr):
            if kl_partial_ptr is not None:
                if SUM == "column":
                    finish(kl_partial_ptr, kl_ptr, columns, blocks, kl_scale, free_bits, COLUMNS, BLOCK)
                else:
                    groups = rows if SUM == "row" else 1
                    count = chunks if SUM == "row" else tl.num_programs(0)
                    sum_groups_in_order(kl_partial_ptr, kl_ptr, groups, count, kl_scale, GROUPS, BLOCK)
            if log_q_partial_ptr is not None:
                sum_groups_in_order(log_q_partial_ptr, log_q_ptr, samples * rows, chunks, -0.5, Q_GROUPS, Q_BLOCK)
