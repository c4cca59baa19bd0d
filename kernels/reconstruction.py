"""Kernels of the likelihoods of the data given the decoder's logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Plan, launch, make_plan, ticket
from .layout import dense_strides, has_strides, in_format_of, remembered, with_dense_rows, with_strides
from .numerics import sigmoid
from .tiles import (
    UNSPECIALIZED,
    Tiling,
    cut,
    drew_last_ticket,
    empty_sum,
    program_tile,
    reduction_scale,
    sum_blocks,
    sum_groups_in_order,
    tile_offsets,
)


@triton.jit
def load_target(target_ptr, inside):
    """The target in float32; bytes are read as t / 255."""
    target = tl.load(target_ptr, mask=inside, other=0)
    if target_ptr.dtype.element_ty == tl.uint8:
        return target.to(tl.float32) * (1.0 / 255.0)
    return target.to(tl.float32)


@triton.jit
def sigmoid_mse(logits, target, FAST: tl.constexpr):
    """(y - target, y * (1 - y)) with y = sigmoid(logits): the loss is the square of the first, its slope twice their
    product.
    """
    y, slope = sigmoid(logits, FAST)
    return y - target, slope


@triton.jit(do_not_specialize=UNSPECIALIZED)
def sigmoid_mse_forward_kernel(
    logits_ptr, target_ptr, loss_ptr, partial_ptr, ticket_ptr,
    rows, columns, row_stride, chunks, scale,
    FLAT: tl.constexpr, PER_ROW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """loss = scale * sum (sigmoid(logits) - target)^2.

    Shapes: logits and target [rows, columns] at distance row_stride; loss float32 [rows] if PER_ROW, else []. Where
    no program owns a whole sum, partial is float32 [programs] and ticket int32 [1], zero.
    Bytes per float32 element: reads 8 (5 with a uint8 target), writes 0; 8 more per program where there are partial
    sums.
    Launches: 1. Roundings: a term 20, and one per level of a sum. Deterministic: no floating-point atomics, partial
    sums are added in order.
    """
    first_row, first_column = program_tile(chunks, FLAT, ROWS, COLUMNS)
    row = tl.arange(0, ROWS)
    inside_row = row < rows - first_row
    inside = inside_row[:, None] & (tl.arange(0, COLUMNS) < columns - first_column)[None, :]
    base = first_row * row_stride + first_column
    offsets = tile_offsets(row_stride, ROWS, COLUMNS)
    logits = tl.load(logits_ptr + base + offsets, mask=inside, other=0.0).to(tl.float32)
    error, _ = sigmoid_mse(logits, load_target(target_ptr + base + offsets, inside), FAST)
    terms = tl.where(inside, error * error, 0.0)
    if partial_ptr is None:
        if PER_ROW:
            tl.store(loss_ptr + first_row + row, tl.sum(terms, axis=1) * scale, mask=inside_row)
        else:
            tl.store(loss_ptr, tl.sum(terms) * scale)
    else:
        tl.store(partial_ptr + tl.program_id(0), tl.sum(terms))
        if drew_last_ticket(ticket_ptr):
            groups = rows if PER_ROW else 1
            sum_groups_in_order(partial_ptr, loss_ptr, groups, tl.num_programs(0) // groups, scale, GROUPS, BLOCK)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def sigmoid_mse_backward_kernel(
    logits_ptr, target_ptr, loss_grad_ptr, logits_grad_ptr, target_grad_ptr,
    rows, columns, row_stride, chunks, loss_grad_stride, scale,
    FLAT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """logits_grad = 2 * scale * loss_grad * (y - target) * y * (1 - y) with y = sigmoid(logits), and target_grad = -2
    * scale * loss_grad * (y - target).

    Shapes: logits and target [rows, columns] at distance row_stride, their gradients dense; loss_grad float32 [rows]
    at distance loss_grad_stride, or [] with stride 0. A gradient nobody needs is None and is not computed.
    Bytes per float32 element: reads 8 (5 with a uint8 target), writes 4 (8 with both gradients). Launches: 1.
    Roundings: 28. Deterministic.
    """
    first_row, first_column = program_tile(chunks, FLAT, ROWS, COLUMNS)
    row = tl.arange(0, ROWS)
    inside_row = row < rows - first_row
    inside = inside_row[:, None] & (tl.arange(0, COLUMNS) < columns - first_column)[None, :]
    base = first_row * row_stride + first_column
    offsets = tile_offsets(row_stride, ROWS, COLUMNS)
    result = first_row * columns + first_column
    result_offsets = tile_offsets(columns, ROWS, COLUMNS)
    loss_grad = tl.load(loss_grad_ptr + (first_row + row) * loss_grad_stride, mask=inside_row, other=0.0).to(tl.float32)
    logits = tl.load(logits_ptr + base + offsets, mask=inside, other=0.0).to(tl.float32)
    error, slope = sigmoid_mse(logits, load_target(target_ptr + base + offsets, inside), FAST)
    error_grad = (2.0 * scale * loss_grad)[:, None] * error
    if logits_grad_ptr is not None:
        grad = (error_grad * slope).to(logits_grad_ptr.dtype.element_ty)
        tl.store(logits_grad_ptr + result + result_offsets, grad, mask=inside)
    if target_grad_ptr is not None:
        grad = (-error_grad).to(target_grad_ptr.dtype.element_ty)
        tl.store(target_grad_ptr + result + result_offsets, grad, mask=inside)


def read_pair(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """logits and target with dense rows and equal strides."""
    logits = with_dense_rows(logits)
    if not has_strides(target, logits.stride()) or target.is_neg():
        strides = dense_strides(logits)
        logits, target = with_strides(logits, strides), with_strides(target, strides)
    return logits, target


class Rows(NamedTuple):
    """How the logits lie, as `read_pair` returns them, of a batch that is not empty."""

    batch: int
    event: int
    stride: int
    itemsize: int

    def cut(self, per_row: bool) -> Tiling:
        """Rows are needed where each has a sum of its own, or where they do not follow each other without a gap."""
        if self.batch == 1 or (self.stride == self.event and not per_row):
            return cut(1, self.batch * self.event, self.itemsize)
        return cut(self.batch, self.event, self.itemsize)


def rows_of(logits: Tensor) -> Rows:
    batch = logits.shape[0]
    return Rows(batch, logits.numel() // batch, logits.stride(0), logits.element_size())


def allocate_loss(logits: Tensor, reduction: str) -> Tensor:
    return logits.new_empty(logits.shape[:1] if reduction == "none" else [], dtype=torch.float32)


@remembered
def plan_forward(rows: Rows, reduction: str) -> tuple[Plan, int]:
    """And the number of partial sums."""
    per_row = reduction == "none"
    tiling = rows.cut(per_row)
    groups, count = (tiling.rows, tiling.chunks) if per_row else (1, tiling.programs)
    plan = make_plan(
        tiling.programs,
        tiling.num_warps,
        tiling.rows,
        tiling.columns,
        rows.stride,
        tiling.chunks,
        reduction_scale(reduction, rows.batch, rows.event),
        FLAT=tiling.rows == 1,
        PER_ROW=per_row,
        ROWS=tiling.tile_rows,
        COLUMNS=tiling.tile_columns,
        **sum_blocks(groups, count),
    )
    return plan, tiling.programs if count > 1 else 0


def sigmoid_mse_forward(logits: Tensor, target: Tensor, reduction: str) -> Tensor:
    loss = allocate_loss(logits, reduction)
    if logits.numel() == 0:
        return loss.fill_(empty_sum(reduction, logits.shape[0]))
    logits, target = read_pair(logits, target)
    plan, partials = plan_forward(rows_of(logits), reduction)
    launch(
        sigmoid_mse_forward_kernel,
        plan,
        logits.device,
        logits,
        target,
        loss,
        loss.new_empty(partials) if partials else None,
        ticket(loss.device) if partials else None,
    )
    return loss


@remembered
def plan_backward(rows: Rows, reduction: str, loss_grad_stride: int) -> Plan:
    tiling = rows.cut(loss_grad_stride != 0)
    return make_plan(
        tiling.programs,
        tiling.num_warps,
        tiling.rows,
        tiling.columns,
        rows.stride,
        tiling.chunks,
        loss_grad_stride,
        reduction_scale(reduction, rows.batch, rows.event),
        FLAT=tiling.rows == 1,
        ROWS=tiling.tile_rows,
        COLUMNS=tiling.tile_columns,
    )


def sigmoid_mse_backward(
    logits: Tensor, target: Tensor, loss_grad: Tensor, reduction: str, needs_logits: bool, needs_target: bool
) -> list[Tensor]:
    """The gradients of those of logits and target that need one."""
    inputs = [tensor for tensor, needed in ((logits, needs_logits), (target, needs_target)) if needed]
    # In the order that is read; only an input that has to be copied gets a gradient of other strides.
    gradients = [tensor.new_empty_strided(tensor.shape, dense_strides(logits)) for tensor in inputs]
    loss_grad = loss_grad.resolve_neg()
    if logits.numel():
        read_logits, read_target = read_pair(logits, target)
        loss_grad_stride = loss_grad.stride(0) if reduction == "none" else 0
        launch(
            sigmoid_mse_backward_kernel,
            plan_backward(rows_of(read_logits), reduction, loss_grad_stride),
            logits.device,
            read_logits,
            read_target,
            loss_grad,
            gradients[0] if needs_logits else None,
            gradients[-1] if needs_target else None,
        )
    return in_format_of(inputs, gradients)
