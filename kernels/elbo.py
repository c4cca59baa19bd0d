"""Launch the kernels of every likelihood in the evidence lower bound."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .elementwise import KL_PER_PROGRAM, gradient_kernel, value_kernel
from .launch import Plan, launch, make_plan, ticket
from .layout import in_format_of, read_together, remembered
from .rows import Asked, Rows, constants_of, needed_of, rows_of, wanted, written_gradients, zeros_of
from .templates import launcher_of

if TYPE_CHECKING:
    from fastvae.likelihoods import Likelihood

Scalar = float | Tensor


def allocate_values(first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """loss, reconstruction and mean_kl. They are three tensors, because a user could not modify views of one buffer in
    place.
    """
    new_empty = first.new_empty
    return new_empty([], dtype=torch.float32), new_empty([], dtype=torch.float32), new_empty([], dtype=torch.float32)


def programs_of_kl(batch: int) -> int:
    return -(-batch // KL_PER_PROGRAM.value)


@remembered
def plan_elbo(likelihood: Likelihood, rows: Rows, kl_stride: int, needed: tuple[bool, ...]) -> Plan:
    tiling, constants, numbers = rows.tiles(per_row=False)
    return make_plan(
        # Enough for every tile, and for the gradient of every sample's kl. A program without a tile loads nothing.
        max(tiling.programs, programs_of_kl(rows.batch)),
        tiling.num_warps,
        *numbers,
        kl_stride,
        rows.batch,
        1.0 / rows.batch,
        **constants_of(likelihood),
        **constants,
        WANTED=wanted(needed),
        GROUPS=1,
        BLOCK=1024,
    )


def elbo_forward(
    likelihood: Likelihood,
    tensors: Sequence[Tensor],
    kl: Tensor,
    weights: Sequence[Scalar],
    needed: Sequence[bool],
    kl_grad: Tensor | None,
) -> tuple[tuple[Tensor, Tensor, Tensor], list[Tensor]]:
    """The three values, and the gradients that are needed. kl_grad is filled unless it is None. weights: beta,
    reconstruction_weight and grad_scale.
    """
    values = allocate_values(tensors[0])
    inputs = needed_of(tensors, needed)
    if tensors[0].shape[0] == 0:
        for value in values:
            value.fill_(float("nan"))
        return values, zeros_of(inputs)
    kl = kl.resolve_neg()
    weights = [as_argument(weight) for weight in weights]
    if (other := launcher_of(likelihood, tensors)) is not None:
        if tensors[0].numel() or likelihood.grouped:
            asked = Asked(values=values, kl=kl, kl_grad=kl_grad, weights=weights)
            return values, other(likelihood, tensors, "batchmean", needed, asked)
        expanded = [tensor.expand(tensors[0].shape) for tensor in tensors]  # events without elements
        return elbo_forward(likelihood, expanded, kl, weights, [False] * len(tensors), kl_grad)[0], zeros_of(inputs)
    gradients = written_gradients(tensors, needed)
    *parameters, target = tensors = read_together(tensors)
    plan = plan_elbo(likelihood, rows_of(tensors, likelihood.heavy), kl.stride(0), tuple(needed))
    several = plan.programs > 1
    launch(
        value_kernel,
        plan,
        target.device,
        tuple(parameters),
        target,
        kl,
        *values,
        gradients,
        kl_grad,
        values[0].new_empty(plan.programs) if several else None,
        ticket(target.device) if several else None,
        *weights,
    )
    return values, in_format_of(inputs, list(gradients))


def as_argument(scalar: Scalar) -> Scalar:
    """The number as a float, because an integer argument would be compiled into the kernel."""
    return scalar.resolve_neg() if isinstance(scalar, Tensor) else float(scalar)


def elbo_loss(
    likelihood: Likelihood, tensors: Sequence[Tensor], kl: Tensor, beta: Scalar, reconstruction_weight: Scalar
) -> tuple[Tensor, Tensor, Tensor]:
    weights = (beta, reconstruction_weight, 1.0)
    return elbo_forward(likelihood, tensors, kl, weights, [False] * len(tensors), None)[0]


def elbo_value_and_grad(
    likelihood: Likelihood,
    tensors: Sequence[Tensor],
    kl: Tensor,
    beta: Scalar,
    reconstruction_weight: Scalar,
    grad_scale: Scalar | None,
) -> tuple[Tensor, ...]:
    """loss, reconstruction, mean_kl, and the gradients of kl and of each parameter."""
    needed = [True] * (len(tensors) - 1) + [False]
    kl_grad = kl.new_empty(kl.shape)
    weights = (beta, reconstruction_weight, 1.0 if grad_scale is None else grad_scale)
    values, gradients = elbo_forward(likelihood, tensors, kl, weights, needed, kl_grad)
    return *values, kl_grad, *gradients


@remembered
def plan_elbo_backward(likelihood: Likelihood, rows: Rows, needed: tuple[bool, ...]) -> Plan:
    tiling, constants, numbers = rows.tiles(per_row=False)
    return make_plan(
        max(tiling.programs if any(needed) else 1, programs_of_kl(rows.batch)),
        tiling.num_warps,
        *numbers,
        0,
        rows.batch,
        1.0 / rows.batch,
        **constants_of(likelihood),
        **constants,
        WANTED=wanted(needed),
    )


def elbo_backward(
    likelihood: Likelihood,
    tensors: Sequence[Tensor],
    kl: Tensor,
    loss_grad: Tensor | None,
    reconstruction_grad: Tensor | None,
    mean_kl_grad: Tensor | None,
    beta: Scalar,
    reconstruction_weight: Scalar,
    needed: Sequence[bool],
    needs_kl: bool,
) -> list[Tensor]:
    """The gradients of the parameters, the target and kl, as far as they are needed."""
    inputs = needed_of(tensors, needed)
    kl_grads = [kl.new_empty(kl.shape)] if needs_kl else []
    if tensors[0].shape[0] == 0:
        return zeros_of(inputs) + kl_grads
    kl_grad = kl_grads[0] if kl_grads else None
    grads = [None if grad is None else grad.resolve_neg() for grad in (loss_grad, reconstruction_grad, mean_kl_grad)]
    weights = as_argument(beta), as_argument(reconstruction_weight)
    if any(needed) and (other := launcher_of(likelihood, tensors)) is not None:
        if tensors[0].numel() or likelihood.grouped:
            asked = Asked(upstream=grads, kl_grad=kl_grad, weights=(*weights, 1.0))
            return other(likelihood, tensors, "batchmean", needed, asked) + kl_grads
        nothing = [False] * len(tensors)  # events without elements
        return zeros_of(inputs) + elbo_backward(likelihood, tensors, kl, *grads, *weights, nothing, needs_kl)
    gradients = written_gradients(tensors, needed)
    *parameters, target = together = read_together(tensors) if gradients else tensors
    launch(
        gradient_kernel,
        plan_elbo_backward(likelihood, rows_of(together, likelihood.heavy), tuple(needed)),
        target.device,
        tuple(parameters),
        target,
        *grads,
        gradients,
        kl_grad,
        *weights,
    )
    return in_format_of(inputs, list(gradients)) + kl_grads
