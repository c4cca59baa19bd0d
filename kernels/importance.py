"""Kernels of the importance-weighted bound: the log-sum-exp over samples of three log-densities, and its gradients."""

import triton
import triton.language as tl

from .log_sum_exp import joined, shift, store_value
from .numerics import exp
from .tiles import UNSPECIALIZED

NUMBERS = (*UNSPECIALIZED, "samples", "tiles", "parts", "value_grad_stride")


@triton.jit
def log_weights(
    likelihood_ptr, prior_ptr, posterior_ptr, sample, column, inside,
    likelihood_step, likelihood_stride, prior_step, prior_stride, posterior_step, posterior_stride,
):  # fmt: skip
    """log p(x|z) + log p(z) - log q(z) in float32, [samples, columns]; -infinity outside."""
    sample, column = sample.to(tl.int64)[:, None], column.to(tl.int64)[None, :]
    at = likelihood_ptr + sample * likelihood_step + column * likelihood_stride
    log_w = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    at = prior_ptr + sample * prior_step + column * prior_stride
    log_w += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    at = posterior_ptr + sample * posterior_step + column * posterior_stride
    log_w -= tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, log_w, -float("inf"))


@triton.jit(do_not_specialize=NUMBERS)
def bound_kernel(
    likelihood_ptr, prior_ptr, posterior_ptr, value_ptr, part_ptr, ticket_ptr,
    samples, rows, likelihood_step, likelihood_stride, prior_step, prior_stride, posterior_step, posterior_stride,
    tiles, parts, constant,
    SAMPLES: tl.constexpr, COLUMNS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """value_b = constant + log sum_s exp(log_w_sb), log_w = log p(x|z) + log p(z) - log q(z).

    Shapes: three tensors [samples, rows] at any strides, value float32 [rows]. A program has a tile of rows and one of
    `parts` of the samples, so many `tiles` of them. With several parts, part is float32 [2, parts, rows] and ticket
    int32 [1], zero.
    Bytes per float32 element: reads 12, writes 0; 4 a row, and 16 for each of several parts. Launches: 1. Roundings: of
    log_w 2, of the value 7 more, and one per tile and per level of a sum. Deterministic: parts are joined in order.
    """
    program, per_tile = tl.program_id(0).to(tl.uint32), tl.cast(parts, tl.uint32)
    row = (program // per_tile).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    part = (program % per_tile).to(tl.int64)
    inside_row = row < rows
    m = tl.full([COLUMNS], -float("inf"), tl.float32)
    s = tl.zeros([COLUMNS], tl.float32)
    first = part * tiles * SAMPLES
    last = first + tl.cast(tiles, tl.int64) * SAMPLES
    while (first < last) & (first < samples):
        sample = first + tl.arange(0, SAMPLES)
        log_w = log_weights(
            likelihood_ptr, prior_ptr, posterior_ptr, sample, row, (sample < samples)[:, None] & inside_row[None, :],
            likelihood_step, likelihood_stride, prior_step, prior_stride, posterior_step, posterior_stride,
        )  # fmt: skip
        most = tl.max(log_w, axis=0)
        m, s = joined(m, s, most, tl.sum(exp(log_w - shift(most)[None, :], FAST), axis=0), FAST)
        first += SAMPLES
    store_value(m, s, value_ptr, part_ptr, ticket_ptr, row, inside_row, rows, part, parts, constant, FAST)


@triton.jit(do_not_specialize=NUMBERS)
def bound_backward_kernel(
    likelihood_ptr, prior_ptr, posterior_ptr, value_ptr, value_grad_ptr,
    likelihood_grad_ptr, prior_grad_ptr, posterior_grad_ptr,
    samples, rows, likelihood_step, likelihood_stride, prior_step, prior_stride, posterior_step, posterior_stride,
    value_grad_stride, parts, constant,
    SAMPLES: tl.constexpr, COLUMNS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The gradients g w, g w and -g w, with w_sb = exp(log_w_sb + constant - value_b) the normalised weights.

    Shapes: as in `bound_kernel`; value_grad [rows] at a distance, gradients [samples, rows], dense. A program has one
    tile, one of `parts` over the samples. A gradient that nobody needs is None.
    Bytes per float32 element: reads 12, writes 12. Launches: 1. Roundings: as of the value, and 6. Deterministic.
    """
    program, per_tile = tl.program_id(0).to(tl.uint32), tl.cast(parts, tl.uint32)
    row = (program // per_tile).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    sample = (program % per_tile).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)
    inside_row = row < rows
    inside = (sample < samples)[:, None] & inside_row[None, :]
    log_w = log_weights(
        likelihood_ptr, prior_ptr, posterior_ptr, sample, row, inside,
        likelihood_step, likelihood_stride, prior_step, prior_stride, posterior_step, posterior_stride,
    )  # fmt: skip
    value = tl.load(value_ptr + row, mask=inside_row, other=0.0)
    # Where all samples are -infinity, their weights are 0.
    value = tl.where(value == -float("inf"), 0.0, value - constant)
    value_grad = tl.load(value_grad_ptr + row * value_grad_stride, mask=inside_row, other=0.0).to(tl.float32)
    gradient = value_grad[None, :] * exp(log_w - value[None, :], FAST)
    at = sample[:, None] * rows + row[None, :]
    if likelihood_grad_ptr is not None:
        tl.store(likelihood_grad_ptr + at, gradient.to(likelihood_grad_ptr.dtype.element_ty), mask=inside)
    if prior_grad_ptr is not None:
        tl.store(prior_grad_ptr + at, gradient.to(prior_grad_ptr.dtype.element_ty), mask=inside)
    if posterior_grad_ptr is not None:
        tl.store(posterior_grad_ptr + at, (-gradient).to(posterior_grad_ptr.dtype.element_ty), mask=inside)
