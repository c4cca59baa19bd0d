"""Autograd of the maximum mean discrepancy. Saved for backward: the two sets, from which backward computes the kernels
again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvae.autograd.registration import apply, is_differentiated, is_traced, operations, refuse_vmap, register
from fastvae.kernels import mean_discrepancy as kernels
from fastvae.reference.discrepancy import differentiable_gradients, rates_of

_SETTINGS = "str kernel, float[] rates, bool unbiased"

register(
    f"maximum_mean_discrepancy(Tensor z, Tensor prior_z, {_SETTINGS}) -> Tensor",
    kernels.mean_discrepancy,
    lambda z, *others: kernels.allocate(z),
)
register(
    "maximum_mean_discrepancy_backward(Tensor z, Tensor prior_z, Tensor value_grad, "
    f"{_SETTINGS}, bool[] needed) -> Tensor[]",
    kernels.mean_discrepancy_backward,
    lambda z, prior_z, value_grad, kernel, rates, unbiased, needed: kernels.allocate_gradients((z, prior_z), needed),
)


class MaximumMeanDiscrepancy(torch.autograd.Function):
    """The value, as a function of (z, prior_z, kernel, rates, unbiased)."""

    @staticmethod
    def forward(z: Tensor, prior_z: Tensor, kernel: str, rates: tuple[float, ...], unbiased: bool) -> Tensor:
        if is_traced(z, prior_z):
            return operations.maximum_mean_discrepancy(z, prior_z, kernel, rates, unbiased)
        return kernels.mean_discrepancy(z, prior_z, kernel, rates, unbiased)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        z, prior_z, *settings = inputs
        ctx.save_for_backward(z, prior_z)
        ctx.settings = settings
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, value_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:2]
        if value_grad is None:
            return None, None, None, None, None
        z, prior_z = ctx.saved_tensors
        if is_differentiated(z, prior_z, value_grad):
            found = differentiable_gradients((z, prior_z), needed, value_grad, *ctx.settings)
            return (*found, None, None, None)
        if is_traced(z, prior_z, value_grad):
            gradients = operations.maximum_mean_discrepancy_backward(z, prior_z, value_grad, *ctx.settings, needed)
        else:
            gradients = kernels.mean_discrepancy_backward(z, prior_z, value_grad, *ctx.settings, needed)
        each = iter(gradients)
        return (*[next(each) if need else None for need in needed], None, None, None)

    vmap = refuse_vmap("maximum_mean_discrepancy")


def maximum_mean_discrepancy(
    z: Tensor, prior_z: Tensor, kernel: str, scales: Sequence[float], unbiased: bool
) -> Tensor:
    return apply(MaximumMeanDiscrepancy, z, prior_z, kernel, rates_of(z.shape[1], scales), unbiased)
