"""Kernels of the negative evidence lower bound: the sum of a reconstruction loss and a weighted divergence, and the
gradients of both.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Plan, launch, make_plan, ticket
from .layout import dense_strides, in_format_of, remembered
from .numerics import load_scalar
from .reconstruction import Rows, load_target, read_pair, rows_of, sigmoid_mse
from .tiles import UNSPECIALIZED, Tiling, drew_last_ticket, program_tile, sum_in_order, tile_offsets

# Of the gradient of kl, one number that each program writes to as many samples: one store of a thread of 4 warps.
KL_PER_PROGRAM = tl.constexpr(128)


@triton.jit
def store_values(
    total, kl_ptr, loss_ptr, reconstruction_ptr, mean_kl_ptr, beta, weight, kl_stride, batch, inverse_batch,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The three values from the sum of squared errors; `weight` is already divided by the batch."""
    reconstruction = weight * total
    mean_kl = sum_in_order(kl_ptr, batch, kl_stride, BLOCK) * inverse_batch
    kl_weight = load_scalar(beta)
    tl.store(reconstruction_ptr, reconstruction)
    tl.store(mean_kl_ptr, mean_kl)
    tl.store(loss_ptr, tl.fma(kl_weight, mean_kl, reconstruction))


@triton.jit
def store_share(values_ptr, number, count, PER_PROGRAM: tl.constexpr):
    """values[:count] = number, where each program stores PER_PROGRAM of them."""
    index = tl.program_id(0).to(tl.int64) * PER_PROGRAM + tl.arange(0, PER_PROGRAM)
    tl.store(values_ptr + index, number.to(values_ptr.dtype.element_ty), mask=index < count)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def elbo_forward_kernel(
    logits_ptr, target_ptr, kl_ptr, loss_ptr, reconstruction_ptr, mean_kl_ptr, logits_grad_ptr, kl_grad_ptr,
    partial_ptr, ticket_ptr, beta, reconstruction_weight, grad_scale,
    rows, columns, row_stride, chunks, kl_stride, batch, inverse_batch,
    FLAT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """reconstruction = weight / B * sum (sigmoid(logits) - target)^2, mean_kl = sum kl / B, loss = reconstruction +
    beta * mean_kl.

    Unless logits_grad_ptr is None, also the gradients of loss times grad_scale: logits_grad = 2 * weight / B * (y -
    target) * y * (1 - y) with y = sigmoid(logits), and kl_grad = beta / B, one number written to all samples.
    Shapes: logits and target [rows, columns] at distance row_stride, logits_grad dense; kl [batch] at distance
    kl_stride, kl_grad dense; everything else []. beta, reconstruction_weight and grad_scale are numbers or pointers
    to one. Where there is more than one program, partial is float32 [programs] and ticket int32 [1], zero.
    Bytes per float32 element: reads 8 (5 with a uint8 target), writes 4 (0 without gradients); 8 more per program for
    partial sums, 4 per sample for kl, and 4 for its gradient.
    Launches: 1. Roundings: a term 20, a gradient 28, the values 4 more and one per level of a sum.
    Deterministic: no floating-point atomics, partial sums are added in order.
    """
    if kl_grad_ptr is not None:
        kl_grad = load_scalar(beta) * inverse_batch * load_scalar(grad_scale)
        store_share(kl_grad_ptr, kl_grad, batch, KL_PER_PROGRAM)

    first_row, first_column = program_tile(chunks, FLAT, ROWS, COLUMNS)
    row = tl.arange(0, ROWS)
    inside = (row < rows - first_row)[:, None] & (tl.arange(0, COLUMNS) < columns - first_column)[None, :]
    base = first_row * row_stride + first_column
    offsets = tile_offsets(row_stride, ROWS, COLUMNS)
    logits = tl.load(logits_ptr + base + offsets, mask=inside, other=0.0).to(tl.float32)
    error, slope = sigmoid_mse(logits, load_target(target_ptr + base + offsets, inside), FAST)
    total = tl.sum(tl.where(inside, error * error, 0.0))
    weight = load_scalar(reconstruction_weight) * inverse_batch

    if logits_grad_ptr is not None:
        grad = (2.0 * weight * load_scalar(grad_scale)) * (error * slope)
        result = first_row * columns + first_column
        result_offsets = tile_offsets(columns, ROWS, COLUMNS)
        tl.store(logits_grad_ptr + result + result_offsets, grad.to(logits_grad_ptr.dtype.element_ty), mask=inside)

    if partial_ptr is None:
        store_values(
            total, kl_ptr, loss_ptr, reconstruction_ptr, mean_kl_ptr, beta, weight, kl_stride, batch, inverse_batch,
            BLOCK,
        )  # fmt: skip
    else:
        tl.store(partial_ptr + tl.program_id(0), total)
        if drew_last_ticket(ticket_ptr):
            total = sum_in_order(partial_ptr, tl.num_programs(0), 1, BLOCK)
            store_values(
                total, kl_ptr, loss_ptr, reconstruction_ptr, mean_kl_ptr, beta, weight, kl_stride, batch,
                inverse_batch, BLOCK,
            )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def elbo_backward_kernel(
    logits_ptr, target_ptr, loss_grad_ptr, reconstruction_grad_ptr, mean_kl_grad_ptr,
    logits_grad_ptr, target_grad_ptr, kl_grad_ptr, beta, reconstruction_weight,
    rows, columns, row_stride, chunks, batch, inverse_batch,
    FLAT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """With g = (loss_grad + reconstruction_grad) * weight / B: logits_grad = 2 * g * (y - target) * y * (1 - y) with
    y = sigmoid(logits), and target_grad = -2 * g * (y - target); kl_grad = (beta * loss_grad + mean_kl_grad) / B, one
    number written to all samples.

    Shapes: logits and target [rows, columns] at distance row_stride, their gradients dense; kl_grad [batch]; everything
    else []. A missing upstream gradient is None and counts as 0; a gradient nobody needs is None and is not
    computed.
    Bytes per float32 element: reads 8 (5 with a uint8 target), writes 4 (8 with both gradients); 4 more per sample
    for kl_grad. Launches: 1.
    Roundings: 28. Deterministic.
    """
    if kl_grad_ptr is not None:
        mean_kl_grad = 0.0
        if mean_kl_grad_ptr is not None:
            mean_kl_grad += tl.load(mean_kl_grad_ptr)
        if loss_grad_ptr is not None:
            mean_kl_grad += load_scalar(beta) * tl.load(loss_grad_ptr)
        store_share(kl_grad_ptr, mean_kl_grad * inverse_batch, batch, KL_PER_PROGRAM)

    if logits_grad_ptr is not None or target_grad_ptr is not None:
        reconstruction_grad = 0.0
        if reconstruction_grad_ptr is not None:
            reconstruction_grad += tl.load(reconstruction_grad_ptr)
        if loss_grad_ptr is not None:
            reconstruction_grad += tl.load(loss_grad_ptr)
        first_row, first_column = program_tile(chunks, FLAT, ROWS, COLUMNS)
        row = tl.arange(0, ROWS)
        inside = (row < rows - first_row)[:, None] & (tl.arange(0, COLUMNS) < columns - first_column)[None, :]
        base = first_row * row_stride + first_column
        offsets = tile_offsets(row_stride, ROWS, COLUMNS)
        result = first_row * columns + first_column
        result_offsets = tile_offsets(columns, ROWS, COLUMNS)
        logits = tl.load(logits_ptr + base + offsets, mask=inside, other=0.0).to(tl.float32)
        error, slope = sigmoid_mse(logits, load_target(target_ptr + base + offsets, inside), FAST)
        error_grad = (2.0 * reconstruction_grad * load_scalar(reconstruction_weight) * inverse_batch) * error
        if logits_grad_ptr is not None:
            grad = (error_grad * slope).to(logits_grad_ptr.dtype.element_ty)
            tl.store(logits_grad_ptr + result + result_offsets, grad, mask=inside)
        if target_grad_ptr is not None:
            grad = (-error_grad).to(target_grad_ptr.dtype.element_ty)
            tl.store(target_grad_ptr + result + result_offsets, grad, mask=inside)


Scalar = float | Tensor


def allocate_values(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """loss, reconstruction and mean_kl: three tensors, because views of one buffer could not be modified in place by
    the user.
    """
    return tuple(logits.new_empty([], dtype=torch.float32) for _ in range(3))


def programs_of_kl(batch: int) -> int:
    return -(-batch // KL_PER_PROGRAM.value)


def programs(tiling: Tiling, batch: int) -> int:
    """Enough for every tile, and for the gradient of kl of every sample. What is beyond the tiles is masked out."""
    return max(tiling.programs, programs_of_kl(batch))


@remembered
def plan_forward(rows: Rows, kl_stride: int) -> Plan:
    tiling = rows.cut(per_row=False)
    return make_plan(
        programs(tiling, rows.batch),
        tiling.num_warps,
        tiling.rows,
        tiling.columns,
        rows.stride,
        tiling.chunks,
        kl_stride,
        rows.batch,
        1.0 / rows.batch,
        FLAT=tiling.rows == 1,
        ROWS=tiling.tile_rows,
        COLUMNS=tiling.tile_columns,
        BLOCK=1024,
    )


def elbo_forward(
    logits: Tensor,
    target: Tensor,
    kl: Tensor,
    beta: Scalar,
    reconstruction_weight: Scalar,
    grad_scale: Scalar,
    logits_grad: Tensor | None,
    kl_grad: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The three values; and the gradients, where tensors are given for them."""
    values = allocate_values(logits)
    batch = logits.shape[0]
    if batch == 0:
        for value in values:
            value.fill_(float("nan"))
        return values
    logits, target = read_pair(logits, target)
    kl = kl.resolve_neg()
    plan = plan_forward(rows_of(logits), kl.stride(0))
    several = plan.programs > 1
    launch(
        elbo_forward_kernel,
        plan,
        logits.device,
        logits,
        target,
        kl,
        *values,
        logits_grad,
        kl_grad,
        values[0].new_empty(plan.programs) if several else None,
        ticket(logits.device) if several else None,
        as_argument(beta),
        as_argument(reconstruction_weight),
        as_argument(grad_scale),
    )
    return values


def as_argument(scalar: Scalar) -> Scalar:
    """A kernel argument: an integer would be compiled into the kernel, a float is not."""
    return scalar.resolve_neg() if isinstance(scalar, Tensor) else float(scalar)


def elbo_loss(
    logits: Tensor, target: Tensor, kl: Tensor, beta: Scalar, reconstruction_weight: Scalar
) -> tuple[Tensor, Tensor, Tensor]:
    return elbo_forward(logits, target, kl, beta, reconstruction_weight, 1.0, None, None)


def elbo_value_and_grad(
    logits: Tensor,
    target: Tensor,
    kl: Tensor,
    beta: Scalar,
    reconstruction_weight: Scalar,
    grad_scale: Scalar | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, reconstruction, mean_kl, and the gradients of logits and kl."""
    logits_grad = logits.new_empty_strided(logits.shape, dense_strides(logits))
    kl_grad = kl.new_empty(kl.shape)
    grad_scale = 1.0 if grad_scale is None else grad_scale
    values = elbo_forward(logits, target, kl, beta, reconstruction_weight, grad_scale, logits_grad, kl_grad)
    return *values, *in_format_of([logits], [logits_grad]), kl_grad


@remembered
def plan_backward(rows: Rows, any_element: bool) -> Plan:
    tiling = rows.cut(per_row=False)
    return make_plan(
        programs(tiling, rows.batch) if any_element else programs_of_kl(rows.batch),
        tiling.num_warps,
        tiling.rows,
        tiling.columns,
        rows.stride,
        tiling.chunks,
        rows.batch,
        1.0 / rows.batch,
        FLAT=tiling.rows == 1,
        ROWS=tiling.tile_rows,
        COLUMNS=tiling.tile_columns,
    )


def elbo_backward(
    logits: Tensor,
    target: Tensor,
    kl: Tensor,
    loss_grad: Tensor | None,
    reconstruction_grad: Tensor | None,
    mean_kl_grad: Tensor | None,
    beta: Scalar,
    reconstruction_weight: Scalar,
    needs_logits: bool,
    needs_target: bool,
    needs_kl: bool,
) -> list[Tensor]:
    """The gradients of those of logits, target and kl that need one."""
    inputs = [tensor for tensor, needed in ((logits, needs_logits), (target, needs_target)) if needed]
    # In the order that is read; only an input that has to be copied gets a gradient of other strides.
    gradients = [tensor.new_empty_strided(tensor.shape, dense_strides(logits)) for tensor in inputs]
    kl_grads = [kl.new_empty(kl.shape)] if needs_kl else []
    batch = logits.shape[0]
    if batch:
        read_logits, read_target = read_pair(logits, target) if inputs else (logits, target)
        launch(
            elbo_backward_kernel,
            plan_backward(rows_of(read_logits), bool(inputs)),
            logits.device,
            read_logits,
            read_target,
            *[None if grad is None else grad.resolve_neg() for grad in (loss_grad, reconstruction_grad, mean_kl_grad)],
            gradients[0] if needs_logits else None,
            gradients[-1] if needs_target else None,
            kl_grads[0] if needs_kl else None,
            as_argument(beta),
            as_argument(reconstruction_weight),
        )
    return in_format_of(inputs, gradients) + kl_grads
