"""Autograd of the negative evidence lower bound. Saved for backward: logits, target and kl, whose gradient is one
number for the whole batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvae.autograd.reconstruction import differentiable_gradients
from fastvae.autograd.registration import apply, is_differentiated, is_traced, refuse_vmap, register
from fastvae.kernels import elbo as kernels
from fastvae.kernels.layout import empty_gradients

_operations = torch.ops.fastvae

Scalar = float | Tensor


def _fake_value_and_grad(logits: Tensor, target: Tensor, kl: Tensor, *scalars: Any) -> tuple[Tensor, ...]:
    return *kernels.allocate_values(logits), *empty_gradients(logits), kl.new_empty(kl.shape)


def _fake_backward(logits: Tensor, target: Tensor, kl: Tensor, *others: Any) -> list[Tensor]:
    needs_logits, needs_target, needs_kl = others[-3:]
    gradients = empty_gradients(*[t for t, needed in ((logits, needs_logits), (target, needs_target)) if needed])
    return [*gradients, kl.new_empty(kl.shape)] if needs_kl else gradients


register(
    "elbo_loss(Tensor logits, Tensor target, Tensor kl, Tensor beta, Tensor reconstruction_weight) "
    "-> (Tensor, Tensor, Tensor)",
    kernels.elbo_loss,
    lambda logits, target, kl, beta, reconstruction_weight: kernels.allocate_values(logits),
)
register(
    "elbo_value_and_grad(Tensor logits, Tensor target, Tensor kl, Tensor beta, Tensor reconstruction_weight, "
    "Tensor? grad_scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernels.elbo_value_and_grad,
    _fake_value_and_grad,
)
register(
    "elbo_backward(Tensor logits, Tensor target, Tensor kl, Tensor? loss_grad, Tensor? reconstruction_grad, "
    "Tensor? mean_kl_grad, Tensor beta, Tensor reconstruction_weight, bool needs_logits, bool needs_target, "
    "bool needs_kl) -> Tensor[]",
    kernels.elbo_backward,
    _fake_backward,
)


def added(first: Tensor | None, second: Tensor | None) -> Tensor:
    """The sum of what is there; not both are missing."""
    if first is None or second is None:
        present = second if first is None else first
        assert present is not None
        return present
    return first + second


class ELBOLoss(torch.autograd.Function):
    """(loss, reconstruction, mean_kl) of (logits, target, kl, beta, reconstruction_weight)."""

    @staticmethod
    def forward(
        logits: Tensor, target: Tensor, kl: Tensor, beta: Scalar, reconstruction_weight: Scalar
    ) -> tuple[Tensor, Tensor, Tensor]:
        arguments = logits, target, kl, beta, reconstruction_weight
        if not is_traced(*arguments):
            return kernels.elbo_loss(*arguments)
        return _operations.elbo_loss(logits, target, kl, *as_tensors(logits, beta, reconstruction_weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        logits, target, kl, *scalars = inputs
        # A weight on the device is saved like any tensor, so that changing it before backward is an error and not a
        # wrong gradient.
        ctx.scalars = [None if isinstance(scalar, Tensor) else scalar for scalar in scalars]
        ctx.save_for_backward(
            logits, target, kl, *[scalar if isinstance(scalar, Tensor) else None for scalar in scalars]
        )
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *value_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, target, kl, *tensors = ctx.saved_tensors
        beta, weight = (
            number if tensor is None else tensor for number, tensor in zip(ctx.scalars, tensors, strict=True)
        )
        loss_grad, reconstruction_grad, mean_kl_grad = value_grads
        # What no upstream gradient reaches has none, and is neither read nor written.
        reaches_terms = loss_grad is not None or reconstruction_grad is not None
        needs_logits, needs_target = (needed and reaches_terms for needed in ctx.needs_input_grad[:2])
        needs_kl = ctx.needs_input_grad[2] and (loss_grad is not None or mean_kl_grad is not None)
        logits_grad = target_grad = kl_grad = None
        if is_differentiated(logits, target, kl, *tensors, *value_grads):
            batch = max(1, logits.shape[0])  # the gradients of an empty batch are empty
            if needs_logits or needs_target:
                term_grad = added(loss_grad, reconstruction_grad) * weight / batch
                logits_grad, target_grad = differentiable_gradients(logits, target, term_grad)
            if needs_kl:
                kl_grad = added(None if loss_grad is None else beta * loss_grad, mean_kl_grad) / batch
                kl_grad = kl_grad.to(kl.dtype).expand(kl.shape).contiguous()
        elif needs_logits or needs_target or needs_kl:
            launcher = kernels.elbo_backward
            if is_traced(logits, target, kl, *tensors, *value_grads):
                launcher = _operations.elbo_backward
                beta, weight = as_tensors(logits, beta, weight)
            gradients = launcher(logits, target, kl, *value_grads, beta, weight, needs_logits, needs_target, needs_kl)
            logits_grad = gradients[0] if needs_logits else None
            target_grad = gradients[int(needs_logits)] if needs_target else None
            kl_grad = gradients[-1] if needs_kl else None
        return logits_grad, target_grad, kl_grad, None, None

    vmap = refuse_vmap("elbo_loss")


def as_tensors(logits: Tensor, *weights: Scalar | None) -> list[Tensor | None]:
    """The weights as a registered operation takes them: tensors, so that a new number is not a new program."""
    # A product, because torch.compile keeps a number that multiplies a tensor variable, and freezes one that fills it.
    return [
        torch.ones((), dtype=torch.float32, device=logits.device) * weight
        if isinstance(weight, (float, int, torch.SymFloat, torch.SymInt))
        else weight
        for weight in weights
    ]


def elbo_loss(
    logits: Tensor, target: Tensor, kl: Tensor, beta: Scalar, reconstruction_weight: Scalar
) -> tuple[Tensor, Tensor, Tensor]:
    weights: Any = (beta, reconstruction_weight)
    if torch.compiler.is_compiling():  # before the Function, which would be traced anew for another number
        weights = as_tensors(logits, *weights)
    return apply(ELBOLoss, logits, target, kl, *weights)


def elbo_value_and_grad(
    logits: Tensor,
    target: Tensor,
    kl: Tensor,
    beta: Scalar,
    reconstruction_weight: Scalar,
    grad_scale: Scalar | None,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    launcher: Any = kernels.elbo_value_and_grad
    weights: Any = (beta, reconstruction_weight, grad_scale)
    if is_traced(logits, target, kl, *weights):
        launcher, weights = _operations.elbo_value_and_grad, as_tensors(logits, *weights)
    with torch.no_grad():
        *values, logits_grad, kl_grad = launcher(logits, target, kl, *weights)
    return tuple(values), (logits_grad, kl_grad)
