"""Autograd of the log-density of a mixture. Saved for backward: the inputs and the value of each row, from which
backward computes the terms again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvae.autograd.registration import apply, is_differentiated, is_traced, operations, refuse_vmap, register
from fastvae.kernels import mixture_log_prob as kernels
from fastvae.reference.mixture import differentiable_gradients

_TENSORS = "Tensor z, Tensor mu, Tensor logvar, Tensor? log_weights"

register(
    f"gaussian_mixture_log_prob({_TENSORS}) -> Tensor",
    kernels.mixture_log_prob,
    lambda z, *others: kernels.allocate(z),
)
register(
    f"gaussian_mixture_log_prob_backward({_TENSORS}, Tensor value, Tensor value_grad, bool[] needed) -> Tensor[]",
    kernels.mixture_log_prob_backward,
    lambda z, mu, logvar, log_weights, value, value_grad, needed: kernels.allocate_gradients(
        (z, mu, logvar, log_weights), needed
    ),
)


class GaussianMixtureLogProb(torch.autograd.Function):
    """The value [B], as a function of (z, mu, logvar, log_weights), z [B, K]."""

    @staticmethod
    def forward(z: Tensor, mu: Tensor, logvar: Tensor, log_weights: Tensor | None) -> Tensor:
        if is_traced(z, mu, logvar, log_weights):
            return operations.gaussian_mixture_log_prob(z, mu, logvar, log_weights)
        return kernels.mixture_log_prob(z, mu, logvar, log_weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, value_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad
        if value_grad is None:
            return None, None, None, None
        *tensors, value = ctx.saved_tensors
        if is_differentiated(*tensors, value, value_grad):
            return tuple(differentiable_gradients(tensors, needed, value_grad))
        if is_traced(*tensors, value, value_grad):
            gradients = operations.gaussian_mixture_log_prob_backward(*tensors, value, value_grad, needed)
        else:
            gradients = kernels.mixture_log_prob_backward(*tensors, value, value_grad, needed)
        each = iter(gradients)
        return tuple([next(each) if need else None for need in needed])

    vmap = refuse_vmap("gaussian_mixture_log_prob")


def gaussian_mixture_log_prob(z: Tensor, mu: Tensor, logvar: Tensor, log_weights: Tensor | None) -> Tensor:
    return apply(GaussianMixtureLogProb, z, mu, logvar, log_weights)
