"""Autograd of the importance-weighted bound. Saved for backward: the log-densities and the bound, from which backward
makes the normalised weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvae.autograd.registration import apply, is_differentiated, is_traced, operations, refuse_vmap, register
from fastvae.kernels import importance_weighted as kernels
from fastvae.kernels.mixture_log_prob import allocate_gradients
from fastvae.reference import importance as reference

_TENSORS = "Tensor log_p_x_given_z, Tensor log_p_z, Tensor log_q_z"

register(
    f"importance_weighted_bound({_TENSORS}) -> Tensor",
    kernels.importance_weighted_bound,
    lambda first, *others: kernels.allocate(first),
)
register(
    f"importance_weighted_bound_backward({_TENSORS}, Tensor value, Tensor value_grad, bool[] needed) -> Tensor[]",
    kernels.importance_weighted_bound_backward,
    lambda likelihood, prior, posterior, value, value_grad, needed: allocate_gradients(
        (likelihood, prior, posterior), needed
    ),
)


class ImportanceWeightedBound(torch.autograd.Function):
    """The bound [B], as a function of three log-densities [S, B]."""

    @staticmethod
    def forward(likelihood: Tensor, prior: Tensor, posterior: Tensor) -> Tensor:
        if is_traced(likelihood, prior, posterior):
            return operations.importance_weighted_bound(likelihood, prior, posterior)
        return kernels.importance_weighted_bound(likelihood, prior, posterior)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, value_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad
        if value_grad is None:
            return None, None, None
        *tensors, value = ctx.saved_tensors
        if is_differentiated(*tensors, value, value_grad):
            gradient = value_grad * reference.normalised_weights(reference.log_weights(*tensors), 0)
            found = (gradient, gradient, -gradient)
            return tuple([g.to(x.dtype) if need else None for g, x, need in zip(found, tensors, needed, strict=True)])
        if is_traced(*tensors, value, value_grad):
            gradients = operations.importance_weighted_bound_backward(*tensors, value, value_grad, needed)
        else:
            gradients = kernels.importance_weighted_bound_backward(*tensors, value, value_grad, needed)
        each = iter(gradients)
        return tuple([next(each) if need else None for need in needed])

    vmap = refuse_vmap("importance_weighted_bound")


def importance_weighted_bound(likelihood: Tensor, prior: Tensor, posterior: Tensor) -> Tensor:
    return apply(ImportanceWeightedBound, likelihood, prior, posterior)
