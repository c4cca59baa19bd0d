"""The kernels of the gradients of `general_forward`: of the moments and the prior, and of a log-density in z."""

import triton
import triton.language as tl

from .dimensions import sum_blocks_in_order
from .general_forward import SEVERAL_UNSPECIALIZED, tile_of_program
from .moments import moments_tile
from .noise import noise_tile
from .numerics import exp, exp_half, expm1, to_float32
from .prior import read_prior_of_rows, read_shared_prior, squared_distance
from .scale import log_variance, read_scale
from .tiles import drew_last_ticket, tile_offsets


@triton.jit(do_not_specialize=SEVERAL_UNSPECIALIZED, do_not_specialize_on_alignment=("seed_ptr", "offset_ptr"))
def general_backward_kernel(
    mu_ptr, second_ptr, prior_mu_ptr, prior_second_ptr, eps_ptr, z_grad_ptr, kl_grad_ptr, kl_ptr, log_q_grad_ptr,
    mu_grad_ptr, second_grad_ptr, prior_mu_grad_ptr, prior_second_grad_ptr,
    mu_partial_ptr, second_partial_ptr, ticket_ptr,
    seed_ptr, offset_ptr, seed: tl.int64, offset: tl.int64, first_position,
    scale_eps, log_eps, low, high, free_bits,
    rows, columns, row_stride, grad_row_stride,
    prior_mu_stride, prior_second_stride, prior_grad_stride,
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

    Shapes: as in `general_forward.general_forward_kernel`; z_grad [samples, rows, columns], dense; log_q_grad float32
    [samples, rows] at distances of its own; kl_grad float32 [rows] if WEIGHT is "row", [columns] if "column", else [];
    kl, what forward wrote, [columns] (None: without free bits). Partial sums of a shared prior's gradients are float32
    [blocks, columns]. A missing upstream gradient is None and counts as 0; a gradient nobody needs is None and is not
    computed.
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
    prior_at = prior_base + prior_offsets
    if kl_grad_ptr is not None:
        shared = read_shared_prior(
            prior_mu_ptr, prior_second_ptr, prior_at, inside_column, scale_eps, log_eps, low, high,
            PRIOR_SCALE, HAS_EPS, CLAMP, MU_SHARED, SECOND_SHARED, COLUMNS, FAST,
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
                prior_mu, prior_second, prior_logvar, prior_slope = read_prior_of_rows(
                    shared, prior_mu_ptr, prior_second_ptr, prior_at, first_row + row, inside,
                    prior_mu_stride, prior_second_stride, scale_eps, log_eps, low, high,
                    PRIOR_SCALE, HAS_EPS, CLAMP, MU_SHARED, SECOND_SHARED, FAST,
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
                        here = prior_at[None, :] + (first_row + row)[:, None] * prior_grad_stride
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
                        here = prior_at[None, :] + (first_row + row)[:, None] * prior_grad_stride
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

    at_partial = block * columns + column
    if MU_SHARED and prior_mu_grad_ptr is not None:
        sums = tl.sum(mu_total, axis=0)
        if mu_partial_ptr is None:
            tl.store(prior_mu_grad_ptr + prior_at, sums.to(prior_mu_grad_ptr.dtype.element_ty), mask=inside_column)
        else:
            tl.store(mu_partial_ptr + at_partial, sums, mask=inside_column)
    if SECOND_SHARED and prior_second_grad_ptr is not None:
        sums = tl.sum(second_total, axis=0)
        if second_partial_ptr is None:
            sums = sums.to(prior_second_grad_ptr.dtype.element_ty)
            tl.store(prior_second_grad_ptr + prior_at, sums, mask=inside_column)
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
