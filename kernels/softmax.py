"""The kernels of softmax over rows that are too long for one program. They compute the sums of a row first, with
several programs if there are few rows, and then the gradient of each number. `long_rows.py` launches them.

Let m = max l, o the sum of e^(l - m) over all logits except one of the greatest, T = sum t and D = sum_k t_k (m - l_k).
The value of a row is T log1p(o) + D, where no part is negative, and the slopes are T e^(l_k - m) / (1 + o) - t_k. The
four numbers of a row follow from the four numbers of two parts of it.
"""

import triton
import triton.language as tl

from .elementwise import load_target, store_values
from .numerics import exp, load_scalar, product, reciprocal
from .special import log1p
from .tiles import UNSPECIALIZED, drew_last_ticket, sum_groups_in_order, sum_in_order
from .upstream import factor_of_slopes, in_elements, store_kl_gradient

# The last program joins the parts of so many rows at a time, one for each of its threads.
ROWS_AT_ONCE = tl.constexpr(256)
NUMBERS = (*UNSPECIALIZED, "elements", "class_units", "blocks", "parts", "batch_units", "element_units",
           "target_batch_units", "target_element_units", "gradient_batch_units", "gradient_element_units")  # fmt: skip


@triton.jit
def joined(m, o, t, d, other_m, other_o, other_t, other_d, FAST: tl.constexpr):
    """(m, o, T, D) of two parts. A part without numbers has m = -infinity, and 0 in the others."""
    most = tl.maximum(m, other_m)
    # A difference of equal infinities would be NaN.
    down, other_down = tl.where(m == most, 0.0, most - m), tl.where(other_m == most, 0.0, most - other_m)
    of_first = tl.where(m == most, o, (o + 1.0) * exp(-down, FAST))
    of_other = tl.where(other_m == most, other_o, (other_o + 1.0) * exp(-other_down, FAST))
    # Of two that are greatest, one is not counted. Where all is -infinity, everything of it is NaN.
    of_both = tl.where((m == most) & (other_m == most), 1.0, 0.0)
    d += t * tl.where(t == 0.0, 0.0, down)
    other_d += other_t * tl.where(other_t == 0.0, 0.0, other_down)
    return most, of_first + of_other + of_both, t + other_t, d + other_d


@triton.jit(do_not_specialize=NUMBERS)
def row_sums_kernel(
    logits_ptr, target_ptr, part_ptr, row_ptr, value_ptr, ticket_ptr,
    kl_ptr, loss_ptr, reconstruction_ptr, mean_kl_ptr, kl_grad_ptr, beta, weight, grad_scale,
    rows, elements, class_units, blocks, parts, batch_units, element_units,
    target_batch_units, target_element_units, kl_stride, batch, scale,
    TARGET_HAS_AXIS: tl.constexpr, SUMS: tl.constexpr, ALIGNMENT: tl.constexpr, COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The values of `elementwise.value_kernel`, and what `row_gradient_kernel` needs of each row: (m, T / (1 + o)).

    Shapes: a row is one of `elements` of a sample, at any strides; its classes are neighbours, as are the target's if
    TARGET_HAS_AXIS; else the target is the number of a class. A program has one of `parts` of a row, so many blocks of
    COLUMNS. Units are of ALIGNMENT elements, those of a target of classes of one. part is float32 [4, rows * parts],
    row float32 [2, rows], value float32 [rows], ticket int32 [1], zero. SUMS is as in `grouped_kernel`. Where only
    gradients are wanted, value and loss are None.
    Bytes per float32 element: reads 8 (5 with a uint8 target, 4 where it is a class), writes 0; and 32 a part, 16 a
    row.
    Launches: 1. Roundings: as in `grouped_kernel`, one more for each level of a sum. Deterministic: no floating-point
    atomics, the parts of a row are joined in order.
    """
    if kl_grad_ptr is not None:
        store_kl_gradient(kl_grad_ptr, loss_ptr, None, None, beta, grad_scale, scale, batch)

    program = tl.program_id(0).to(tl.uint32)
    row = (program // tl.cast(parts, tl.uint32)).to(tl.int64)
    block = (program % tl.cast(parts, tl.uint32)).to(tl.int64) * blocks
    last_block = block + blocks
    classes = in_elements(class_units, ALIGNMENT)
    sample, element = row // elements, row % elements
    logits = logits_ptr + sample * in_elements(batch_units, ALIGNMENT) + element * in_elements(element_units, ALIGNMENT)
    own_class = tl.zeros([], tl.int64)
    if TARGET_HAS_AXIS:
        targets = target_ptr + sample * in_elements(target_batch_units, ALIGNMENT)
        targets += element * in_elements(target_element_units, ALIGNMENT)
    else:
        own_class += tl.load(target_ptr + sample * target_batch_units + element * target_element_units).to(tl.int64)
    place = tl.arange(0, COLUMNS)
    m = tl.full([], -float("inf"), tl.float32)
    o, t, d = tl.zeros([], tl.float32), tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    while (block < last_block) & (block * COLUMNS < classes):
        start = block * COLUMNS
        inside = place < classes - start
        logit = tl.load(logits + start + place, mask=inside, other=-float("inf")).to(tl.float32)
        block_m = tl.max(logit)
        greatest = inside & (logit == block_m)
        block_o = tl.sum(tl.where(greatest, 0.0, exp(logit - block_m, FAST))) + (tl.sum(greatest.to(tl.float32)) - 1.0)
        below = tl.where(inside, block_m - logit, 0.0)
        if TARGET_HAS_AXIS:
            target = load_target(targets + start + place, inside, False)
            block_t, block_d = tl.sum(target), tl.sum(product(target, below))
        else:
            hit = inside & (start + place == own_class)
            block_t, block_d = tl.sum(hit.to(tl.float32)), tl.sum(tl.where(hit, below, 0.0))
        m, o, t, d = joined(m, o, t, d, block_m, block_o, block_t, block_d, FAST)
        block += 1
    count = tl.num_programs(0)
    at = part_ptr + tl.program_id(0)
    tl.store(at, m)
    tl.store(at + count, o)
    tl.store(at + 2 * count, t)
    tl.store(at + 3 * count, d)

    if drew_last_ticket(ticket_ptr):
        first = 0
        while first < rows:
            own = first + tl.arange(0, ROWS_AT_ONCE)
            there = own < rows
            all_m = tl.full([ROWS_AT_ONCE], -float("inf"), tl.float32)
            all_o = tl.zeros([ROWS_AT_ONCE], tl.float32)
            all_t, all_d = all_o, all_o
            part = 0
            while part < parts:
                own_part = part_ptr + own.to(tl.int64) * parts + part
                # .cg as in `tiles.sum_in_order`
                part_m = tl.load(own_part, mask=there, other=0.0, cache_modifier=".cg")
                part_o = tl.load(own_part + count, mask=there, other=0.0, cache_modifier=".cg")
                part_t = tl.load(own_part + 2 * count, mask=there, other=0.0, cache_modifier=".cg")
                part_d = tl.load(own_part + 3 * count, mask=there, other=0.0, cache_modifier=".cg")
                all_m, all_o, all_t, all_d = joined(all_m, all_o, all_t, all_d, part_m, part_o, part_t, part_d, FAST)
                part += 1
            if row_ptr is not None:
                tl.store(row_ptr + own, all_m, mask=there)
                share = reciprocal(1.0 + all_o, FAST)
                if TARGET_HAS_AXIS:
                    share = all_t * share
                tl.store(row_ptr + rows + own, share, mask=there)
            if loss_ptr is not None:
                value = all_t * log1p(all_o, FAST) + all_d
                if not TARGET_HAS_AXIS:
                    value = tl.where(all_t == 1.0, value, float("nan"))  # else there is no such class
                if SUMS == "element":
                    tl.store(loss_ptr + own, value * scale, mask=there)
                else:
                    tl.store(value_ptr + own, value, mask=there)
            first += ROWS_AT_ONCE
        if loss_ptr is not None and SUMS != "element":
            tl.debug_barrier()  # other threads read what this one has stored
            if kl_ptr is not None:
                total = sum_in_order(value_ptr, rows, 1, 1024)
                store_values(
                    total, kl_ptr, loss_ptr, reconstruction_ptr, mean_kl_ptr, beta, load_scalar(weight) * scale,
                    kl_stride, batch, scale, 1024,
                )  # fmt: skip
            else:
                groups = batch if SUMS == "row" else 1
                sum_groups_in_order(value_ptr, loss_ptr, groups, rows // groups, scale, GROUPS, BLOCK)


@triton.jit(do_not_specialize=NUMBERS)
def row_gradient_kernel(
    logits_ptr, target_ptr, row_ptr, gradient_ptr,
    loss_ptr, loss_grad_ptr, reconstruction_grad_ptr, mean_kl_grad_ptr, kl_grad_ptr, beta, weight, grad_scale,
    rows, elements, class_units, chunks, batch_units, element_units, target_batch_units, target_element_units,
    gradient_batch_units, gradient_element_units, loss_grad_stride, batch, scale,
    TARGET_HAS_AXIS: tl.constexpr, SUMS: tl.constexpr, ALIGNMENT: tl.constexpr, COLUMNS: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """scale * weight * (loss_grad + reconstruction_grad) * slope, or, with loss_ptr, the gradient of grad_scale * loss.

    Shapes: as in `row_sums_kernel`, which has made row. A program has one of `chunks` of a row.
    Bytes per float32 element: reads 8 (5 with a uint8 target, 4 where it is a class), writes 4.
    Launches: 1. Roundings: as in `grouped_kernel`. Deterministic.
    """
    if kl_grad_ptr is not None:
        store_kl_gradient(kl_grad_ptr, loss_ptr, loss_grad_ptr, mean_kl_grad_ptr, beta, grad_scale, scale, batch)

    program = tl.program_id(0).to(tl.uint32)
    row = (program // tl.cast(chunks, tl.uint32)).to(tl.int64)
    place = (program % tl.cast(chunks, tl.uint32)).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    sample, element = row // elements, row % elements
    inside = place < in_elements(class_units, ALIGNMENT)
    m, share = tl.load(row_ptr + row), tl.load(row_ptr + rows + row)
    logits = logits_ptr + sample * in_elements(batch_units, ALIGNMENT) + element * in_elements(element_units, ALIGNMENT)
    logit = tl.load(logits + place, mask=inside, other=0.0).to(tl.float32)
    if TARGET_HAS_AXIS:
        targets = target_ptr + sample * in_elements(target_batch_units, ALIGNMENT)
        targets += element * in_elements(target_element_units, ALIGNMENT)
        target = load_target(targets + place, inside, False)
    else:
        own_class = tl.load(target_ptr + sample * target_batch_units + element * target_element_units)
        target = tl.where(place == own_class.to(tl.int64), 1.0, 0.0)
    if loss_ptr is not None or SUMS == "all":
        factor = factor_of_slopes(loss_ptr, loss_grad_ptr, reconstruction_grad_ptr, weight, grad_scale, scale)
    else:
        factor = scale * tl.load(loss_grad_ptr + sample * loss_grad_stride).to(tl.float32)
    gradient = factor * (share * exp(logit - m, FAST) - target)
    gradients = gradient_ptr + sample * in_elements(gradient_batch_units, ALIGNMENT)
    gradients += element * in_elements(gradient_element_units, ALIGNMENT)
    tl.store(gradients + place, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)
