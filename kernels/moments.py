"""The kernels' view of a posterior's moments: mu and logvar as two tensors, or packed in one."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .layout import Strides, dense_strides, event_size, has_strides, with_dense_rows, with_strides
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
    half = mu.shape[dim] // 2
    inner = half * mu.stride(dim)
    # Splitting dim halves the distance along every dimension outside of it.
    strides = tuple(stride // 2 if stride > mu.stride(dim) else stride for stride in dense_strides(mu))
    # All of mu before all of logvar is nothing that takes turns.
    inner = 0 if inner == strides[0] else inner
    return Moments(mu.narrow(dim, 0, half), mu.narrow(dim, half, half), mu.stride(0), inner, strides)
