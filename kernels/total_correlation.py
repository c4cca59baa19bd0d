"""Kernels of the divergence in three parts, from all pairs of a batch's samples and posteriors, and of its gradients.

A program has a tile of rows of z and goes through the posteriors tile by tile, or the other way round. No pair leaves
the registers: backward computes each term again. Of a row, log q(z) and each log q(z_k) are kept without what all of
their terms share: log 2 pi, which cancels in the parts, and the weight that most posteriors have.
"""

import triton
import triton.language as tl

from .mixture import add_parts, add_to, differences, log_terms
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


@triton.jit
def upstream(grad_ptr, stride, row, inside_row, scale, ROWS: tl.constexpr):
    """scale * the upstream gradient of each row; 0 where there is none."""
    if grad_ptr is None:
        grad = tl.zeros([ROWS], tl.float32)
    else:
        grad = scale * tl.load(grad_ptr + row * stride, mask=inside_row, other=0.0).to(tl.float32)
    return grad


@triton.jit
def what_reaches(
    information_grad_ptr, correlation_grad_ptr, dimensions_grad_ptr, information_stride, correlation_stride,
    dimensions_stride, row, inside_row, scale, ROWS: tl.constexpr,
):  # fmt: skip
    """What reaches log q(z|x), log q(z), each log q(z_k), and less the prior's log-density, of each row."""
    of_information = upstream(information_grad_ptr, information_stride, row, inside_row, scale, ROWS)
    of_correlation = upstream(correlation_grad_ptr, correlation_stride, row, inside_row, scale, ROWS)
    of_dimensions = upstream(dimensions_grad_ptr, dimensions_stride, row, inside_row, scale, ROWS)
    return of_information, of_correlation - of_information, of_dimensions - of_correlation, of_dimensions


@triton.jit
def weights_of_pairs(terms, meets_own, joint_ptr, row, inside_row, of_own, of_joint, FAST: tl.constexpr):
    """What reaches the log-density of each pair through log q(z), and that of own pairs through log q(z|x)."""
    joint = tl.load(joint_ptr + row, mask=inside_row, other=0.0)
    joint = tl.where(joint == -float("inf"), 0.0, joint)
    w = of_joint[:, None] * exp(terms - joint[:, None], FAST)
    return w + tl.where(meets_own & (terms != -float("inf")), of_own[:, None], 0.0)


@triton.jit
def weighted_differences(
    w, relative, marginals_ptr, of_marginals, z_ptr, mu_ptr, logvar_ptr, row, inside_row, component, inside_component,
    start, dims, z_stride, z_step, mu_stride, mu_step, logvar_stride, logvar_step,
    DIMS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """What reaches each term of a dimension, r, and e^(-logvar / 2), of dimensions from `start`."""
    r, factor, logvar = differences(
        z_ptr, mu_ptr, logvar_ptr, row, inside_row, component, inside_component, start, dims,
        z_stride, z_step, mu_stride, mu_step, logvar_stride, logvar_step, DIMS, FAST,
    )  # fmt: skip
    dim = start + tl.arange(0, DIMS)
    at = marginals_ptr + row[:, None] * dims + dim[None, :]
    marginal = tl.load(at, mask=inside_row[:, None] & (dim < dims)[None, :], other=0.0)
    marginal = tl.where(marginal == -float("inf"), 0.0, marginal)
    terms = -0.5 * (r * r + logvar[None, :, :]) + relative[:, :, None]
    weights = w[:, :, None] + of_marginals[:, None, None] * exp(terms - marginal[:, None, :], FAST)
    inside = inside_row[:, None] & inside_component[None, :]
    weights = tl.where(inside[:, :, None], weights, 0.0)
    return weights, tl.where(weights == 0.0, 0.0, r), factor  # 0 times infinity would be NaN


@triton.jit(do_not_specialize=NUMBERS)
def total_correlation_rows_kernel(
    z_ptr, mu_ptr, logvar_ptr, joint_ptr, marginals_ptr, information_grad_ptr, correlation_grad_ptr,
    dimensions_grad_ptr, z_grad_ptr, sums_ptr,
    rows, dims, z_stride, z_step, mu_stride, mu_step, logvar_stride, logvar_step,
    information_stride, correlation_stride, dimensions_stride, own, following, scale,
    STRATIFIED: tl.constexpr, ROWS: tl.constexpr, COMPONENTS: tl.constexpr, DIMS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """z_grad_ik = dimensions_grad_i z_ik - sum_j w_ijk r_ijk exp(-logvar_jk / 2), r = (z - mu) exp(-logvar / 2), where
    w_ijk is what reaches a term: (correlation_grad - information_grad)_i exp(log W_ij + l_ij - log q(z_i)),
    (dimensions_grad - correlation_grad)_i exp(log W_ij + l_ijk - log q(z_ik)), and where j = i, information_grad_i.

    Shapes: as in `total_correlation_kernel`; the upstream gradients at a distance, 0 where they are one number, and
    each may be None. z_grad [rows, dims], dense. Sums are made in sums, float32 [rows, dims], which is None where
    z_grad is float32.
    Bytes: those of a term twice, and of the sums 8 for each tile of components.
    Launches: 1. Roundings: as of the log-sum-exps, in units of a weighted term. Deterministic.
    """
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    row = first_row + tl.arange(0, ROWS)
    inside_row = row < rows
    if sums_ptr is None:
        to_ptr = z_grad_ptr
    else:
        to_ptr = sums_ptr
    of_own, of_joint, of_marginals, of_dimensions = what_reaches(
        information_grad_ptr, correlation_grad_ptr, dimensions_grad_ptr, information_stride, correlation_stride,
        dimensions_stride, row, inside_row, scale, ROWS,
    )  # fmt: skip
    first = tl.zeros([], tl.int64)
    while first < rows:
        component = first + tl.arange(0, COMPONENTS)
        inside_component = component < rows
        terms = log_terms(
            z_ptr, mu_ptr, logvar_ptr, None, row, inside_row, component, inside_component, dims,
            z_stride, z_step, mu_stride, mu_step, logvar_stride, logvar_step, 0, ROWS, COMPONENTS, DIMS, FAST,
        )  # fmt: skip
        relative, meets_own = relative_weights(row, component, rows, own, following, STRATIFIED)
        w = weights_of_pairs(terms + relative, meets_own, joint_ptr, row, inside_row, of_own, of_joint, FAST)
        start = 0
        while start < dims:
            weights, r, factor = weighted_differences(
                w, relative, marginals_ptr, of_marginals, z_ptr, mu_ptr, logvar_ptr, row, inside_row, component,
                inside_component, start, dims, z_stride, z_step, mu_stride, mu_step, logvar_stride, logvar_step,
                DIMS, FAST,
            )  # fmt: skip
            slope = -tl.sum(product(weights * r, factor[None, :, :]), axis=1)
            dim = start + tl.arange(0, DIMS)
            if first == 0:
                at = z_ptr + row[:, None] * z_stride + dim.to(tl.int64)[None, :] * z_step
                z = tl.load(at, mask=inside_row[:, None] & (dim < dims)[None, :], other=0.0)
                slope += of_dimensions[:, None] * z.to(tl.float32)
            add_to(to_ptr, row, inside_row, dim, dims, slope, first > 0)
            start += DIMS
        tl.debug_barrier()  # the next sums are read by other threads
        first += COMPONENTS
    if sums_ptr is not None:
        size = tl.cast(rows, tl.int64) * dims
        add_parts(sums_ptr, z_grad_ptr, first_row * dims, tl.minimum(first_row + ROWS, rows) * dims, 1, size)


@triton.jit(do_not_specialize=NUMBERS)
def total_correlation_posteriors_kernel(
    z_ptr, mu_ptr, logvar_ptr, joint_ptr, marginals_ptr, information_grad_ptr, correlation_grad_ptr,
    dimensions_grad_ptr, mu_grad_ptr, logvar_grad_ptr, mu_sums_ptr, logvar_sums_ptr,
    rows, dims, z_stride, z_step, mu_stride, mu_step, logvar_stride, logvar_step,
    information_stride, correlation_stride, dimensions_stride, own, following, scale,
    STRATIFIED: tl.constexpr, ROWS: tl.constexpr, COMPONENTS: tl.constexpr, DIMS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """mu_grad_jk = sum_i w_ijk r_ijk exp(-logvar_jk / 2) and logvar_grad_jk = sum_i w_ijk (r_ijk^2 - 1) / 2, w and r as
    in `total_correlation_rows_kernel`.

    Shapes: as there, with the roles of rows and posteriors exchanged: a program has a tile of posteriors. A gradient
    that nobody needs is None, and so are its sums.
    Bytes, launches, roundings: as there. Deterministic.
    """
    first_component = tl.program_id(0).to(tl.int64) * COMPONENTS
    component = first_component + tl.arange(0, COMPONENTS)
    inside_component = component < rows
    if mu_sums_ptr is None:
        mu_to_ptr = mu_grad_ptr
    else:
        mu_to_ptr = mu_sums_ptr
    if logvar_sums_ptr is None:
        logvar_to_ptr = logvar_grad_ptr
    else:
        logvar_to_ptr = logvar_sums_ptr
    first = tl.zeros([], tl.int64)
    while first < rows:
        row = first + tl.arange(0, ROWS)
        inside_row = row < rows
        of_own, of_joint, of_marginals, _ = what_reaches(
            information_grad_ptr, correlation_grad_ptr, dimensions_grad_ptr, information_stride, correlation_stride,
            dimensions_stride, row, inside_row, scale, ROWS,
        )  # fmt: skip
        terms = log_terms(
            z_ptr, mu_ptr, logvar_ptr, None, row, inside_row, component, inside_component, dims,
            z_stride, z_step, mu_stride, mu_step, logvar_stride, logvar_step, 0, ROWS, COMPONENTS, DIMS, FAST,
        )  # fmt: skip
        relative, meets_own = relative_weights(row, component, rows, own, following, STRATIFIED)
        w = weights_of_pairs(terms + relative, meets_own, joint_ptr, row, inside_row, of_own, of_joint, FAST)
        start = 0
        while start < dims:
            weights, r, factor = weighted_differences(
                w, relative, marginals_ptr, of_marginals, z_ptr, mu_ptr, logvar_ptr, row, inside_row, component,
                inside_component, start, dims, z_stride, z_step, mu_stride, mu_step, logvar_stride, logvar_step,
                DIMS, FAST,
            )  # fmt: skip
            dim = start + tl.arange(0, DIMS)
            weighted = product(weights, r)
            if mu_grad_ptr is not None:
                slope = tl.sum(weighted, axis=0) * factor
                add_to(mu_to_ptr, component, inside_component, dim, dims, slope, first > 0)
            if logvar_grad_ptr is not None:
                slope = 0.5 * tl.sum(product(weighted, r) - weights, axis=0)
                add_to(logvar_to_ptr, component, inside_component, dim, dims, slope, first > 0)
            start += DIMS
        tl.debug_barrier()  # the next sums are read by other threads
        first += ROWS
    size = tl.cast(rows, tl.int64) * dims
    end = tl.minimum(first_component + COMPONENTS, rows) * dims
    if mu_sums_ptr is not None:
        add_parts(mu_sums_ptr, mu_grad_ptr, first_component * dims, end, 1, size)
    if logvar_sums_ptr is not None:
        add_parts(logvar_sums_ptr, logvar_grad_ptr, first_component * dims, end, 1, size)
