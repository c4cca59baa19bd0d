"""Kernels of the log-density of a mixture of diagonal Gaussians, and of its gradients.

A program has a tile of rows of z and goes through components tile by tile, or the other way round. No pair of a row and
a component leaves the registers: backward computes each term again. Differences are formed as differences, scaled, and
then squared, because e^-logvar may overflow where the square does not.
"""

import triton
import triton.language as tl

from .log_sum_exp import joined, shift, store_value
from .numerics import exp, exp_half, product
from .tiles import UNSPECIALIZED, drew_last_ticket

# What the last program, or each where there is one split, adds up at a time: 8 numbers for each thread of 4 warps.
AT_ONCE = tl.constexpr(1024)
NUMBERS = (*UNSPECIALIZED, "components", "tiles", "parts", "weights_stride", "value_grad_stride")


@triton.jit
def differences(
    z_ptr, mu_ptr, logvar_ptr, row, inside_row, component, inside_component, start, dims,
    z_stride, z_step, mu_stride, mu_step, logvar_stride, logvar_step,
    DIMS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """r = (z - mu) e^(-logvar / 2) [rows, components, DIMS], e^(-logvar / 2) and logvar, of dimensions from `start`."""
    dim = start + tl.arange(0, DIMS)
    column = dim.to(tl.int64)[None, :]
    inside = (dim < dims)[None, :]
    inside_rows, inside_components = inside_row[:, None] & inside, inside_component[:, None] & inside
    row, component = row.to(tl.int64)[:, None], component.to(tl.int64)[:, None]
    z = tl.load(z_ptr + row * z_stride + column * z_step, mask=inside_rows, other=0.0)
    mu = tl.load(mu_ptr + component * mu_stride + column * mu_step, mask=inside_components, other=0.0)
    at = logvar_ptr + component * logvar_stride + column * logvar_step
    logvar = tl.load(at, mask=inside_components, other=0.0).to(tl.float32)
    z, mu = z.to(tl.float32), mu.to(tl.float32)
    scale = exp_half(-logvar, FAST)
    return (z[:, None, :] - mu[None, :, :]) * scale[None, :, :], scale, logvar


@triton.jit
def log_terms(
    z_ptr, mu_ptr, logvar_ptr, log_weights_ptr, row, inside_row, component, inside_component, dims,
    z_stride, z_step, mu_stride, mu_step, logvar_stride, logvar_step, weights_stride,
    ROWS: tl.constexpr, COMPONENTS: tl.constexpr, DIMS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """log_weights - sum_k (r^2 + logvar) / 2, [ROWS, COMPONENTS], without the constant that all pairs share."""
    squares = tl.zeros([ROWS, COMPONENTS, DIMS], tl.float32)
    spread = tl.zeros([COMPONENTS, DIMS], tl.float32)
    start = 0
    while start < dims:
        r, _, logvar = differences(
            z_ptr, mu_ptr, logvar_ptr, row, inside_row, component, inside_component, start, dims,
            z_stride, z_step, mu_stride, mu_step, logvar_stride, logvar_step, DIMS, FAST,
        )  # fmt: skip
        squares += r * r
        spread += logvar
        start += DIMS
    terms = -0.5 * (tl.sum(squares, axis=2) + tl.sum(spread, axis=1)[None, :])
    if log_weights_ptr is not None:
        at = log_weights_ptr + component.to(tl.int64) * weights_stride
        terms += tl.load(at, mask=inside_component, other=0.0).to(tl.float32)[None, :]
    return tl.where(inside_component[None, :], terms, -float("inf"))


@triton.jit(do_not_specialize=NUMBERS)
def mixture_kernel(
    z_ptr, mu_ptr, logvar_ptr, log_weights_ptr, value_ptr, part_ptr, ticket_ptr,
    rows, components, dims, z_stride, z_step, mu_stride, mu_step, logvar_stride, logvar_step, weights_stride,
    tiles, parts, constant,
    ROWS: tl.constexpr, COMPONENTS: tl.constexpr, DIMS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """value_b = constant + log sum_n exp(log_weights_n - sum_k ((z_bk - mu_nk)^2 exp(-logvar_nk) + logvar_nk) / 2).

    Shapes: z [rows, dims], mu and logvar [components, dims], log_weights [components] (None: 0), at any strides; value
    float32 [rows]. A program has a tile of rows and one of `parts` of the components, so many `tiles` of them. With
    several parts, part is float32 [2, parts, rows] and ticket int32 [1], zero.
    Bytes: z is read once for each tile of components and the components once for each tile of rows; 4 a row are
    written, and 16 for each of several parts.
    Launches: 1. Roundings of a term: 13 of r^2, and one per dimension; of the value 7 more, and those of a sum.
    Deterministic: no floating-point atomics, parts are joined in order.
    """
    program, per_tile = tl.program_id(0).to(tl.uint32), tl.cast(parts, tl.uint32)
    row = (program // per_tile).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    part = (program % per_tile).to(tl.int64)
    inside_row = row < rows
    m = tl.full([ROWS], -float("inf"), tl.float32)
    s = tl.zeros([ROWS], tl.float32)
    begin = part * tiles * COMPONENTS
    last = begin + tl.cast(tiles, tl.int64) * COMPONENTS
    first = begin
    while (first < last) & (first < components):
        component = first + tl.arange(0, COMPONENTS)
        terms = log_terms(
            z_ptr, mu_ptr, logvar_ptr, log_weights_ptr, row, inside_row, component, component < components, dims,
            z_stride, z_step, mu_stride, mu_step, logvar_stride, logvar_step, weights_stride,
            ROWS, COMPONENTS, DIMS, FAST,
        )  # fmt: skip
        most = tl.max(terms, axis=1)
        m, s = joined(m, s, most, tl.sum(exp(terms - shift(most)[:, None], FAST), axis=1), FAST)
        first += COMPONENTS
    store_value(m, s, value_ptr, part_ptr, ticket_ptr, row, inside_row, rows, part, parts, constant, FAST)


@triton.jit
def add_to(ptr, index, inside, dim, dims, values, has_sums):
    """ptr[index, dim] += values, in float32 [.., dims]; = values where there are no sums yet."""
    at = ptr + index[:, None] * dims + dim[None, :]
    mask = inside[:, None] & (dim < dims)[None, :]
    there = (mask & has_sums) != 0  # on the interpreter, what is not of one shape becomes a number
    # .cg, because other threads of this program may have stored them
    values += tl.load(at, mask=there, other=0.0, cache_modifier=".cg")
    tl.store(at, values, mask=mask)


@triton.jit
def add_parts(part_ptr, sums_ptr, start, end, parts, part_size):
    """sums[start:end] = the sums over parts [parts, part_size], in order, in the dtype of sums."""
    while start < end:
        index = start + tl.arange(0, AT_ONCE)
        inside = index < end
        total = tl.zeros([AT_ONCE], tl.float32)
        part = 0
        while part < parts:
            at = part_ptr + tl.cast(part, tl.int64) * part_size + index
            total += tl.load(at, mask=inside, other=0.0, cache_modifier=".cg")
            part += 1
        tl.store(sums_ptr + index, total.to(sums_ptr.dtype.element_ty), mask=inside)
        start += AT_ONCE


@triton.jit
def weights_of(terms, value_ptr, value_grad_ptr, row, inside_row, value_grad_stride, constant, FAST: tl.constexpr):
    """value_grad * exp(term - value), [rows, components]: 0 in a row whose terms are all -infinity."""
    value = tl.load(value_ptr + row, mask=inside_row, other=0.0)
    value = tl.where(value == -float("inf"), 0.0, value - constant)
    value_grad = tl.load(value_grad_ptr + row * value_grad_stride, mask=inside_row, other=0.0).to(tl.float32)
    return value_grad[:, None] * exp(terms - value[:, None], FAST)


@triton.jit(do_not_specialize=NUMBERS)
def mixture_rows_kernel(
    z_ptr, mu_ptr, logvar_ptr, log_weights_ptr, value_ptr, value_grad_ptr, z_grad_ptr, part_ptr, ticket_ptr,
    rows, components, dims, z_stride, z_step, mu_stride, mu_step, logvar_stride, logvar_step, weights_stride,
    value_grad_stride, tiles, parts, constant,
    ROWS: tl.constexpr, COMPONENTS: tl.constexpr, DIMS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """z_grad_bk = -sum_n w_bn r_bnk exp(-logvar_nk / 2), w_bn = value_grad_b exp(term_bn - value_b).

    Shapes: as in `mixture_kernel`; value_grad [rows] at a distance, z_grad [rows, dims], dense. Sums are made in part
    float32 [parts, rows, dims] and then added; where z_grad is float32 and there is one part, they are made in z_grad
    itself and part is None. ticket int32 [1], zero, where there are several parts.
    Bytes: those of a term twice, and of the sums 8 for each tile of components after the first, 12 for each part.
    Launches: 1. Roundings: as of the value, in units of a weighted term. Deterministic.
    """
    program, per_tile = tl.program_id(0).to(tl.uint32), tl.cast(parts, tl.uint32)
    first_row = (program // per_tile).to(tl.int64) * ROWS
    row = first_row + tl.arange(0, ROWS)
    part = (program % per_tile).to(tl.int64)
    inside_row = row < rows
    part_size = tl.cast(rows, tl.int64) * dims
    if part_ptr is None:
        sums_ptr = z_grad_ptr
    else:
        sums_ptr = part_ptr + part * part_size
    begin = part * tiles * COMPONENTS
    last = begin + tl.cast(tiles, tl.int64) * COMPONENTS
    first = begin
    while (first < last) & (first < components):
        component = first + tl.arange(0, COMPONENTS)
        inside_component = component < components
        terms = log_terms(
            z_ptr, mu_ptr, logvar_ptr, log_weights_ptr, row, inside_row, component, inside_component, dims,
            z_stride, z_step, mu_stride, mu_step, logvar_stride, logvar_step, weights_stride,
            ROWS, COMPONENTS, DIMS, FAST,
        )  # fmt: skip
        w = weights_of(terms, value_ptr, value_grad_ptr, row, inside_row, value_grad_stride, constant, FAST)
        start = 0
        while start < dims:
            r, scale, _ = differences(
                z_ptr, mu_ptr, logvar_ptr, row, inside_row, component, inside_component, start, dims,
                z_stride, z_step, mu_stride, mu_step, logvar_stride, logvar_step, DIMS, FAST,
            )  # fmt: skip
            # 0 times infinity would be NaN.
            weighted = tl.where(w[:, :, None] == 0.0, 0.0, w[:, :, None] * r)
            slope = -tl.sum(product(weighted, scale[None, :, :]), axis=1)
            add_to(sums_ptr, row, inside_row, start + tl.arange(0, DIMS), dims, slope, first > begin)
            start += DIMS
        tl.debug_barrier()  # the next sums are read by other threads
        first += COMPONENTS
    if part_ptr is not None:
        if ticket_ptr is None:
            end = tl.minimum(first_row + ROWS, rows) * dims
            add_parts(part_ptr, z_grad_ptr, first_row * dims, end, 1, part_size)
        elif drew_last_ticket(ticket_ptr):
            add_parts(part_ptr, z_grad_ptr, tl.zeros([], tl.int64), part_size, parts, part_size)


@triton.jit(do_not_specialize=NUMBERS)
def mixture_components_kernel(
    z_ptr, mu_ptr, logvar_ptr, log_weights_ptr, value_ptr, value_grad_ptr, mu_grad_ptr, logvar_grad_ptr,
    weights_grad_ptr, mu_part_ptr, logvar_part_ptr, weights_part_ptr, ticket_ptr,
    rows, components, dims, z_stride, z_step, mu_stride, mu_step, logvar_stride, logvar_step, weights_stride,
    value_grad_stride, tiles, parts, constant,
    NEEDS_SLOPES: tl.constexpr, ROWS: tl.constexpr, COMPONENTS: tl.constexpr, DIMS: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """mu_grad_nk = sum_b w_bn r_bnk exp(-logvar_nk / 2), logvar_grad_nk = sum_b w_bn (r_bnk^2 - 1) / 2, and
    weights_grad_n = sum_b w_bn, w as in `mixture_rows_kernel`.

    Shapes: as there, with the roles of rows and components exchanged: a program has a tile of components and one of
    `parts` of the rows. mu_grad and logvar_grad [components, dims] and weights_grad [components], dense; parts float32
    [parts, ...] of them. A gradient that nobody needs is None, and so are its parts; NEEDS_SLOPES says that one of the
    first two is needed.
    Bytes, launches, roundings: as there. Deterministic.
    """
    program, per_tile = tl.program_id(0).to(tl.uint32), tl.cast(parts, tl.uint32)
    first_component = (program // per_tile).to(tl.int64) * COMPONENTS
    component = first_component + tl.arange(0, COMPONENTS)
    part = (program % per_tile).to(tl.int64)
    inside_component = component < components
    part_size = tl.cast(components, tl.int64) * dims
    begin = part * tiles * ROWS
    last = begin + tl.cast(tiles, tl.int64) * ROWS
    first = begin
    total = tl.zeros([COMPONENTS], tl.float32)
    while (first < last) & (first < rows):
        row = first + tl.arange(0, ROWS)
        inside_row = row < rows
        terms = log_terms(
            z_ptr, mu_ptr, logvar_ptr, log_weights_ptr, row, inside_row, component, inside_component, dims,
            z_stride, z_step, mu_stride, mu_step, logvar_stride, logvar_step, weights_stride,
            ROWS, COMPONENTS, DIMS, FAST,
        )  # fmt: skip
        w = weights_of(terms, value_ptr, value_grad_ptr, row, inside_row, value_grad_stride, constant, FAST)
        w = tl.where(inside_row[:, None], w, 0.0)
        own = tl.sum(w, axis=0)
        total += own
        start = 0
        while (start < dims) & NEEDS_SLOPES:
            r, scale, _ = differences(
                z_ptr, mu_ptr, logvar_ptr, row, inside_row, component, inside_component, start, dims,
                z_stride, z_step, mu_stride, mu_step, logvar_stride, logvar_step, DIMS, FAST,
            )  # fmt: skip
            dim = start + tl.arange(0, DIMS)
            r = tl.where(w[:, :, None] == 0.0, 0.0, r)  # 0 times infinity would be NaN
            weighted = product(w[:, :, None], r)
            if mu_grad_ptr is not None:
                slope = tl.sum(weighted, axis=0) * scale
                add_to(mu_part_ptr + part * part_size, component, inside_component, dim, dims, slope, first > begin)
            if logvar_grad_ptr is not None:
                slope = 0.5 * (tl.sum(product(weighted, r), axis=0) - own[:, None])
                add_to(logvar_part_ptr + part * part_size, component, inside_component, dim, dims, slope, first > begin)
            start += DIMS
        tl.debug_barrier()  # the next sums are read by other threads
        first += ROWS
    if weights_grad_ptr is not None:
        tl.store(weights_part_ptr + part * components + component, total, mask=inside_component)
        tl.debug_barrier()
    if ticket_ptr is None:
        start, end = first_component, tl.minimum(first_component + COMPONENTS, components)
        add_all(
            mu_part_ptr, logvar_part_ptr, weights_part_ptr, mu_grad_ptr, logvar_grad_ptr, weights_grad_ptr,
            start, end, dims, 1, components,
        )  # fmt: skip
    elif drew_last_ticket(ticket_ptr):
        add_all(
            mu_part_ptr, logvar_part_ptr, weights_part_ptr, mu_grad_ptr, logvar_grad_ptr, weights_grad_ptr,
            tl.zeros([], tl.int64), tl.cast(components, tl.int64), dims, parts, components,
        )  # fmt: skip


@triton.jit
def add_all(
    mu_part_ptr, logvar_part_ptr, weights_part_ptr, mu_grad_ptr, logvar_grad_ptr, weights_grad_ptr,
    start, end, dims, parts, components,
):  # fmt: skip
    """`add_parts` of the gradients of components from start to end that are needed."""
    size = tl.cast(components, tl.int64) * dims
    if mu_grad_ptr is not None:
        add_parts(mu_part_ptr, mu_grad_ptr, start * dims, end * dims, parts, size)
    if logvar_grad_ptr is not None:
        add_parts(logvar_part_ptr, logvar_grad_ptr, start * dims, end * dims, parts, size)
    if weights_grad_ptr is not None:
        add_parts(weights_part_ptr, weights_grad_ptr, start, end, parts, tl.cast(components, tl.int64))
