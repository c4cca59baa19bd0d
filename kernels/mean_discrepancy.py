"""Launching the kernels of the maximum mean discrepancy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .discrepancy import discrepancy_gradients_kernel, discrepancy_kernel
from .launch import Plan, launch, make_plan, ticket
from .layout import remembered
from .mixture_log_prob import allocate_gradients, divided
from .tiles import power_of_2

# A tile [rows, rows of the other tile, dimensions], as that of a mixture.
_ROWS, _DIMS = 32, 4
_ROWS_OF_GRADIENTS, _OTHERS = 4, 32


def tiles_of(rows: int, tile: int) -> int:
    return -(-rows // tile)


@remembered
def plan_value(
    rows: int, prior_rows: int, dims: int, strides: tuple[int, ...], kernel: str, unbiased: bool
) -> tuple[Plan, int]:
    """The plan, and the number of programs."""
    tile = min(_ROWS, power_of_2(max(rows, prior_rows)))
    z_tiles = tiles_of(rows, tile)
    all_tiles = z_tiles + tiles_of(prior_rows, tile)
    programs, tiles, parts = divided(all_tiles, all_tiles // 2 + 1)
    less = 1 if unbiased else 0
    plan = make_plan(
        programs,
        4,
        rows,
        prior_rows,
        dims,
        *strides,
        z_tiles,
        all_tiles,
        tiles,
        parts,
        rows * (rows - less),
        prior_rows * (prior_rows - less),
        IMQ=kernel == "imq",
        UNBIASED=unbiased,
        ROWS=tile,
        DIMS=min(_DIMS, power_of_2(dims)),
    )
    return plan, programs


@remembered
def plan_gradients(
    rows: int, prior_rows: int, dims: int, strides: tuple[int, ...], kernel: str, unbiased: bool, needed: Sequence[bool]
) -> tuple[Plan, int]:
    """The plan, and the number of parts."""
    most = power_of_2(max(rows, prior_rows))
    tile, other_tile = min(_ROWS_OF_GRADIENTS, most), min(_OTHERS, most)
    z_row_tiles = tiles_of(rows, tile) if needed[0] else 0
    row_tiles = z_row_tiles + (tiles_of(prior_rows, tile) if needed[1] else 0)
    z_tiles = tiles_of(rows, other_tile)
    all_tiles = z_tiles + tiles_of(prior_rows, other_tile)
    programs, tiles, parts = divided(row_tiles, all_tiles)
    less = 1 if unbiased else 0
    plan = make_plan(
        programs,
        4,
        rows,
        prior_rows,
        dims,
        *strides,
        z_row_tiles,
        z_tiles,
        all_tiles,
        tiles,
        parts,
        rows if needed[0] else 0,
        needed[0] * rows + needed[1] * prior_rows,
        # A pair of one set is in the value's sum twice, and the squared distance has twice the difference as its slope.
        -4.0 / max(1, rows * (rows - less)),
        -4.0 / max(1, prior_rows * (prior_rows - less)),
        4.0 / (rows * prior_rows),
        IMQ=kernel == "imq",
        ROWS=tile,
        OTHERS=other_tile,
        DIMS=min(_DIMS, power_of_2(dims)),
    )
    return plan, parts


def allocate(z: Tensor) -> Tensor:
    return z.new_empty((), dtype=torch.float32)


def mean_discrepancy(z: Tensor, prior_z: Tensor, kernel: str, rates: Sequence[float], unbiased: bool) -> Tensor:
    """The value, float32 []."""
    z, prior_z = z.resolve_neg(), prior_z.resolve_neg()
    value = allocate(z)
    plan, programs = plan_value(*_sizes(z, prior_z), kernel, unbiased)
    part = value.new_empty(2, programs)
    launch(discrepancy_kernel, plan, z.device, z, prior_z, value, part, ticket(z.device), tuple(rates))
    return value


def mean_discrepancy_backward(
    z: Tensor,
    prior_z: Tensor,
    value_grad: Tensor,
    kernel: str,
    rates: Sequence[float],
    unbiased: bool,
    needed: Sequence[bool],
) -> list[Tensor]:
    """The gradients that are needed, in one launch."""
    z, prior_z = z.resolve_neg(), prior_z.resolve_neg()
    gradients = allocate_gradients((z, prior_z), needed)
    plan, parts = plan_gradients(*_sizes(z, prior_z), kernel, unbiased, tuple(needed))
    if parts == 1 and len(gradients) == 1 and gradients[0].dtype is torch.float32:
        sums, stored = gradients[0], [None, None]
    else:
        sums = z.new_empty(parts, sum(map(len, gradients)), z.shape[1], dtype=torch.float32)
        each = iter(gradients)
        stored = [next(each) if need else None for need in needed]
    launch(
        discrepancy_gradients_kernel,
        plan,
        z.device,
        z,
        prior_z,
        value_grad.resolve_neg(),
        sums,
        *stored,
        ticket(z.device) if parts > 1 else None,
        tuple(rates),
    )
    return gradients


def _sizes(z: Tensor, prior_z: Tensor) -> tuple[int, int, int, tuple[int, ...]]:
    return len(z), len(prior_z), z.shape[1], (*z.stride(), *prior_z.stride())
