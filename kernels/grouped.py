"""The kernel for likelihoods whose elements have an axis of their own in the parameters, such as the components of a
mixture or the classes of a pixel.

A program holds the whole axis in registers. It reads the parameters once, and computes sums along the axis
(log-sum-exp) in registers. The formula is TERM, a Triton function of a tile of each kind of parameter. `groups.py`
launches this kernel.
"""

import triton
import triton.language as tl

from .elementwise import load_target, store_values
from .numerics import load_scalar
from .tiles import UNSPECIALIZED, drew_last_ticket, program_tile, sum_groups_in_order, sum_in_order
from .upstream import factor_of_slopes, in_elements, store_kl_gradient


@triton.jit(do_not_specialize=UNSPECIALIZED)
def grouped_kernel(
    parameters_ptr, target_ptr, kl_ptr, loss_ptr, reconstruction_ptr, mean_kl_ptr,
    loss_grad_ptr, reconstruction_grad_ptr, mean_kl_grad_ptr, gradient_ptr, kl_grad_ptr,
    partial_ptr, ticket_ptr, beta, weight, grad_scale,
    rows, chunks, elements, row_units, element_units, axis_units,
    target_row_units, target_element_units, target_axis_units,
    gradient_row_units, gradient_element_units, gradient_axis_units,
    kl_stride, loss_grad_stride, batch, scale,
    TERM: tl.constexpr, SETTINGS: tl.constexpr, UNIT: tl.constexpr, SLOTS: tl.constexpr, SIZE: tl.constexpr,
    TARGETS: tl.constexpr, TARGET_HAS_AXIS: tl.constexpr, SUMS: tl.constexpr, FLAT: tl.constexpr,
    ALIGNMENTS: tl.constexpr, ELEMENTS: tl.constexpr, INNER: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """With loss_ptr, the values of `elementwise.value_kernel`; with gradient_ptr, the gradient of grad_scale * loss. If
    there is no loss_ptr, the gradient is scale * weight * (loss_grad + reconstruction_grad) * slope.

    Shapes: the parameters are [rows, elements, SLOTS * SIZE] at any strides. TERM gets SLOTS tiles [ELEMENTS, INNER],
    of which the first SIZE columns are there, and the target: one such tile if TARGET_HAS_AXIS, else TARGETS columns
    [ELEMENTS, 1], of a target [rows, elements, TARGETS]. It returns a value [ELEMENTS, 1] and the slopes of each slot.
    The gradient has the parameters' shape. SUMS: "all" for one loss; "row" for one of each row, to which all of its
    chunks contribute; "element" for one of each element, where a sample has only one and FLAT makes them a row.
    ALIGNMENTS are those of the ten numbers in units.
    partial is float32 [programs], or None where a program makes a sum alone, and ticket int32 [1], zero.
    Bytes: parameters and target are read once, and the gradient is written once.
    Launches: 1 in each direction, and 1 for values and gradients together. Roundings: a term those of the likelihood,
    a gradient 5 more than a slope, the values 4 more and one per level of a sum. Deterministic: no floating-point
    atomics, partial sums are added in order.
    """
    if kl_grad_ptr is not None:
        store_kl_gradient(kl_grad_ptr, loss_ptr, loss_grad_ptr, mean_kl_grad_ptr, beta, grad_scale, scale, batch)

    row, first = program_tile(chunks, FLAT, 1, ELEMENTS)
    element = tl.arange(0, ELEMENTS)[:, None]
    place = tl.arange(0, INNER)[None, :]
    inside = element < in_elements(elements, tl.constexpr(ALIGNMENTS[0])) - first
    both = inside & (place < SIZE)
    wide_element, wide_place = (first + element).to(tl.int64), place.to(tl.int64)
    axis_stride = in_elements(axis_units, tl.constexpr(ALIGNMENTS[3]))
    at = row * in_elements(row_units, tl.constexpr(ALIGNMENTS[1]))
    at += wide_element * in_elements(element_units, tl.constexpr(ALIGNMENTS[2])) + wide_place * axis_stride
    slots = ()
    for k in tl.static_range(SLOTS):
        slot = tl.load(parameters_ptr + at + k * SIZE * axis_stride, mask=both, other=0.0)
        slots = slots + (slot.to(tl.float32),)  # noqa: RUF005 - Triton knows no *
    target_axis_stride = in_elements(target_axis_units, tl.constexpr(ALIGNMENTS[6]))
    at_target = target_ptr + row * in_elements(target_row_units, tl.constexpr(ALIGNMENTS[4]))
    at_target += wide_element * in_elements(target_element_units, tl.constexpr(ALIGNMENTS[5]))
    targets = ()
    if TARGET_HAS_AXIS:
        targets = targets + (load_target(at_target + wide_place * target_axis_stride, both, UNIT),)  # noqa: RUF005
    else:
        for k in tl.static_range(TARGETS):
            target = load_target(at_target + k * target_axis_stride, inside, UNIT)
            targets = targets + (target,)  # noqa: RUF005
    value, slopes = TERM(slots, targets, place, SIZE, SETTINGS, FAST)
    tl.static_assert(len(slopes) == SLOTS, "a term returns a slope for each slot")

    if gradient_ptr is not None:
        if loss_ptr is not None or SUMS == "all":
            factor = factor_of_slopes(loss_ptr, loss_grad_ptr, reconstruction_grad_ptr, weight, grad_scale, scale)
        elif SUMS == "row":
            factor = scale * tl.load(loss_grad_ptr + row * loss_grad_stride).to(tl.float32)
        else:
            loss_grad = tl.load(loss_grad_ptr + wide_element * loss_grad_stride, mask=inside, other=0.0)
            factor = scale * loss_grad.to(tl.float32)
        axis_stride = in_elements(gradient_axis_units, tl.constexpr(ALIGNMENTS[9]))
        at = row * in_elements(gradient_row_units, tl.constexpr(ALIGNMENTS[7]))
        at += wide_element * in_elements(gradient_element_units, tl.constexpr(ALIGNMENTS[8])) + wide_place * axis_stride
        for k in tl.static_range(SLOTS):
            gradient = (factor * slopes[k]).to(gradient_ptr.dtype.element_ty)
            tl.store(gradient_ptr + at + k * SIZE * axis_stride, gradient, mask=both)

    if loss_ptr is not None:
        if SUMS == "element":
            tl.store(loss_ptr + wide_element, value * scale, mask=inside)
        else:
            total = tl.sum(tl.where(inside, value, 0.0))
            if partial_ptr is None:
                if kl_ptr is not None:
                    store_values(
                        total, kl_ptr, loss_ptr, reconstruction_ptr, mean_kl_ptr, beta, load_scalar(weight) * scale,
                        kl_stride, batch, scale, 1024,
                    )  # fmt: skip
                elif SUMS == "row":
                    tl.store(loss_ptr + row, total * scale)
                else:
                    tl.store(loss_ptr, total * scale)
            else:
                tl.store(partial_ptr + tl.program_id(0), total)
                if drew_last_ticket(ticket_ptr):
                    if kl_ptr is not None:
                        total = sum_in_order(partial_ptr, tl.num_programs(0), 1, 1024)
                        store_values(
                            total, kl_ptr, loss_ptr, reconstruction_ptr, mean_kl_ptr, beta,
                            load_scalar(weight) * scale, kl_stride, batch, scale, 1024,
                        )  # fmt: skip
                    else:
                        groups = rows if SUMS == "row" else 1
                        count = tl.num_programs(0) // groups
                        sum_groups_in_order(partial_ptr, loss_ptr, groups, count, scale, GROUPS, BLOCK)
