"""The kernels of the gradients of `total_correlation`.

A program of one has a tile of rows of z and goes through the posteriors tile by tile; of the other, the other way
round. No pair leaves the registers.
"""

import triton
import triton.language as tl

from .mixture import add_parts, add_to, differences, log_terms
from .numerics import exp, product
from .total_correlation import NUMBERS, relative_weights


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
def weights_of_pairs(
    z_ptr, mu_ptr, logvar_ptr, joint_ptr, row, inside_row, component, inside_component, rows, dims,
    z_stride, z_step, mu_stride, mu_step, logvar_stride, logvar_step, own, following, of_own, of_joint,
    STRATIFIED: tl.constexpr, ROWS: tl.constexpr, COMPONENTS: tl.constexpr, DIMS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """What reaches the log-density of each pair of a tile, through log q(z) and that of own pairs through log q(z|x);
    and the pair's log-weight of `relative_weights`.
    """
    terms = log_terms(
        z_ptr, mu_ptr, logvar_ptr, None, row, inside_row, component, inside_component, dims,
        z_stride, z_step, mu_stride, mu_step, logvar_stride, logvar_step, 0, ROWS, COMPONENTS, DIMS, FAST,
    )  # fmt: skip
    relative, meets_own = relative_weights(row, component, rows, own, following, STRATIFIED)
    terms += relative
    joint = tl.load(joint_ptr + row, mask=inside_row, other=0.0)
    joint = tl.where(joint == -float("inf"), 0.0, joint)
    w = of_joint[:, None] * exp(terms - joint[:, None], FAST)
    return w + tl.where(meets_own & (terms != -float("inf")), of_own[:, None], 0.0), relative


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

    Shapes: as in `total_correlation.total_correlation_kernel`; the upstream gradients at a distance, 0 where they are
    one number, and each may be None. z_grad [rows, dims], dense. Sums are made in sums, float32 [rows, dims], which is
    None where z_grad is float32.
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
        w, relative = weights_of_pairs(
            z_ptr, mu_ptr, logvar_ptr, joint_ptr, row, inside_row, component, inside_component, rows, dims,
            z_stride, z_step, mu_stride, mu_step, logvar_stride, logvar_step, own, following, of_own, of_joint,
            STRATIFIED, ROWS, COMPONENTS, DIMS, FAST,
        )  # fmt: skip
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
        w, relative = weights_of_pairs(
            z_ptr, mu_ptr, logvar_ptr, joint_ptr, row, inside_row, component, inside_component, rows, dims,
            z_stride, z_step, mu_stride, mu_step, logvar_stride, logvar_step, own, following, of_own, of_joint,
            STRATIFIED, ROWS, COMPONENTS, DIMS, FAST,
        )  # fmt: skip
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
