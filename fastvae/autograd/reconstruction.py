"""Autograd of the likelihoods of the data. Saved for backward: logits and target, from which it computes the sigmoid
again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvae.autograd.registration import apply, is_differentiated, is_traced, refuse_vmap, register
from fastvae.kernels import reconstruction as kernels
from fastvae.kernels.layout import empty_gradients, event_size
from fastvae.reference.precision import in_float32, pixels, sigmoid

_operations = torch.ops.fastvae


def _fake_backward(
    logits: Tensor, target: Tensor, loss_grad: Tensor, reduction: str, needs_logits: bool, needs_target: bool
) -> list[Tensor]:
    return empty_gradients(*[tensor for tensor, needed in ((logits, needs_logits), (target, needs_target)) if needed])


register(
    "sigmoid_mse_forward(Tensor logits, Tensor target, str reduction) -> Tensor",
    kernels.sigmoid_mse_forward,
    lambda logits, target, reduction: kernels.allocate_loss(logits, reduction),
)
register(
    "sigmoid_mse_backward(Tensor logits, Tensor target, Tensor loss_grad, str reduction, "
    "bool needs_logits, bool needs_target) -> Tensor[]",
    kernels.sigmoid_mse_backward,
    _fake_backward,
)


def differentiable_gradients(logits: Tensor, target: Tensor, term_grad: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gradients of the terms (sigmoid(logits) - target)^2 in plain PyTorch, given the gradient of each term."""
    x = in_float32(logits)
    y = sigmoid(x)
    error_grad = 2.0 * term_grad * (y - pixels(target))
    logits_grad = (error_grad * y * sigmoid(-x)).to(logits.dtype)
    return logits_grad, (-error_grad).to(target.dtype) if target.is_floating_point() else None


class SigmoidMSE(torch.autograd.Function):
    """The loss of (logits, target, reduction)."""

    @staticmethod
    def forward(logits: Tensor, target: Tensor, reduction: str) -> Tensor:
        return (_operations if is_traced(logits, target) else kernels).sigmoid_mse_forward(logits, target, reduction)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        logits, target, ctx.reduction = inputs
        ctx.save_for_backward(logits, target)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if loss_grad is None:
            return None, None, None
        logits, target = ctx.saved_tensors
        needs_logits, needs_target = ctx.needs_input_grad[:2]
        if is_differentiated(logits, target, loss_grad):
            term_grad = in_float32(loss_grad) * kernels.reduction_scale(
                ctx.reduction, logits.shape[0], event_size(logits)
            )
            if ctx.reduction == "none":
                term_grad = term_grad.view(-1, *[1] * (logits.ndim - 1))
            return *differentiable_gradients(logits, target, term_grad), None
        launcher = (_operations if is_traced(logits, target, loss_grad) else kernels).sigmoid_mse_backward
        gradients = launcher(logits, target, loss_grad, ctx.reduction, needs_logits, needs_target)
        return gradients[0] if needs_logits else None, gradients[-1] if needs_target else None, None

    vmap = refuse_vmap("sigmoid_mse_loss")


def sigmoid_mse_loss(logits: Tensor, target: Tensor, reduction: str) -> Tensor:
    return apply(SigmoidMSE, logits, target, reduction)
