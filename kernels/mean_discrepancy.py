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

# A tile [rows, rows of the other tile, dimensions] of the value, and of gradients. The value's takes 96 registers. A
# gradient of the same tile would take 96 to 120, of which triton 3.6 spills some, and of this one it takes 64 (117 with
# triton 3.6) and fewer instructions (sm_90, triton 3.9). Not measured on a GPU.
_TILE, _TILE_OF_GRADIENTS = (32, 4), (16, 8)


def tiles_of(rows: int, prior_rows: int, most: int) -> tuple[int, int, int]:
    """The rows of a tile, the tiles of z, and those of both sets."""
    tile = min(most, power_of_2(max(rows, prior_rows)))
    z_tiles = -(-rows // tile)
    return tile, z_tiles, z_tiles + -(-prior_rows // tile)


@remembered
def plan_value(
    rows: int, prior_rows: int, dims: int, strides: tuple[int, ...], kernel: str, unbiased: bool
) -> tuple[Plan, int]:
    """The plan, and the number of programs."""
    most, most_dims = _TILE
    tile, z_tiles, all_tiles = tiles_of(rows, prior_rows, most)
    programs, tiles, parts = divided(all_tiles, all_tiles // 2 + 1)
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
        rows * (rows - unbiased),
        prior_rows * (prior_rows - unbiased),
        IMQ=kernel == "imq",
        UNBIASED=unbiased,
        ROWS=tile,
        DIMS=min(most_dims, power_of_2(dims)),
    )
    return plan, programs


@remembered
def plan_gradients(
    rows: int,
    prior_rows: int,
    dims: int,
    strides: tuple[int, ...],
    kernel: str,
    unbiased: bool,
    needed: tuple[bool, bool],
) -> tuple[Plan, int]:
    """The plan, and the number of parts."""
    most, most_dims = _TILE_OF_GRADIENTS
    tile, z_tiles, all_tiles = tiles_of(rows, prior_rows, most)
    first = 0 if needed[0] else z_tiles
    programs, tiles, parts = divided((all_tiles if needed[1] else z_tiles) - first, all_tiles)
    plan = make_plan(
        programs,
        4,
        rows,
        prior_rows,
        dims,
        *strides,
        first,
        z_tiles,
        all_tiles,
        tiles,
        parts,
        needed[0] * rows,
        needed[0] * rows + needed[1] * prior_rows,
        # A pair of one set is in the value's sum twice, and the slope of the squared distance is twice the difference.
        -4.0 / (rows * (rows - unbiased)),
        -4.0 / (prior_rows * (prior_rows - unbiased)),
        4.0 / (rows * prior_rows),
        IMQ=kernel == "imq",
        ROWS=tile,
        DIMS=min(most_dims, power_of_2(dims)),
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
    plan, parts = plan_gradients(*_sizes(z, prior_z), kernel, unbiased, (needed[0], needed[1]))
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
