"""Launch the kernels of every likelihood for the loss alone. `elbo.py` launches them for the evidence lower bound."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .elementwise import gradient_kernel, value_kernel
from .launch import Plan, launch, make_plan, ticket
from .layout import in_format_of, read_together, remembered
from .rows import Asked, Rows, constants_of, needed_of, rows_of, wanted, written_gradients, zeros_of
from .templates import launcher_of
from .tiles import empty_sum, reduction_scale, sum_blocks

if TYPE_CHECKING:
    from fastvae.likelihoods import Likelihood


def allocate_loss(tensors: Sequence[Tensor], reduction: str) -> Tensor:
    first = tensors[0]
    return first.new_empty(first.shape[:1] if reduction == "none" else [], dtype=torch.float32)


@remembered
def plan_loss(likelihood: Likelihood, rows: Rows, reduction: str) -> tuple[Plan, int]:
    """The plan, and the number of partial sums."""
    per_row = reduction == "none"
    tiling, constants, numbers = rows.tiles(per_row)
    groups, count = (tiling.rows, tiling.chunks) if per_row else (1, tiling.programs)
    plan = make_plan(
        tiling.programs,
        tiling.num_warps,
        *numbers,
        0,
        rows.batch,
        reduction_scale(reduction, rows.batch, rows.event),
        **constants_of(likelihood),
        **constants,
        WANTED=(),
        **sum_blocks(groups, count),
    )
    return plan, tiling.programs if count > 1 else 0


def negative_log_likelihood(likelihood: Likelihood, tensors: Sequence[Tensor], reduction: str) -> Tensor:
    """The loss of `tensors`, which are the parameters and, last, the target."""
    loss = allocate_loss(tensors, reduction)
    if tensors[0].numel() == 0:
        return loss.fill_(empty_sum(reduction, tensors[0].shape[0]))
    if (other := launcher_of(likelihood, tensors)) is not None:
        other(likelihood, tensors, reduction, [False] * len(tensors), Asked(values=(loss, None, None)))
        return loss
    *parameters, target = tensors = read_together(tensors)
    plan, partials = plan_loss(likelihood, rows_of(tensors, likelihood.heavy), reduction)
    launch(
        value_kernel,
        plan,
        loss.device,
        tuple(parameters),
        target,
        None,
        loss,
        None,
        None,
        (),
        None,
        loss.new_empty(partials) if partials else None,
        ticket(loss.device) if partials else None,
        1.0,
        1.0,
        1.0,
    )
    return loss


@remembered
def plan_loss_backward(
    likelihood: Likelihood, rows: Rows, reduction: str, loss_grad_stride: int, needed: tuple[bool, ...]
) -> Plan:
    tiling, constants, numbers = rows.tiles(per_row=loss_grad_stride != 0)
    return make_plan(
        tiling.programs,
        tiling.num_warps,
        *numbers,
        loss_grad_stride,
        rows.batch,
        reduction_scale(reduction, rows.batch, rows.event),
        **constants_of(likelihood),
        **constants,
        WANTED=wanted(needed),
    )


def negative_log_likelihood_backward(
    likelihood: Likelihood, tensors: Sequence[Tensor], loss_grad: Tensor, reduction: str, needed: Sequence[bool]
) -> list[Tensor]:
    """The gradients of the parameters and the target, as far as they are needed."""
    loss_grad = loss_grad.resolve_neg()
    if (other := launcher_of(likelihood, tensors)) is not None:
        if tensors[0].numel() == 0:
            return zeros_of(needed_of(tensors, needed))
        return other(likelihood, tensors, reduction, needed, Asked(upstream=(loss_grad, None, None)))
    gradients = written_gradients(tensors, needed)
    if tensors[0].numel():
        *parameters, target = together = read_together(tensors)
        loss_grad_stride = loss_grad.stride(0) if reduction == "none" else 0
        launch(
            gradient_kernel,
            plan_loss_backward(
                likelihood, rows_of(together, likelihood.heavy), reduction, loss_grad_stride, tuple(needed)
            ),
            target.device,
            tuple(parameters),
            target,
            loss_grad,
            None,
            None,
            gradients,
            None,
            1.0,
            1.0,
        )
    return in_format_of(needed_of(tensors, needed), list(gradients))
