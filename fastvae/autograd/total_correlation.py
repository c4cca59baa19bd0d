"""Autograd of the divergence in three parts. Saved for backward: the inputs, and log q(z) and each log q(z_k), 1 + K
numbers a row, from which backward computes the terms again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvae.autograd.registration import apply, is_differentiated, is_traced, operations, refuse_vmap, register
from fastvae.kernels import decomposition as kernels
from fastvae.reference.total_correlation import differentiable_gradients, log_weights

_TENSORS, _SETTINGS = "Tensor z, Tensor mu, Tensor logvar", "SymInt dataset_size, str weighting"


def _forward(
    z: Tensor, mu: Tensor, logvar: Tensor, dataset_size: int, weighting: str, reduced: bool
) -> tuple[Tensor, ...]:
    return kernels.total_correlation(z, mu, logvar, log_weights(len(z), dataset_size, weighting), reduced)


def _backward(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    joint: Tensor,
    marginals: Tensor,
    value_grads: Sequence[Tensor | None],
    dataset_size: int,
    weighting: str,
    needed: Sequence[bool],
) -> list[Tensor]:
    weights = log_weights(len(z), dataset_size, weighting)
    return kernels.total_correlation_backward(z, mu, logvar, joint, marginals, value_grads, weights, needed)


# Not the weights, because torch.compile would compile the operation anew for those of another batch.
register(
    f"total_correlation({_TENSORS}, {_SETTINGS}, bool reduced) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    lambda z, *others: kernels.allocate(z, others[-1]),
)
register(
    f"total_correlation_backward({_TENSORS}, Tensor joint, Tensor marginals, Tensor?[] value_grads, {_SETTINGS}, "
    "bool[] needed) -> Tensor[]",
    _backward,
    lambda z, mu, logvar, *others: kernels.allocate_gradients((z, mu, logvar), others[-1]),
)


class TotalCorrelation(torch.autograd.Function):
    """The three parts, log q(z) and each log q(z_k), as a function of (z, mu, logvar, dataset_size, weighting,
    reduced).
    """

    @staticmethod
    def forward(
        z: Tensor, mu: Tensor, logvar: Tensor, dataset_size: int, weighting: str, reduced: bool
    ) -> tuple[Tensor, ...]:
        if is_traced(z, mu, logvar):
            return operations.total_correlation(z, mu, logvar, dataset_size, weighting, reduced)
        return _forward(z, mu, logvar, dataset_size, weighting, reduced)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.dataset_size, ctx.weighting, ctx.reduced = inputs
        *_, joint, marginals = output
        ctx.mark_non_differentiable(joint, marginals)
        ctx.save_for_backward(*tensors, joint, marginals)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *all_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needed, value_grads = ctx.needs_input_grad[:3], all_grads[:3]
        if all(grad is None for grad in value_grads):
            return None, None, None, None, None, None
        *tensors, joint, marginals = ctx.saved_tensors
        if is_differentiated(*tensors, *value_grads):
            batch = len(joint)
            grads = [
                torch.zeros_like(joint) if g is None else (g / batch).expand(batch) if ctx.reduced else g
                for g in value_grads
            ]
            weights = log_weights(batch, ctx.dataset_size, ctx.weighting)
            return *differentiable_gradients(tensors, weights, needed, grads), None, None, None
        arguments = (*tensors, joint, marginals, value_grads, ctx.dataset_size, ctx.weighting, needed)
        if is_traced(*tensors, joint, marginals, *value_grads):
            gradients = operations.total_correlation_backward(*arguments)
        else:
            gradients = _backward(*arguments)
        each = iter(gradients)
        return *(next(each) if need else None for need in needed), None, None, None

    vmap = refuse_vmap("total_correlation")


def total_correlation(
    z: Tensor, mu: Tensor, logvar: Tensor, dataset_size: int, weighting: str, reduced: bool
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = z, mu, logvar, dataset_size, weighting, reduced
    information, correlation, dimensions, *_ = apply(TotalCorrelation, *arguments)
    return information, correlation, dimensions
