"""The kernels' view of a posterior's moments: mu and logvar as two tensors, or packed in one."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import Strides, dense_strides, event_size, has_strides, remembered, with_dense_rows, with_strides
from .tiles import Tiling, cut


class Moments(NamedTuple):
    """mu and logvar as the kernels take them, and how they lie: rows at distance row_stride, `inner` elements of each
    in turn (0: not interleaved).
    """

    mu: Tensor
    logvar: Tensor
    row_stride: int
    inner: int
    strides: Strides  # of z: dense, in the order of mu

    @property
    def batch(self) -> int:
        return self.mu.shape[0]

    @property
    def event(self) -> int:
        return event_size(self.mu)

    def cut(self, per_row: bool) -> Tiling:
        """Rows are needed where each has a sum of its own, or where they do not follow each other without a gap."""
        without_gaps = self.row_stride == (2 * self.event if self.inner else self.event)
        if self.batch == 1 or (without_gaps and not per_row):
            return cut(1, self.batch * self.event, self.mu.element_size())
        return cut(self.batch, self.event, self.mu.element_size())


def read_moments(mu: Tensor, logvar: Tensor | None, dim: int) -> Moments:
    """The two forms of input: mu and logvar (dim says nothing), or, with logvar None, both packed in `mu`, halves
    along `dim`.
    """
    mu = with_dense_rows(mu)
    if logvar is not None:
        if not has_strides(logvar, mu.stride()) or logvar.is_neg():
            mu, logvar = with_strides(mu, dense_strides(mu)), with_strides(logvar, dense_strides(mu))
        return Moments(mu, logvar, mu.stride(0), 0, dense_strides(mu))
    shape, inner, strides = _halves(mu.shape, mu.stride(), dense_strides(mu), dim)
    return Moments(*halves(mu, shape, dim), mu.stride(0), inner, strides)


def halves(packed: Tensor, shape: torch.Size, dim: int) -> tuple[Tensor, Tensor]:
    """Both halves, of that shape, of a tensor along dim. (Half the time of two `Tensor.narrow`.)"""
    strides = packed.stride()
    first = packed.as_strided(shape, strides)
    return first, packed.as_strided(shape, strides, packed.storage_offset() + shape[dim] * strides[dim])


@remembered
def _halves(shape: torch.Size, strides: Strides, dense: Strides, dim: int) -> tuple[torch.Size, int, Strides]:
    """The shape of one half, how many of its elements follow each other, and the strides of z."""
    half = shape[dim] // 2
    # Splitting dim halves the distance along every dimension outside of it.
    split = tuple(stride // 2 if stride > strides[dim] else stride for stride in dense)
    inner = half * strides[dim]
    # All of mu before all of logvar is nothing that takes turns.
    return torch.Size((*shape[:dim], half, *shape[dim + 1 :])), 0 if inner == split[0] else inner, split


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
