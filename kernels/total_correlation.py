"""The kernel of the divergence in three parts, from all pairs of a batch's samples and posteriors.

A program has a tile of rows of z and goes through the posteriors tile by tile. No pair leaves the registers:
`total_correlation_gradients` computes each term again. Of a row, log q(z) and each log q(z_k) are kept without what all
of their terms share: log 2 pi, which cancels in the parts, and the weight that most posteriors have.
"""

import triton
import triton.language as tl

from .mixture import differences, log_terms
from .numerics import exp, exp_half, log, product
from .tiles import UNSPECIALIZED, drew_last_ticket, sum_in_order

# Less than every term, and finite, so that its difference from a term of -infinity is no NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)
# Partial sums that the last program reads at a time: one for each thread of 4 warps.
AT_ONCE = tl.constexpr(128)
NUMBERS = (*UNSPECIALIZED, "information_stride", "correlation_stride", "dimensions_stride")


@triton.jit
def relative_weights(row, component, rows, own, following, STRATIFIED: tl.constexpr):
    """log W less that of most posteriors, [rows, components], and where a row meets its own posterior."""
    ahead = component[None, :] - row[:, None]
    if STRATIFIED:
        # The row that follows the last one is the first.
        follows = (ahead == 1) | (ahead == 1 - rows)
        weights = tl.where(ahead == 0, own, tl.where(follows, following, 0.0))
    else:
        weights = tl.zeros_like(ahead).to(tl.float32)
    return weights, ahead == 0


@triton.jit
def with_term(m, s, term, FAST: tl.constexpr):
    """(m, s) with one more term, element by element, by one exponential: m is the greatest, s = sum e^(term - m)."""
    ahead = term - m
    e = exp(-tl.abs(ahead), FAST)
    # NaN fails the comparison, and is in s then.
    return tl.maximum(m, term), tl.where(ahead > 0.0, s * e + 1.0, s + e)


@triton.jit
def log_sum(m, s, FAST: tl.constexpr):
    """The log-sum-exp over dimension 1."""
    most = tl.max(m, axis=1)
    return most + log(tl.sum(product(s, exp(m - tl.expand_dims(most, 1), FAST)), axis=1), FAST)


@triton.jit(do_not_specialize=NUMBERS)
def total_correlation_kernel(
    z_ptr, mu_ptr, logvar_ptr, joint_ptr, marginals_ptr, information_ptr, correlation_ptr, dimensions_ptr, part_ptr,
    ticket_ptr, rows, dims, z_stride, z_step, mu_stride, mu_step, logvar_stride, logvar_step,
    own, following, other, scale,
    STRATIFIED: tl.constexpr, ROWS: tl.constexpr, COMPONENTS: tl.constexpr, DIMS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """information = log q(z|x) - log q(z), correlation = log q(z) - sum_k log q(z_k), and
    dimensions = sum_k log q(z_k) - log N(z; 0, I), where log q(z_i) = log sum_j W_ij N(z_i; mu_j, exp(logvar_j)), and
    log q(z_k) alike.

    Shapes: z, mu and logvar [rows, dims], at any strides; joint [rows] and marginals [rows, dims], float32: log q(z)
    and log q(z_k) without `other`, the logarithm of most weights, and without log 2 pi. `own` and `following` are those
    of the row's own posterior and of the following row's, less `other`. The three results are float32 [rows]; with
    part, float32 [3, programs], and ticket int32 [1], zero, they are [], scale * their sums.
    Bytes: a tile of rows reads all posteriors twice, its rows of z twice for each tile of posteriors, and these and
    its own posteriors once more; 4 (1 + dims) a row are written, and the results.
    Launches: 1. Roundings: 14 of a term of a dimension, see `mixture_kernel`, and one per dimension more of a term of
    pairs; of a log-sum-exp 6 for each tile of posteriors, 7, and those of a sum. Deterministic: no floating-point
    atomics, partial sums are added in order.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside_row = row < rows
    joint_m = tl.full([ROWS, COMPONENTS], LOWEST, tl.float32)
    joint_s = tl.zeros([ROWS, COMPONENTS], tl.float32)
    first = tl.zeros([], tl.int64)
    while first < rows:
        component = first + tl.arange(0, COMPONENTS)
        terms = log_terms(
            z_ptr, mu_ptr, logvar_ptr, None, row, inside_row, component, component < rows, dims,
            z_stride, z_step, mu_stride, mu_step, logvar_stride, logvar_step, 0, ROWS, COMPONENTS, DIMS, FAST,
        )  # fmt: skip
        relative, _ = relative_weights(row, component, rows, own, following, STRATIFIED)
        joint_m, joint_s = with_term(joint_m, joint_s, terms + relative, FAST)
        first += COMPONENTS
    joint = log_sum(joint_m, joint_s, FAST)
    tl.store(joint_ptr + row, joint, mask=inside_row)

    marginal_sum = tl.zeros([ROWS, DIMS], tl.float32)
    own_sum = tl.zeros([ROWS, DIMS], tl.float32)
    prior_sum = tl.zeros([ROWS, DIMS], tl.float32)
    start = 0
    while start < dims:
        dim = start + tl.arange(0, DIMS)
        inside = inside_row[:, None] & (dim < dims)[None, :]
        m = tl.full([ROWS, COMPONENTS, DIMS], LOWEST, tl.float32)
        s = tl.zeros([ROWS, COMPONENTS, DIMS], tl.float32)
        first = tl.zeros([], tl.int64)
        while first < rows:
            component = first + tl.arange(0, COMPONENTS)
            r, _, logvar = differences(
                z_ptr, mu_ptr, logvar_ptr, row, inside_row, component, component < rows, start, dims,
                z_stride, z_step, mu_stride, mu_step, logvar_stride, logvar_step, DIMS, FAST,
            )  # fmt: skip
            relative, _ = relative_weights(row, component, rows, own, following, STRATIFIED)
            terms = -0.5 * (r * r + logvar[None, :, :]) + relative[:, :, None]
            terms = tl.where((component < rows)[None, :, None], terms, -float("inf"))
            m, s = with_term(m, s, terms, FAST)
            first += COMPONENTS
        marginal = log_sum(m, s, FAST)
        tl.store(marginals_ptr + row[:, None] * dims + dim[None, :], marginal, mask=inside)
        marginal_sum += tl.where(inside, marginal, 0.0)

        column = dim.to(tl.int64)[None, :]
        z = tl.load(z_ptr + row[:, None] * z_stride + column * z_step, mask=inside, other=0.0).to(tl.float32)
        mu = tl.load(mu_ptr + row[:, None] * mu_stride + column * mu_step, mask=inside, other=0.0).to(tl.float32)
        at = logvar_ptr + row[:, None] * logvar_stride + column * logvar_step
        logvar = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        r = (z - mu) * exp_half(-logvar, FAST)
        own_sum += r * r + logvar
        prior_sum += z * z
        start += DIMS

    marginals = tl.sum(marginal_sum, axis=1)
    information = -0.5 * tl.sum(own_sum, axis=1) - joint - other
    correlation = joint - marginals - (dims - 1) * other
    dimensions = marginals + dims * other + 0.5 * tl.sum(prior_sum, axis=1)
    if part_ptr is None:
        tl.store(information_ptr + row, information, mask=inside_row)
        tl.store(correlation_ptr + row, correlation, mask=inside_row)
        tl.store(dimensions_ptr + row, dimensions, mask=inside_row)
    else:
        programs = tl.num_programs(0)
        at = part_ptr + tl.program_id(0)
        tl.store(at, tl.sum(tl.where(inside_row, information, 0.0)))
        tl.store(at + programs, tl.sum(tl.where(inside_row, correlation, 0.0)))
        tl.store(at + 2 * programs, tl.sum(tl.where(inside_row, dimensions, 0.0)))
        if drew_last_ticket(ticket_ptr):
            tl.store(information_ptr, scale * sum_in_order(part_ptr, programs, 1, AT_ONCE))
            tl.store(correlation_ptr, scale * sum_in_order(part_ptr + programs, programs, 1, AT_ONCE))
            tl.store(dimensions_ptr, scale * sum_in_order(part_ptr + 2 * programs, programs, 1, AT_ONCE))
