"""The kernels' view of a posterior's moments: mu and logvar as two tensors, or packed in one."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import Strides, dense_strides, has_strides, remembered, with_dense_rows, with_strides
from .tiles import Tiling, cut


class Layout(NamedTuple):
    """How mu and logvar lie: rows at distance row_stride, `inner` elements of each in turn (0: not interleaved)."""

    shape: torch.Size  # of each of the two
    strides: Strides  # of z: dense, in the order of mu
    row_stride: int
    inner: int
    batch: int
    event: int


class Moments(NamedTuple):
    """mu and logvar as the kernels take them: where both are packed in one tensor, `mu` is that tensor, which begins
    with mu.
    """

    mu: Tensor
    logvar: Tensor
    layout: Layout


def cut_moments(layout: Layout, per_row: bool, itemsize: int) -> Tiling:
    """Rows are needed where each has a sum of its own, or where they do not follow each other without a gap."""
    batch, event = layout.batch, layout.event
    without_gaps = layout.row_stride == (2 * event if layout.inner else event)
    if batch == 1 or (without_gaps and not per_row):
        return cut(1, batch * event, itemsize)
    return cut(batch, event, itemsize)


def read_moments(mu: Tensor, logvar: Tensor | None, dim: int) -> Moments:
    """The two forms of input: mu and logvar (dim says nothing), or, with logvar None, both packed in `mu`, halves
    along `dim`.
    """
    mu = with_dense_rows(mu)
    if logvar is None:
        layout = _packed_layout(mu.shape, mu.stride(), dense_strides(mu), dim)
        return Moments(mu, second_half(mu, layout.shape, dim), layout)
    if not has_strides(logvar, mu.stride()) or logvar.is_neg():
        mu, logvar = with_strides(mu, dense_strides(mu)), with_strides(logvar, dense_strides(mu))
    return Moments(mu, logvar, _layout(mu.shape, mu.stride(), dense_strides(mu)))


def second_half(packed: Tensor, shape: torch.Size, dim: int) -> Tensor:
    """That of a tensor along dim, of that shape. (Half the time of `Tensor.narrow`.)"""
    strides = packed.stride()
    return packed.as_strided(shape, strides, packed.storage_offset() + shape[dim] * strides[dim])


@remembered
def _layout(shape: torch.Size, strides: Strides, dense: Strides) -> Layout:
    return Layout(shape, dense, strides[0], 0, shape[0], prod(shape[1:]))


@remembered
def _packed_layout(shape: torch.Size, strides: Strides, dense: Strides, dim: int) -> Layout:
    half = shape[dim] // 2
    # Splitting dim halves the distance along every dimension outside of it.
    split = tuple(stride // 2 if stride > strides[dim] else stride for stride in dense)
    inner = half * strides[dim]
    half_shape = torch.Size((*shape[:dim], half, *shape[dim + 1 :]))
    # All of mu before all of logvar is nothing that takes turns.
    taking_turns = 0 if inner == split[0] else inner
    return Layout(half_shape, split, strides[0], taking_turns, shape[0], prod(half_shape[1:]))


@triton.jit
def moments_tile(first_column, INNER: tl.constexpr, COLUMNS: tl.constexpr):
    """Where a row's elements lie, as (int64 base, offsets [COLUMNS]), counted from the row's start.

    INNER = 0: one after the other. Otherwise mu and logvar take turns, INNER elements each (a packed tensor split
    along an inner dimension).
    """
    column = tl.arange(0, COLUMNS)
    if INNER == 0:
        return first_column, column
    # In 64 bits only where it must be: each element is divided.
    column += (first_column % INNER).to(tl.int32 if INNER < 2**29 else tl.int64)
    offsets = column + column // INNER * INNER
    if INNER % 8 == 0:
        # INNER elements run on; the compiler does not see it through the division.
        offsets = tl.max_contiguous(tl.multiple_of(offsets, 8), 8)
    return first_column // INNER * (2 * INNER), offsets
