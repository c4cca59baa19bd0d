"""Autograd of the likelihoods. It saves the parameters and the target, from which backward computes the term again.

A registered operation takes the likelihood's key, a string.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvae.autograd.registration import apply, is_differentiated, is_traced, operations, refuse_vmap, register
from fastvae.kernels import likelihood as kernels
from fastvae.kernels.groups import terms_of_a_sample
from fastvae.kernels.layout import empty_gradients
from fastvae.likelihoods.likelihood import Likelihood, from_key
from fastvae.reference.likelihood import differentiable_gradients


def _fake_backward(
    likelihood: str, tensors: Sequence[Tensor], loss_grad: Tensor, reduction: str, needed: Sequence[bool]
) -> list[Tensor]:
    return empty_gradients(*kernels.needed_of(tensors, needed))


register(
    "negative_log_likelihood(str likelihood, Tensor[] tensors, str reduction) -> Tensor",
    lambda key, *others: kernels.negative_log_likelihood(from_key(key), *others),
    lambda key, tensors, reduction: kernels.allocate_loss(tensors, reduction),
)
register(
    "negative_log_likelihood_backward(str likelihood, Tensor[] tensors, Tensor loss_grad, str reduction, "
    "bool[] needed) -> Tensor[]",
    lambda key, *others: kernels.negative_log_likelihood_backward(from_key(key), *others),
    _fake_backward,
)


class NegativeLogLikelihood(torch.autograd.Function):
    """The loss, as a function of (likelihood, reduction, *parameters, target)."""

    @staticmethod
    def forward(likelihood: Likelihood, reduction: str, *tensors: Tensor) -> Tensor:
        if not is_traced(*tensors):
            return kernels.negative_log_likelihood(likelihood, tensors, reduction)
        return operations.negative_log_likelihood(likelihood.key, tensors, reduction)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.likelihood, ctx.reduction, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        if loss_grad is None:
            return None, None, *[None] * len(needed)
        tensors = ctx.saved_tensors
        if is_differentiated(*tensors, loss_grad):
            first = tensors[0]
            terms = terms_of_a_sample(ctx.likelihood, tensors)
            scale = kernels.reduction_scale(ctx.reduction, first.shape[0], terms)
            if ctx.reduction == "none":
                loss_grad = loss_grad.view(-1, *[1] * (first.ndim - 1))
            return None, None, *differentiable_gradients(ctx.likelihood, tensors, needed, scale * loss_grad)
        if is_traced(*tensors, loss_grad):
            gradients = operations.negative_log_likelihood_backward(
                ctx.likelihood.key, tensors, loss_grad, ctx.reduction, needed
            )
        else:
            gradients = kernels.negative_log_likelihood_backward(
                ctx.likelihood, tensors, loss_grad, ctx.reduction, needed
            )
        each = iter(gradients)
        return None, None, *[next(each) if need else None for need in needed]

    vmap = refuse_vmap("negative_log_likelihood")


def negative_log_likelihood(likelihood: Likelihood, tensors: Sequence[Tensor], reduction: str) -> Tensor:
    return apply(NegativeLogLikelihood, likelihood, reduction, *tensors)
