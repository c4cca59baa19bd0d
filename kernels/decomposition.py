"""Launching the kernels of the divergence in three parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .launch import Plan, launch, make_plan, ticket
from .layout import remembered
from .mixture_log_prob import allocate_gradients
from .tiles import power_of_2
from .total_correlation import total_correlation_kernel
from .total_correlation_gradients import total_correlation_posteriors_kernel, total_correlation_rows_kernel

# Tiles [rows, posteriors, dimensions]: of values, and of the gradients of z and of the posteriors. A thread of 4 warps
# has 8 elements of each. With 4, an element takes more instructions, because fewer share reductions and addresses, and
# with 16 the last takes 151 registers, not 80 (sm_90, triton 3.9). For the gradient of z, [4, 64, 4] takes a sixth less
# instructions, but spills 8 bytes (sm_80, triton 3.9), and [8, 16, 4] 16 (sm_90, triton 3.6). Not measured on a GPU.
_OF_VALUES, _OF_ROWS, _OF_POSTERIORS = (8, 32, 4), (16, 16, 4), (32, 8, 4)

LogWeights = tuple[float, float, float]


@remembered
def plan_decomposition(
    batch: int, dims: int, strides: tuple[int, ...], weights: LogWeights, scale: float, tile: tuple[int, int, int],
    by_rows: bool, values: bool,
) -> Plan:  # fmt: skip
    """by_rows: a program has rows; else posteriors. values: of these, else of gradients."""
    sizes = [min(most, power_of_2(size)) for most, size in zip(tile, (batch, batch, dims), strict=True)]
    own, following, other = weights
    return make_plan(
        -(-batch // sizes[0 if by_rows else 1]),
        4,
        batch,
        dims,
        *strides,
        own - other,
        following - other,
        *((other,) if values else ()),
        scale,
        STRATIFIED=own != other,
        **dict(zip(("ROWS", "COMPONENTS", "DIMS"), sizes, strict=True)),
    )


def _read(*tensors: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The tensors as a kernel reads them, and their strides."""
    tensors = tuple(tensor.resolve_neg() for tensor in tensors)
    return tensors, tuple(stride for tensor in tensors for stride in tensor.stride())


def allocate(z: Tensor, reduced: bool) -> tuple[Tensor, ...]:
    """The three results, log q(z) and each log q(z_k) of a row."""
    batch = z.shape[0]
    shape = [] if reduced else [batch]
    shapes = (shape, shape, shape, [batch], z.shape)
    return tuple(torch.empty(size, dtype=torch.float32, device=z.device) for size in shapes)


def total_correlation(z: Tensor, mu: Tensor, logvar: Tensor, weights: LogWeights, reduced: bool) -> tuple[Tensor, ...]:
    """The three parts, [B], or reduced to their means; then log q(z) and each log q(z_k), as backward takes them."""
    *values, joint, marginals = allocate(z, reduced)
    tensors, strides = _read(z, mu, logvar)
    plan = plan_decomposition(*z.shape, strides, tuple(weights), 1 / len(z), _OF_VALUES, True, True)
    part = z.new_empty(3, plan.programs, dtype=torch.float32) if reduced else None
    own_ticket = ticket(z.device) if reduced else None
    launch(total_correlation_kernel, plan, z.device, *tensors, joint, marginals, *values, part, own_ticket)
    return *values, joint, marginals


def total_correlation_backward(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    joint: Tensor,
    marginals: Tensor,
    value_grads: Sequence[Tensor | None],
    weights: LogWeights,
    needed: Sequence[bool],
) -> list[Tensor]:
    """The gradients that are needed: one launch for that of z, and one for those of the posteriors."""
    gradients = allocate_gradients((z, mu, logvar), needed)
    each = iter(gradients)
    z_grad, mu_grad, logvar_grad = (next(each) if need else None for need in needed)
    tensors, strides = _read(z, mu, logvar)
    grads = [None if grad is None else grad.resolve_neg() for grad in value_grads]
    reduced = any(grad is not None and grad.ndim == 0 for grad in grads)
    strides += tuple(grad.stride(0) if grad is not None and grad.ndim else 0 for grad in grads)
    sizes = (*z.shape, strides, tuple(weights), 1 / len(z) if reduced else 1.0)
    read = (*tensors, joint, marginals, *grads)
    if z_grad is not None:
        plan = plan_decomposition(*sizes, _OF_ROWS, True, False)
        launch(total_correlation_rows_kernel, plan, z.device, *read, z_grad, _sums_of(z_grad))
    if mu_grad is not None or logvar_grad is not None:
        plan = plan_decomposition(*sizes, _OF_POSTERIORS, False, False)
        sums = _sums_of(mu_grad), _sums_of(logvar_grad)
        launch(total_correlation_posteriors_kernel, plan, z.device, *read, mu_grad, logvar_grad, *sums)
    return gradients


def _sums_of(gradient: Tensor | None) -> Tensor | None:
    """What sums are made in before they are rounded: None where they are made in the gradient."""
    if gradient is None or gradient.dtype is torch.float32:
        return None
    return torch.empty_like(gradient, dtype=torch.float32)
