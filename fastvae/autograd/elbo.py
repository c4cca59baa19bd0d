"""Autograd of the negative evidence lower bound. It saves the parameters, the target and kl for backward. The gradient
of kl is one number for the whole batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvae.autograd.registration import apply, is_differentiated, is_traced, operations, refuse_vmap, register
from fastvae.kernels import elbo as kernels
from fastvae.kernels.layout import empty_gradients
from fastvae.likelihoods.likelihood import Likelihood, from_key
from fastvae.reference.likelihood import differentiable_gradients

Scalar = float | Tensor


def _fake_value_and_grad(likelihood: str, tensors: Sequence[Tensor], kl: Tensor, *scalars: Any) -> list[Tensor]:
    return [*kernels.allocate_values(tensors[0]), kl.new_empty(kl.shape), *empty_gradients(*tensors[:-1])]


def _fake_backward(likelihood: str, tensors: Sequence[Tensor], kl: Tensor, *others: Any) -> list[Tensor]:
    *_, needed, needs_kl = others
    gradients = empty_gradients(*kernels.needed_of(tensors, needed))
    return [*gradients, kl.new_empty(kl.shape)] if needs_kl else gradients


register(
    "elbo_loss(str likelihood, Tensor[] tensors, Tensor kl, Tensor beta, Tensor reconstruction_weight) "
    "-> (Tensor, Tensor, Tensor)",
    lambda key, *others: kernels.elbo_loss(from_key(key), *others),
    lambda key, tensors, *others: kernels.allocate_values(tensors[0]),
)
register(
    "elbo_value_and_grad(str likelihood, Tensor[] tensors, Tensor kl, Tensor beta, Tensor reconstruction_weight, "
    "Tensor? grad_scale) -> Tensor[]",
    lambda key, *others: list(kernels.elbo_value_and_grad(from_key(key), *others)),
    _fake_value_and_grad,
)
register(
    "elbo_backward(str likelihood, Tensor[] tensors, Tensor kl, Tensor? loss_grad, Tensor? reconstruction_grad, "
    "Tensor? mean_kl_grad, Tensor beta, Tensor reconstruction_weight, bool[] needed, bool needs_kl) -> Tensor[]",
    lambda key, *others: kernels.elbo_backward(from_key(key), *others),
    _fake_backward,
)


def added(first: Tensor | None, second: Tensor | None) -> Tensor:
    """The sum of the given gradients, of which one may be None."""
    if first is None or second is None:
        present = second if first is None else first
        assert present is not None
        return present
    return first + second


class ELBOLoss(torch.autograd.Function):
    """(loss, reconstruction, mean_kl), as a function of (likelihood, kl, beta, reconstruction_weight, *parameters,
    target).
    """

    @staticmethod
    def forward(
        likelihood: Likelihood, kl: Tensor, beta: Scalar, reconstruction_weight: Scalar, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not is_traced(kl, beta, reconstruction_weight, *tensors):
            return kernels.elbo_loss(likelihood, tensors, kl, beta, reconstruction_weight)
        scalars = as_tensors(tensors[0], beta, reconstruction_weight)
        return operations.elbo_loss(likelihood.key, tensors, kl, *scalars)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.likelihood, kl, beta, weight, *tensors = inputs
        # A weight on the device is saved like any tensor, so that changing it before backward is an error and not a
        # wrong gradient.
        ctx.scalars = [None if isinstance(scalar, Tensor) else scalar for scalar in (beta, weight)]
        ctx.save_for_backward(
            kl, *[scalar if isinstance(scalar, Tensor) else None for scalar in (beta, weight)], *tensors
        )
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *value_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        kl, tensors, weights = ctx.saved_tensors[0], ctx.saved_tensors[3:], ctx.saved_tensors[1:3]
        beta, weight = (
            number if tensor is None else tensor for number, tensor in zip(ctx.scalars, weights, strict=True)
        )
        loss_grad, reconstruction_grad, mean_kl_grad = value_grads
        # A tensor that no upstream gradient reaches gets no gradient, so nothing is written for it.
        reaches_terms = loss_grad is not None or reconstruction_grad is not None
        needed = [needs and reaches_terms for needs in ctx.needs_input_grad[4:]]
        needs_kl = ctx.needs_input_grad[1] and (loss_grad is not None or mean_kl_grad is not None)
        gradients: list[Tensor | None] = [None] * len(tensors)
        kl_grad = None
        if is_differentiated(kl, *tensors, *weights, *value_grads):
            batch = max(1, kl.shape[0])  # the gradients of an empty batch are empty
            if any(needed):
                term_grad = added(loss_grad, reconstruction_grad) * weight / batch
                gradients = differentiable_gradients(ctx.likelihood, tensors, needed, term_grad)
            if needs_kl:
                kl_grad = added(None if loss_grad is None else beta * loss_grad, mean_kl_grad) / batch
                kl_grad = kl_grad.to(kl.dtype).expand(kl.shape).contiguous()
        elif needs_kl or any(needed):
            if is_traced(kl, *tensors, *weights, *value_grads):
                scalars = as_tensors(tensors[0], beta, weight)
                found = operations.elbo_backward(
                    ctx.likelihood.key, tensors, kl, *value_grads, *scalars, needed, needs_kl
                )
            else:
                found = kernels.elbo_backward(ctx.likelihood, tensors, kl, *value_grads, beta, weight, needed, needs_kl)
            each = iter(found)
            gradients = [next(each) if needs else None for needs in needed]
            kl_grad = next(each) if needs_kl else None
        return None, kl_grad, None, None, *gradients

    vmap = refuse_vmap("elbo_loss")


def as_tensors(tensor: Tensor, *weights: Scalar | None) -> list[Tensor | None]:
    """The weights as tensors, because torch.compile would recompile a registered operation for each new number."""
    # A product, because torch.compile keeps a number that multiplies a tensor variable, and freezes one that fills it.
    return [
        torch.ones((), dtype=torch.float32, device=tensor.device) * weight
        if isinstance(weight, (float, int, torch.SymFloat, torch.SymInt))
        else weight
        for weight in weights
    ]


def elbo_loss(
    likelihood: Likelihood, tensors: Sequence[Tensor], kl: Tensor, beta: Scalar, reconstruction_weight: Scalar
) -> tuple[Tensor, Tensor, Tensor]:
    weights: Any = (beta, reconstruction_weight)
    if torch.compiler.is_compiling():  # before the Function, which would be traced anew for another number
        weights = as_tensors(tensors[0], *weights)
    return apply(ELBOLoss, likelihood, kl, *weights, *tensors)


def elbo_value_and_grad(
    likelihood: Likelihood,
    tensors: Sequence[Tensor],
    kl: Tensor,
    beta: Scalar,
    reconstruction_weight: Scalar,
    grad_scale: Scalar | None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    """The three values, the gradients of the parameters, and that of kl."""
    results: Sequence[Tensor]
    if is_traced(kl, beta, reconstruction_weight, grad_scale, *tensors):
        with torch.no_grad():  # a launcher's results have no graph anyway
            weights = as_tensors(tensors[0], beta, reconstruction_weight, grad_scale)
            results = operations.elbo_value_and_grad(likelihood.key, tensors, kl, *weights)
    else:
        results = kernels.elbo_value_and_grad(likelihood, tensors, kl, beta, reconstruction_weight, grad_scale)
    loss, reconstruction, mean_kl, kl_grad, *gradients = results
    return (loss, reconstruction, mean_kl), tuple(gradients), kl_grad
