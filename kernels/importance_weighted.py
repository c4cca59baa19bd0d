"""Launching the kernels of the importance-weighted bound."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .importance import bound_backward_kernel, bound_kernel
from .launch import Plan, launch, make_plan, ticket
from .layout import remembered
from .mixture_log_prob import allocate_gradients, divided
from .tiles import power_of_2

# A tile [samples, rows]: 8 numbers of each tensor for each thread of 4 warps, and the rows of it are neighbours.
_TILE, _COLUMNS = 1024, 32


@remembered
def plan_bound(
    samples: int, rows: int, strides: tuple[int, ...], constant: float, backward: bool = False
) -> tuple[Plan, int]:
    """The plan, and the number of parts. Each program of backward has one tile."""
    columns = min(_COLUMNS, power_of_2(rows))
    tile = min(_TILE // columns, power_of_2(samples))
    row_tiles, sample_tiles = -(-rows // columns), -(-samples // tile)
    programs, tiles, parts = divided(row_tiles, sample_tiles)
    if backward:
        programs, parts = row_tiles * sample_tiles, sample_tiles
    numbers = (parts,) if backward else (tiles, parts)
    plan = make_plan(programs, 4, samples, rows, *strides, *numbers, constant, SAMPLES=tile, COLUMNS=columns)
    return plan, parts


def _read(tensors: Sequence[Tensor]) -> tuple[list[Tensor], tuple[int, ...]]:
    tensors = [tensor.resolve_neg() for tensor in tensors]
    return tensors, tuple(stride for tensor in tensors for stride in tensor.stride())


def allocate(first: Tensor) -> Tensor:
    return first.new_empty(first.shape[1], dtype=torch.float32)


def importance_weighted_bound(likelihood: Tensor, prior: Tensor, posterior: Tensor) -> Tensor:
    """The bound of log-densities [S, B], float32 [B]."""
    value = allocate(likelihood)
    if len(value) == 0:
        return value
    tensors, strides = _read((likelihood, prior, posterior))
    samples, rows = likelihood.shape
    plan, parts = plan_bound(samples, rows, strides, -math.log(samples))
    part = value.new_empty(2, parts, rows) if parts > 1 else None
    launch(bound_kernel, plan, value.device, *tensors, value, part, ticket(value.device) if parts > 1 else None)
    return value


def importance_weighted_bound_backward(
    likelihood: Tensor, prior: Tensor, posterior: Tensor, value: Tensor, value_grad: Tensor, needed: Sequence[bool]
) -> list[Tensor]:
    """The gradients that are needed, in one launch."""
    given = likelihood, prior, posterior
    gradients = allocate_gradients(given, needed)
    if len(value) == 0 or not gradients:
        return gradients
    tensors, strides = _read(given)
    value_grad = value_grad.resolve_neg()
    samples, rows = likelihood.shape
    plan, _ = plan_bound(samples, rows, (*strides, value_grad.stride(0)), -math.log(samples), True)
    each = iter(gradients)
    written = [next(each) if need else None for need in needed]
    launch(bound_backward_kernel, plan, value.device, *tensors, value, value_grad, *written)
    return gradients
