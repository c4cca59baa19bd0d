"""Autograd of the divergence in three parts. Saved for backward: the inputs, and log q(z) and each log q(z_k), 1 + K
numbers a row, from which backward computes the terms again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvae.autograd.registration import apply, is_differentiated, is_traced, refuse_vmap, register
from fastvae.kernels import decomposition as kernels
from fastvae.reference.total_correlation import LogWeights, differentiable_gradients

_operations = torch.ops.fastvae

_TENSORS = "Tensor z, Tensor mu, Tensor logvar"

register(
    f"total_correlation({_TENSORS}, float[] weights, bool reduced) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernels.total_correlation,
    lambda z, mu, logvar, weights, reduced: kernels.allocate(z, reduced),
)
register(
    f"total_correlation_backward({_TENSORS}, Tensor joint, Tensor marginals, Tensor?[] value_grads, float[] weights, "
    "bool[] needed) -> Tensor[]",
    kernels.total_correlation_backward,
    lambda z, mu, logvar, joint, marginals, grads, weights, needed: kernels.allocate_gradients((z, mu, logvar), needed),
)


class TotalCorrelation(torch.autograd.Function):
    """The three parts, log q(z) and each log q(z_k), as a function of (z, mu, logvar, weights, reduced)."""

    @staticmethod
    def forward(z: Tensor, mu: Tensor, logvar: Tensor, weights: LogWeights, reduced: bool) -> tuple[Tensor, ...]:
        if is_traced(z, mu, logvar):
            return _operations.total_correlation(z, mu, logvar, weights, reduced)
        return kernels.total_correlation(z, mu, logvar, weights, reduced)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.weights, ctx.reduced = inputs
        *_, joint, marginals = output
        ctx.mark_non_differentiable(joint, marginals)
        ctx.save_for_backward(*tensors, joint, marginals)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *all_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needed, value_grads = ctx.needs_input_grad[:3], all_grads[:3]
        if all(grad is None for grad in value_grads):
            return None, None, None, None, None
        *tensors, joint, marginals = ctx.saved_tensors
        if is_differentiated(*tensors, *value_grads):
            batch = len(joint)
            grads = [
                torch.zeros_like(joint) if g is None else (g / batch).expand(batch) if ctx.reduced else g
                for g in value_grads
            ]
            return *differentiable_gradients(tensors, ctx.weights, needed, grads), None, None
        arguments = (*tensors, joint, marginals, value_grads, ctx.weights, needed)
        if is_traced(*tensors, joint, marginals, *value_grads):
            gradients = _operations.total_correlation_backward(*arguments)
        else:
            gradients = kernels.total_correlation_backward(*arguments)
        each = iter(gradients)
        return *(next(each) if need else None for need in needed), None, None

    vmap = refuse_vmap("total_correlation")


def total_correlation(
    z: Tensor, mu: Tensor, logvar: Tensor, weights: LogWeights, reduced: bool
) -> tuple[Tensor, Tensor, Tensor]:
    information, correlation, dimensions, *_ = apply(TotalCorrelation, z, mu, logvar, weights, reduced)
    return information, correlation, dimensions
