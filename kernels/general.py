"""Kernels of the diagonal Gaussian posterior with any prior, any scale, several samples and log-densities. With none of
these, `gaussian` and `dimensions` have the kernels.
"""

import triton
import triton.language as tl

from .dimensions import at_least, finish, sum_blocks_in_order
from .moments import moments_tile
from .noise import noise_tile
from .numerics import exp, exp_half, expm1, expm1_minus, log, reciprocal, to_float32
from .special import softplus
from .tiles import UNSPECIALIZED, drew_last_ticket, sum_groups_in_order, tile_offsets

# "log_q_grad_stride" and "log_q_sample_stride" are those of sums, which are few.
SEVERAL_UNSPECIALIZED = (*UNSPECIALIZED, "blocks", "samples", "log_q_grad_stride", "log_q_sample_stride")


@triton.jit
def read_scale(
    a, scale_eps, log_eps, low, high,
    SCALE: tl.constexpr, HAS_EPS: tl.constexpr, CLAMP: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """(logvar, std, d logvar / da, d std / da) of a Gaussian whose second tensor is a, see
    `fastvae.reference.gaussian.log_variance`; log_eps is the logarithm of scale_eps. What a caller does not use is not
    computed. Outside of a tensor a is 1, of which every scale is a number.

    Roundings: of logvar none where it is a; else 16 of |logvar| + |a| (1 + |slope|) + |log_eps| + 1; of std 8 and of
    the slopes 10, relative.
    """
    if CLAMP:
        # NaN fails both comparisons and stays.
        a = tl.where(a < low, low, tl.where(a > high, high, a))
    if SCALE == "std" or SCALE == "softplus":
        if SCALE == "std":
            std, std_slope = a, tl.full(a.shape, 1.0, tl.float32)
        else:
            std, std_slope = softplus(a, FAST)
        if HAS_EPS:
            std += scale_eps
        logarithm = log(std, FAST)
        slope = std_slope * reciprocal(std, FAST)
        if SCALE == "softplus" and not HAS_EPS:
            # log log(1 + e^a) = a - e^a / 2 + ..., where log(1 + e^a) vanishes.
            half = 0.5 * exp(a, FAST)
            logarithm = tl.where(a < -20.0, a - half, logarithm)
            slope = tl.where(a < -20.0, 1.0 - half, slope)
        logvar, slope = 2.0 * logarithm, 2.0 * slope
    else:
        if HAS_EPS:
            # log(e^a + eps) = log eps + log(1 + e^(a - log eps))
            above, slope = softplus(a - log_eps, FAST)
            logvar = log_eps + above
        else:
            logvar, slope = a, tl.full(a.shape, 1.0, tl.float32)
        if SCALE == "log_std":
            logvar, slope = 2.0 * logvar, 2.0 * slope
        std = exp_half(logvar, FAST)
        std_slope = 0.5 * std * slope
    return logvar, std, slope, std_slope


@triton.jit
def log_variance(
    a, scale_eps, log_eps, low, high,
    SCALE: tl.constexpr, HAS_EPS: tl.constexpr, CLAMP: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """(logvar, d logvar / da) of `read_scale`."""
    logvar, _, slope, _ = read_scale(a, scale_eps, log_eps, low, high, SCALE, HAS_EPS, CLAMP, FAST)
    return logvar, slope


@triton.jit
def squared_distance(mu, prior_mu, prior_logvar, FAST: tl.constexpr):
    """((mu - prior_mu)^2 / exp(prior_logvar), (mu - prior_mu) / exp(prior_logvar)).

    1 / std is applied as two factors that stay finite: where it overflows, a difference of 0 would make NaN.
    """
    quarter = -0.25 * prior_logvar
    root = exp(tl.where(quarter > 88.0, 88.0, quarter), FAST)
    scaled = (mu - prior_mu) * root * root
    return scaled * scaled, scaled * root * root


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
    if MU_SHARED:
        prior_mu = tl.load(prior_mu_ptr + prior_base + prior_offsets, mask=inside_column, other=0.0)
        prior_mu = to_float32(prior_mu, FAST)[None, :]
    if SECOND_SHARED:
        prior_second = tl.load(prior_second_ptr + prior_base + prior_offsets, mask=inside_column, other=1.0)
        prior_second = to_float32(prior_second, FAST)
        prior_logvar, _prior_slope = log_variance(
            prior_second[None, :], scale_eps, log_eps, low, high, PRIOR_SCALE, HAS_EPS, CLAMP, FAST
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
                prior_at = prior_base + prior_offsets[None, :]
                if not MU_SHARED:
                    here = prior_at + (first_row + row)[:, None] * prior_mu_stride
                    prior_mu = to_float32(tl.load(prior_mu_ptr + here, mask=inside, other=0.0), FAST)
                if not SECOND_SHARED:
                    here = prior_at + (first_row + row)[:, None] * prior_second_stride
                    prior_second = to_float32(tl.load(prior_second_ptr + here, mask=inside, other=1.0), FAST)
                    prior_logvar, _prior_slope = log_variance(
                        prior_second, scale_eps, log_eps, low, high, PRIOR_SCALE, HAS_EPS, CLAMP, FAST
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


@triton.jit(do_not_specialize=SEVERAL_UNSPECIALIZED, do_not_specialize_on_alignment=("seed_ptr", "offset_ptr"))
def general_backward_kernel(
    mu_ptr, second_ptr, prior_mu_ptr, prior_second_ptr, eps_ptr, z_grad_ptr, kl_grad_ptr, kl_ptr, log_q_grad_ptr,
    mu_grad_ptr, second_grad_ptr, prior_mu_grad_ptr, prior_second_grad_ptr,
    mu_partial_ptr, second_partial_ptr, ticket_ptr,
    seed_ptr, offset_ptr, seed: tl.int64, offset: tl.int64, first_position,
    scale_eps, log_eps, low, high, free_bits,
    rows, columns, row_stride, grad_row_stride,
    prior_mu_stride, prior_second_stride, prior_mu_grad_stride, prior_second_grad_stride,
    chunks, blocks, samples, kl_grad_stride, log_q_grad_stride, log_q_sample_stride, kl_scale,
    SCALE: tl.constexpr, PRIOR_SCALE: tl.constexpr, HAS_EPS: tl.constexpr, CLAMP: tl.constexpr,
    MU_SHARED: tl.constexpr, SECOND_SHARED: tl.constexpr, SEVERAL: tl.constexpr, WEIGHT: tl.constexpr,
    INNER: tl.constexpr, PRIOR_INNER: tl.constexpr, FLAT: tl.constexpr, RUN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """With w = kl_scale * kl_grad (0 where kl is not above free_bits), d = (mu - mu') / exp(logvar') and x = logvar -
    logvar':

        mu_grad = sum_s z_grad + w d                    mu'_grad = -w d
        logvar_grad = (w (exp(x) - 1) - sum_s log_q_grad) / 2
        logvar'_grad = -w (exp(x) - 1 + (mu - mu') d) / 2
        second_grad = sum_s z_grad eps * d std / d second + logvar_grad * d logvar / d second

    and 0 for the gradient of a second tensor where it was clamped. The gradient of a prior that is shared is the sum
    over all rows.

    Shapes: as in `general_forward_kernel`; z_grad [samples, rows, columns], dense; log_q_grad float32 [samples, rows]
    at distances of its own; kl_grad float32 [rows] if WEIGHT is "row", [columns] if "column", else []; kl, what forward
    wrote, [columns] (None: without free bits). Partial sums of a shared prior's gradients are float32 [blocks,
    columns]. A missing upstream gradient is None and counts as 0; a gradient nobody needs is None and is not computed.
    Bytes per float32 element: reads 12 (8 without z_grad, 20 with a prior, 16 with a prior and without z_grad, 16 of
    three samples and without kl_grad), writes 8 (16 with a prior); eps is 4 more for each sample. A prior that is
    shared is read once for each tile, and leaves 8 for each column and block, which are read again.
    Launches: 1. Deterministic: no floating-point atomics, sums are added in the order of their rows.
    Roundings: mu_grad 3, second_grad 10 (25 and 12 with a prior), the prior's 25 and 27; of a scale other than logvar
    those of a second tensor 16 more; two for each sample, and one per level of a sum.
    """
    block, chunk = tile_of_program(chunks, FLAT)
    first_column = chunk * COLUMNS
    row = tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    inside_column = tl.arange(0, COLUMNS) < columns - first_column
    base, offsets = moments_tile(first_column, INNER, COLUMNS)
    prior_base, prior_offsets = moments_tile(first_column, PRIOR_INNER, COLUMNS)
    if kl_grad_ptr is not None:
        if MU_SHARED:
            prior_mu = tl.load(prior_mu_ptr + prior_base + prior_offsets, mask=inside_column, other=0.0)
            prior_mu = to_float32(prior_mu, FAST)[None, :]
        if SECOND_SHARED:
            prior_second = tl.load(prior_second_ptr + prior_base + prior_offsets, mask=inside_column, other=1.0)
            prior_second = to_float32(prior_second, FAST)[None, :]
            prior_logvar, prior_slope = log_variance(
                prior_second, scale_eps, log_eps, low, high, PRIOR_SCALE, HAS_EPS, CLAMP, FAST
            )  # fmt: skip
        if WEIGHT == "column":
            weight = (tl.load(kl_grad_ptr + column, mask=inside_column, other=0.0) * kl_scale)[None, :]
        elif WEIGHT == "one":
            kl_grad = tl.load(kl_grad_ptr) * kl_scale
            weight = tl.zeros([1, COLUMNS], tl.float32) + kl_grad
        if kl_ptr is not None:
            kl = tl.load(kl_ptr + column, mask=inside_column, other=0.0)
            weight = tl.where((kl <= free_bits)[None, :], 0.0, weight)

    mu_total = tl.zeros([ROWS, COLUMNS], tl.float32)
    second_total = tl.zeros([ROWS, COLUMNS], tl.float32)
    first_row = block * ROWS
    while first_row < rows:
        inside_row = row < rows - first_row
        inside = inside_row[:, None] & inside_column[None, :]
        at = base + (first_row + row)[:, None] * row_stride + offsets[None, :]
        result = base + (first_row + row)[:, None] * grad_row_stride + offsets[None, :]
        mu_grad = tl.zeros([ROWS, COLUMNS], tl.float32)
        by_std = tl.zeros([ROWS, COLUMNS], tl.float32)
        by_logvar = tl.zeros([ROWS, COLUMNS], tl.float32)
        second = to_float32(tl.load(second_ptr + at, mask=inside, other=1.0), FAST)
        logvar, _std, slope, std_slope = read_scale(second, scale_eps, log_eps, low, high, SCALE, HAS_EPS, CLAMP, FAST)

        if log_q_grad_ptr is not None:
            at_sum = log_q_grad_ptr + (first_row + row) * log_q_grad_stride
            log_q_grad = tl.zeros([ROWS], tl.float32)
            sample = 0
            while sample < samples:
                log_q_grad += tl.load(at_sum, mask=inside_row, other=0.0)
                at_sum += log_q_sample_stride
                sample += 1
            by_logvar -= log_q_grad[:, None]
        if z_grad_ptr is not None:
            position = first_row * columns + first_column
            if SEVERAL:
                sample = 0
                while sample < samples:
                    of_mu, of_std = sample_gradients(
                        z_grad_ptr, second_grad_ptr, eps_ptr, seed_ptr, offset_ptr, seed, offset, first_position,
                        position, columns, inside, RUN, ROWS, COLUMNS, FAST,
                    )  # fmt: skip
                    mu_grad += of_mu
                    by_std += of_std
                    position += tl.cast(rows, tl.int64) * columns
                    sample += 1
            else:
                mu_grad, by_std = sample_gradients(
                    z_grad_ptr, second_grad_ptr, eps_ptr, seed_ptr, offset_ptr, seed, offset, first_position,
                    position, columns, inside, RUN, ROWS, COLUMNS, FAST,
                )  # fmt: skip

        if kl_grad_ptr is not None:
            if WEIGHT == "row":
                weight = tl.load(kl_grad_ptr + (first_row + row) * kl_grad_stride, mask=inside_row, other=0.0)
                weight = (weight * kl_scale)[:, None]
            mu = to_float32(tl.load(mu_ptr + at, mask=inside, other=0.0), FAST)
            if prior_mu_ptr is None:
                mu_grad = tl.fma(weight, mu, mu_grad)
                by_logvar = tl.fma(weight, expm1(logvar, exp(logvar, FAST)), by_logvar)
            else:
                prior_at = prior_base + prior_offsets[None, :]
                if not MU_SHARED:
                    here = prior_at + (first_row + row)[:, None] * prior_mu_stride
                    prior_mu = to_float32(tl.load(prior_mu_ptr + here, mask=inside, other=0.0), FAST)
                if not SECOND_SHARED:
                    here = prior_at + (first_row + row)[:, None] * prior_second_stride
                    prior_second = to_float32(tl.load(prior_second_ptr + here, mask=inside, other=1.0), FAST)
                    prior_logvar, prior_slope = log_variance(
                        prior_second, scale_eps, log_eps, low, high, PRIOR_SCALE, HAS_EPS, CLAMP, FAST
                    )  # fmt: skip
                squared, by_distance = squared_distance(mu, prior_mu, prior_logvar, FAST)
                difference = logvar - prior_logvar
                narrower = expm1(difference, exp(difference, FAST))
                mu_grad = tl.fma(weight, by_distance, mu_grad)
                by_logvar = tl.fma(weight, narrower, by_logvar)
                if prior_mu_grad_ptr is not None:
                    gradient = -weight * by_distance
                    if MU_SHARED:
                        mu_total += tl.where(inside, gradient, 0.0)
                    else:
                        here = prior_at + (first_row + row)[:, None] * prior_mu_grad_stride
                        gradient = gradient.to(prior_mu_grad_ptr.dtype.element_ty)
                        tl.store(prior_mu_grad_ptr + here, gradient, mask=inside)
                if prior_second_grad_ptr is not None:
                    gradient = weight * (narrower + squared) * (-0.5 * prior_slope)
                    if CLAMP:
                        passes = (prior_second >= low) & (prior_second <= high)
                        gradient = tl.where(passes, gradient, 0.0)
                    if SECOND_SHARED:
                        second_total += tl.where(inside, gradient, 0.0)
                    else:
                        here = prior_at + (first_row + row)[:, None] * prior_second_grad_stride
                        gradient = gradient.to(prior_second_grad_ptr.dtype.element_ty)
                        tl.store(prior_second_grad_ptr + here, gradient, mask=inside)

        if mu_grad_ptr is not None:
            tl.store(mu_grad_ptr + result, mu_grad.to(mu_grad_ptr.dtype.element_ty), mask=inside)
        if second_grad_ptr is not None:
            second_grad = 0.5 * by_logvar * slope
            if z_grad_ptr is not None:
                second_grad = tl.fma(by_std, std_slope, second_grad)
            if CLAMP:
                second_grad = tl.where((second >= low) & (second <= high), second_grad, 0.0)
            tl.store(second_grad_ptr + result, second_grad.to(second_grad_ptr.dtype.element_ty), mask=inside)
        first_row += tl.cast(blocks, tl.int64) * ROWS

    at_prior = prior_base + prior_offsets
    at_partial = block * columns + column
    if MU_SHARED and prior_mu_grad_ptr is not None:
        sums = tl.sum(mu_total, axis=0)
        if mu_partial_ptr is None:
            tl.store(prior_mu_grad_ptr + at_prior, sums.to(prior_mu_grad_ptr.dtype.element_ty), mask=inside_column)
        else:
            tl.store(mu_partial_ptr + at_partial, sums, mask=inside_column)
    if SECOND_SHARED and prior_second_grad_ptr is not None:
        sums = tl.sum(second_total, axis=0)
        if second_partial_ptr is None:
            sums = sums.to(prior_second_grad_ptr.dtype.element_ty)
            tl.store(prior_second_grad_ptr + at_prior, sums, mask=inside_column)
        else:
            tl.store(second_partial_ptr + at_partial, sums, mask=inside_column)
    if ticket_ptr is not None:
        if drew_last_ticket(ticket_ptr):
            if mu_partial_ptr is not None:
                finish_gradient(mu_partial_ptr, prior_mu_grad_ptr, columns, blocks, PRIOR_INNER, COLUMNS, BLOCK)
            if second_partial_ptr is not None:
                finish_gradient(second_partial_ptr, prior_second_grad_ptr, columns, blocks, PRIOR_INNER, COLUMNS, BLOCK)


@triton.jit
def sample_gradients(
    z_grad_ptr, second_grad_ptr, eps_ptr, seed_ptr, offset_ptr, seed, offset, first_position,
    position, columns, inside,
    RUN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The gradients of mu and of std by a sample."""
    at = z_grad_ptr + position + tile_offsets(columns, ROWS, COLUMNS)
    z_grad = to_float32(tl.load(at, mask=inside, other=0.0), FAST)
    if second_grad_ptr is None:
        by_std = z_grad
    else:
        by_std = z_grad * noise_tile(
            eps_ptr, seed_ptr, offset_ptr, seed, offset, first_position, position, columns, inside,
            RUN, ROWS, COLUMNS, FAST,
        )  # fmt: skip
    return z_grad, by_std


@triton.jit
def finish_gradient(
    partial_ptr, gradient_ptr, columns, blocks, INNER: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A gradient of partial sums [blocks, columns], added in an order that depends on `blocks` only."""
    first = tl.zeros([], tl.int64)
    while first < columns:
        column = first + tl.arange(0, COLUMNS)
        sums = sum_blocks_in_order(partial_ptr, column, columns, blocks, COLUMNS, BLOCK)
        base, offsets = moments_tile(first, INNER, COLUMNS)
        tl.store(gradient_ptr + base + offsets, sums.to(gradient_ptr.dtype.element_ty), mask=column < columns)
        first += COLUMNS


@triton.jit(do_not_specialize=SEVERAL_UNSPECIALIZED, do_not_specialize_on_alignment=("seed_ptr", "offset_ptr"))
def score_kernel(
    second_ptr, eps_ptr, log_q_grad_ptr, z_grad_ptr,
    seed_ptr, offset_ptr, seed: tl.int64, offset: tl.int64, first_position,
    scale_eps, log_eps, low, high,
    rows, columns, row_stride, chunks, samples, log_q_grad_stride, log_q_sample_stride,
    SCALE: tl.constexpr, HAS_EPS: tl.constexpr, CLAMP: tl.constexpr,
    INNER: tl.constexpr, FLAT: tl.constexpr, RUN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """z_grad = -log_q_grad * eps / std: the gradient of log N(z; mu, std^2) in z, where z = mu + std * eps.

    Shapes: as in `general_backward_kernel`. Bytes per float32 element: reads 4, and writes 4 for each sample, for which
    eps is 4 more. Launches: 1. Deterministic. Roundings: 10, of a scale other than logvar 16 more.
    """
    block, chunk = tile_of_program(chunks, FLAT)
    first_row, first_column = block * ROWS, chunk * COLUMNS
    row = tl.arange(0, ROWS)
    inside_row = row < rows - first_row
    inside = inside_row[:, None] & (tl.arange(0, COLUMNS) < columns - first_column)[None, :]
    base, offsets = moments_tile(first_column, INNER, COLUMNS)
    at = base + (first_row + row)[:, None] * row_stride + offsets[None, :]
    second = to_float32(tl.load(second_ptr + at, mask=inside, other=1.0), FAST)
    logvar, _slope = log_variance(second, scale_eps, log_eps, low, high, SCALE, HAS_EPS, CLAMP, FAST)
    narrowness = -exp_half(-logvar, FAST)
    position = first_row * columns + first_column
    at_sum = log_q_grad_ptr + (first_row + row) * log_q_grad_stride
    sample = 0
    while sample < samples:
        eps = noise_tile(
            eps_ptr, seed_ptr, offset_ptr, seed, offset, first_position, position, columns, inside,
            RUN, ROWS, COLUMNS, FAST,
        )  # fmt: skip
        log_q_grad = tl.load(at_sum, mask=inside_row, other=0.0)
        z_grad = log_q_grad[:, None] * (eps * narrowness)
        to = z_grad_ptr + position + tile_offsets(columns, ROWS, COLUMNS)
        tl.store(to, z_grad.to(z_grad_ptr.dtype.element_ty), mask=inside)
        position += tl.cast(rows, tl.int64) * columns
        at_sum += log_q_sample_stride
        sample += 1
