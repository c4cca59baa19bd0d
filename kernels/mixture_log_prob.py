"""Launching the kernels of the log-density of a mixture."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .launch import Plan, launch, make_plan, ticket
from .layout import remembered
from .mixture import mixture_components_kernel, mixture_kernel, mixture_rows_kernel
from .tiles import power_of_2

# Tiles [rows, components, dimensions]: of values, and of the gradients of z and of the components. Of more dimensions,
# a sum over them would take more steps between threads than a thread has to add. The tile of values takes 62 registers,
# but 226 of a gradient (sm_90, triton 3.9). With the tiles of gradients a thread of 4 warps has 8 elements. With 4, of
# [4, 32, 4], an element takes 112 instructions for z, not 90, and 186 for the components, not 131 (sm_90, triton 3.9).
# Only the components for sm_80 with triton 3.6 take fewer then, 117, not 125. Not measured on a GPU.
_OF_VALUES, _OF_ROWS, _OF_COMPONENTS = (32, 32, 4), (16, 16, 4), (32, 8, 4)
# Where a side has few tiles, the other is shared by so many programs in all: about two for each unit of a large card.
# Not measured on a GPU.
_PROGRAMS = 256


def divided(own: int, other: int) -> tuple[int, int, int]:
    """How `own` tiles of one side, for each of which programs go through `other` tiles, are divided: programs, tiles
    for each, and parts. It depends on the problem only, so that sums are of the same terms everywhere.
    """
    tiles = -(-other // max(1, min(other, _PROGRAMS // own)))
    parts = -(-other // tiles)
    return own * parts, tiles, parts


@remembered
def plan_mixture(
    rows: int,
    components: int,
    dims: int,
    strides: tuple[int, ...],
    constant: float,
    gradients: bool = False,
    by_rows: bool = True,
    **constants: bool,
) -> tuple[Plan, int]:
    """The plan, and the number of parts. by_rows: a program has rows; else components."""
    most = (_OF_ROWS if by_rows else _OF_COMPONENTS) if gradients else _OF_VALUES
    tile = [min(side, power_of_2(size)) for side, size in zip(most, (rows, components, dims), strict=True)]
    row_tiles, component_tiles = -(-rows // tile[0]), -(-components // tile[1])
    sides = (row_tiles, component_tiles) if by_rows else (component_tiles, row_tiles)
    programs, tiles, parts = divided(*sides)
    plan = make_plan(
        programs,
        4,
        rows,
        components,
        dims,
        *strides,
        tiles,
        parts,
        constant,
        **constants,
        **dict(zip(("ROWS", "COMPONENTS", "DIMS"), tile, strict=True)),
    )
    return plan, parts


def _read(
    z: Tensor, mu: Tensor, logvar: Tensor, log_weights: Tensor | None
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor | None], tuple[int, ...], float]:
    """The tensors as a kernel reads them, their strides, and the constant of all terms."""
    z, mu, logvar = z.resolve_neg(), mu.resolve_neg(), logvar.resolve_neg()
    weights = None if log_weights is None else log_weights.resolve_neg()
    strides = (*z.stride(), *mu.stride(), *logvar.stride(), 0 if weights is None else weights.stride(0))
    components, dims = mu.shape
    constant = -0.5 * dims * math.log(2 * math.pi) - (math.log(components) if log_weights is None else 0.0)
    return (z, mu, logvar, weights), strides, constant


def allocate(z: Tensor) -> Tensor:
    return z.new_empty(z.shape[0], dtype=torch.float32)


def mixture_log_prob(z: Tensor, mu: Tensor, logvar: Tensor, log_weights: Tensor | None) -> Tensor:
    """The value of z [B, K], float32 [B]."""
    value = allocate(z)
    if len(value) == 0:
        return value
    tensors, strides, constant = _read(z, mu, logvar, log_weights)
    plan, parts = plan_mixture(len(z), *mu.shape, strides, constant)
    part = value.new_empty(2, parts, len(z)) if parts > 1 else None
    launch(mixture_kernel, plan, z.device, *tensors, value, part, ticket(z.device) if parts > 1 else None)
    return value


def allocate_gradients(tensors: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor]:
    """Uninitialised gradients of those that need one, dense."""
    return [
        torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        for tensor, need in zip(tensors, needed, strict=True)
        if need and tensor is not None
    ]


def mixture_log_prob_backward(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    log_weights: Tensor | None,
    value: Tensor,
    value_grad: Tensor,
    needed: Sequence[bool],
) -> list[Tensor]:
    """The gradients that are needed: one launch for that of z, and one for those of the components."""
    given = z, mu, logvar, log_weights
    gradients = allocate_gradients(given, needed)
    if len(z) == 0:
        return [gradient.zero_() for gradient in gradients]
    each = iter(gradients)
    z_grad, mu_grad, logvar_grad, weights_grad = (next(each) if need else None for need in needed)
    tensors, strides, constant = _read(*given)
    value_grad = value_grad.resolve_neg()
    sizes = (len(z), *mu.shape, (*strides, value_grad.stride(0)), constant)
    if z_grad is not None:
        plan, parts = plan_mixture(*sizes, True)
        part = _parts_of(z_grad, parts, z_grad.dtype is torch.float32)
        own_ticket = ticket(z.device) if parts > 1 else None
        launch(mixture_rows_kernel, plan, z.device, *tensors, value, value_grad, z_grad, part, own_ticket)
    if any(needed[1:]):
        plan, parts = plan_mixture(*sizes, True, False, NEEDS_SLOPES=needed[1] or needed[2])
        of_components = mu_grad, logvar_grad, weights_grad
        launch(
            mixture_components_kernel,
            plan,
            z.device,
            *tensors,
            value,
            value_grad,
            *of_components,
            *[None if gradient is None else _parts_of(gradient, parts) for gradient in of_components],
            ticket(z.device) if parts > 1 else None,
        )
    return gradients


def _parts_of(gradient: Tensor, parts: int, in_place: bool = False) -> Tensor | None:
    """What sums are made in before they are put together and rounded: None where they are made in the gradient."""
    if parts == 1 and in_place:
        return None
    return gradient.new_empty(parts, *gradient.shape, dtype=torch.float32)
