"""The negative log-likelihood of any likelihood, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvae.likelihoods.likelihood import Likelihood
from fastvae.likelihoods.sigmoid_mse import SigmoidMSE
from fastvae.reference import blocks
from fastvae.reference.precision import Parameters, in_precision, reduce_event


def negative_log_likelihood(
    parameters: Parameters, target: Tensor, likelihood: Likelihood, *, reduction: str = "batchmean"
) -> Tensor:
    """The formula of each element, reduced. A large batch on the CPU is computed in blocks, see `blocks`."""
    tensors = (parameters, target) if isinstance(parameters, Tensor) else (*parameters, target)
    rows = blocks.rows_of_a_block(tensors)
    if rows is None:
        return reduce_event(likelihood.formula(*in_precision(parameters, target, likelihood)), reduction)
    loss: Tensor = _OfBlocks.apply(likelihood, reduction, rows, *tensors)  # type: ignore[no-untyped-call]
    return loss


class _OfBlocks(torch.autograd.Function):
    """The loss, as a function of (likelihood, reduction, rows, *parameters, target)."""

    @staticmethod
    def forward(ctx: Any, likelihood: Likelihood, reduction: str, rows: int, *tensors: Tensor) -> Tensor:
        ctx.options = likelihood, reduction, rows
        ctx.save_for_backward(*tensors)
        sums = blocks.sums(likelihood, tensors, rows, "none" if reduction == "none" else "sum")
        return torch.cat(sums) if reduction == "none" else torch.stack(sums).sum() / _count(tensors[-1], reduction)

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor) -> tuple[Tensor | None, ...]:
        likelihood, reduction, rows = ctx.options
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[3:]
        target = tensors[-1]
        if reduction == "none":
            factor = loss_grad.view(-1, *[1] * (target.ndim - 1))
        else:
            factor = loss_grad / _count(target, reduction)
        if torch.is_grad_enabled():
            return None, None, None, *differentiable_gradients(likelihood, tensors, needed, factor)
        return None, None, None, *blocks.gradients(likelihood, tensors, needed[:-1], factor, rows), None


def _count(target: Tensor, reduction: str) -> int:
    """What the sum of all elements is divided by."""
    return {"batchmean": target.shape[0], "mean": target.numel()}.get(reduction, 1)


def differentiable_gradients(
    likelihood: Likelihood, tensors: Sequence[Tensor], needed: Sequence[bool], element_grad: Tensor
) -> list[Tensor | None]:
    """The gradients of the tensors, by torch's differentiation of the formula, for the gradient of each element's
    value. None for a tensor that needs none.
    """

    def formula(*wanted: Tensor) -> Tensor:
        each = iter(wanted)
        *parameters, target = [next(each) if need else x for x, need in zip(tensors, needed, strict=True)]
        return likelihood.formula(*in_precision(tuple(parameters), target, likelihood))

    of_needed = [x for x, need in zip(tensors, needed, strict=True) if need]
    transformed: Any = torch.func.vjp(formula, *of_needed)
    value, backward = transformed
    gradients = iter(backward(element_grad.to(value.dtype).expand(value.shape)))
    return [next(gradients) if need else None for need in needed]


def sigmoid_mse_loss(logits: Tensor, target: Tensor, *, reduction: str = "batchmean") -> Tensor:
    """(sigmoid(logits) - target)^2, reduced."""
    return negative_log_likelihood(logits, target, SigmoidMSE(), reduction=reduction)
