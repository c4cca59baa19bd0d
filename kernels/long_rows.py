"""Launch the kernels of softmax over rows that are too long for one program (`softmax.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .groups import Problem, read_grouped
from .launch import Plan, launch, make_plan, ticket
from .layout import in_format_of, remembered
from .rows import Asked
from .softmax import row_gradient_kernel, row_sums_kernel
from .tiles import reduction_scale, sum_blocks

if TYPE_CHECKING:
    from fastvae.likelihoods import Likelihood

# So many parts of rows are enough for every multiprocessor of a card to have several. Fewer rows are cut into parts.
_ENOUGH_PARTS = 1024
_COLUMNS = 2048


@remembered
def plan_long_rows(
    problem: Problem, reduction: str, kl_stride: int, loss_grad_stride: int
) -> tuple[Plan, Plan, int, int]:
    """The plan of the sums, that of the gradient, and the numbers of rows and of their parts."""
    batch, elements, _, classes, _, target_has_axis, parameters, target, gradient = problem
    rows, blocks = batch * elements, -(-classes // _COLUMNS)
    # One part for each block, if there are few rows.
    parts = min(blocks, -(-_ENOUGH_PARTS // max(1, rows)))
    blocks_of_part = -(-blocks // parts)
    parts = -(-blocks // blocks_of_part)
    in_rows = (parameters, *([target] if target_has_axis else []), *([gradient] if gradient else []))
    alignment = gcd(16, classes, *(stride for each in in_rows for stride in (each.row, each.element)))
    lies = [
        [stride // (alignment if each in in_rows else 1) for stride in (each.row, each.element)]
        for each in (parameters, target, gradient or parameters)
    ]
    sums = "all" if reduction != "none" else "element" if elements == 1 else "row"
    scale = reduction_scale(reduction, batch, elements)
    constants = {"TARGET_HAS_AXIS": target_has_axis, "SUMS": sums, "ALIGNMENT": alignment, "COLUMNS": _COLUMNS}
    sizes = (rows, elements, classes // alignment)
    of_sums = make_plan(
        max(1, rows * parts),
        4,
        *sizes,
        blocks_of_part,
        parts,
        *lies[0],
        *lies[1],
        kl_stride,
        batch,
        scale,
        **constants,
        **sum_blocks(batch if sums == "row" else 1, elements if sums == "row" else rows),
    )
    of_gradient = make_plan(
        max(1, rows * blocks),
        4,
        *sizes,
        blocks,
        *lies[0],
        *lies[1],
        *lies[2],
        loss_grad_stride,
        batch,
        scale,
        **constants,
    )
    return of_sums, of_gradient, rows, rows * parts


def long_rows(
    likelihood: Likelihood,
    tensors: Sequence[Tensor],
    reduction: str,
    needed: Sequence[bool],
    asked: Asked,
) -> list[Tensor]:
    """`grouped` for rows that are too long for one program: one launch for values, and one more for gradients."""
    logits, target, gradient, problem = read_grouped(likelihood, tensors, needed[0])
    has_values = asked.values[0] is not None
    of_sums, of_gradient, rows, parts = plan_long_rows(
        problem, reduction, asked.kl_stride, asked.loss_grad_stride(reduction)
    )

    def floats(*shape: int) -> Tensor:
        return logits.new_empty(shape, dtype=torch.float32)

    row = None if gradient is None else floats(2, rows)
    launch(
        row_sums_kernel,
        of_sums,
        logits.device,
        logits,
        target,
        floats(4, parts),
        row,
        floats(rows) if has_values else None,
        ticket(logits.device),
        asked.kl,
        *asked.values,
        asked.kl_grad if has_values else None,
        *asked.weights,
    )
    if gradient is None:
        return []
    launch(
        row_gradient_kernel,
        of_gradient,
        logits.device,
        logits,
        target,
        row,
        gradient,
        asked.values[0],
        *asked.upstream,
        None if has_values else asked.kl_grad,
        *asked.weights,
    )
    return in_format_of([tensors[0]], [gradient])
