"""The moments of a posterior, mu and logvar: how they lie in memory, and where a kernel finds those of a row."""

from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import Strides, dense_strides, has_strides, remembered, with_dense_rows, with_strides
from .tiles import Tiling, cut


class Layout(NamedTuple):
    """The layout of mu and logvar: rows at distance row_stride, with `inner` elements of mu and of logvar in turn (0:
    not interleaved).
    """

    shape: torch.Size  # of each of the two
    strides: Strides  # of z: dense, in the order of mu
    row_stride: int
    inner: int
    batch: int
    event: int

    def tiles(self, per_row: bool, itemsize: int) -> Tiling:
        """Rows are needed if each has its own sum, or if there are gaps between them."""
        without_gaps = self.row_stride == (2 * self.event if self.inner else self.event)
        if self.batch == 1 or (without_gaps and not per_row):
            return cut(1, self.batch * self.event, itemsize)
        return cut(self.batch, self.event, itemsize)


class Moments(NamedTuple):
    """mu and logvar as the kernels take them. If both are packed in one tensor, `mu` is that tensor, which begins with
    mu.
    """

    mu: Tensor
    logvar: Tensor
    layout: Layout


def read_moments(mu: Tensor, logvar: Tensor | None, dim: int) -> Moments:
    """Read the two forms of input: mu and logvar (dim is not used), or with logvar None both packed in `mu`, as halves
    along `dim`.
    """
    mu = with_dense_rows(mu)
    dense = dense_strides(mu)
    if logvar is None:
        layout = packed_layout(mu.shape, mu.stride(), dense, dim)
        return Moments(mu, second_half(mu, layout.shape, dim), layout)
    if not has_strides(logvar, mu.stride()) or logvar.is_neg():
        mu, logvar = with_strides(mu, dense), with_strides(logvar, dense)
    return Moments(mu, logvar, _layout(mu.shape, mu.stride(), dense))


def second_half(packed: Tensor, shape: torch.Size, dim: int) -> Tensor:
    """The second half of a tensor along dim, of the given shape. (It takes half the time of `Tensor.narrow`.)"""
    strides = packed.stride()
    return packed.as_strided(shape, strides, packed.storage_offset() + shape[dim] * strides[dim])


@remembered
def _layout(shape: torch.Size, strides: Strides, dense: Strides) -> Layout:
    return Layout(shape, dense, strides[0], 0, shape[0], prod(shape[1:]))


@remembered
def packed_layout(shape: torch.Size, strides: Strides, dense: Strides, dim: int) -> Layout:
    half = shape[dim] // 2
    # Splitting dim halves the distance along every dimension outside of it.
    split = tuple(stride // 2 if stride > strides[dim] else stride for stride in dense)
    inner = half * strides[dim]
    half_shape = torch.Size((*shape[:dim], half, *shape[dim + 1 :]))
    # All of mu comes before all of logvar: not interleaved.
    return Layout(half_shape, split, strides[0], 0 if inner == split[0] else inner, shape[0], prod(half_shape[1:]))


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
