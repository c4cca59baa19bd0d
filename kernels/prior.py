"""The prior of a posterior, another diagonal Gaussian: how its halves lie, and how the kernels read a tile of them."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .layout import dense_strides, dense_strides_of, has_strides, with_strides
from .moments import Layout, packed_layout, second_half
from .numerics import exp, to_float32
from .scale import log_variance


class PriorLayout(NamedTuple):
    """How the prior's halves lie, each as the rows of a posterior's: `inner` as in `Layout`, the distance of its rows,
    and whether one row is that of all samples.
    """

    inner: int = 0
    mu_stride: int = 0
    second_stride: int = 0
    mu_shared: bool = False
    second_shared: bool = False

    @property
    def shared(self) -> bool:
        return self.mu_shared or self.second_shared

    def has_gaps(self, event: int) -> bool:
        """Whether its rows do not follow each other as those of a posterior do that is one row."""
        distance = 2 * event if self.inner else event
        return self.shared or self.mu_stride != distance or self.second_stride != distance


class Prior(NamedTuple):
    """The prior as the kernels take it: where both halves are packed in one tensor, `mu` is that tensor, which begins
    with mu.
    """

    mu: Tensor | None
    second: Tensor | None
    layout: PriorLayout


def read_prior(mu: Tensor | None, second: Tensor | None, dim: int, layout: Layout) -> Prior:
    """The two forms of a prior, as `read_moments` takes those of a posterior, in the order of the posterior's
    elements: as they are where they lie so, else copies.
    """
    if mu is None:
        return Prior(None, None, PriorLayout())
    shared = layout.batch != 1 and mu.shape[0] == 1
    if second is None:
        mu = _in_order(mu, layout)
        found = packed_layout(mu.shape, mu.stride(), dense_strides(mu), dim)
        stride = 0 if shared else mu.stride(0)
        return Prior(mu, second_half(mu, found.shape, dim), PriorLayout(found.inner, stride, stride, shared, shared))
    mu, second = _in_order(mu, layout), _in_order(second, layout)
    second_shared = layout.batch != 1 and second.shape[0] == 1
    strides = [0 if one else tensor.stride(0) for one, tensor in ((shared, mu), (second_shared, second))]
    return Prior(mu, second, PriorLayout(0, *strides, shared, second_shared))


def _in_order(tensor: Tensor, layout: Layout) -> Tensor:
    """The tensor with rows that are dense in the order of the posterior's."""
    strides = dense_strides_of(tensor.shape, layout.strides)
    if has_strides(tensor, (tensor.stride(0), *strides[1:])) and not tensor.is_neg():
        return tensor
    return with_strides(tensor, strides)


@triton.jit
def read_shared_prior(
    mu_ptr, second_ptr, at, inside_column, scale_eps, log_eps, low, high,
    SCALE: tl.constexpr, HAS_EPS: tl.constexpr, CLAMP: tl.constexpr,
    MU_SHARED: tl.constexpr, SECOND_SHARED: tl.constexpr, COLUMNS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """(mu, second, logvar, d logvar / d second), [1, columns], of the halves that are shared by all rows. A half that
    is not shared is 0 here, and `read_prior_of_rows` reads it.
    """
    mu = tl.zeros([1, COLUMNS], tl.float32)
    second, logvar, slope = mu, mu, mu
    if MU_SHARED:
        mu = to_float32(tl.load(mu_ptr + at, mask=inside_column, other=0.0), FAST)[None, :]
    if SECOND_SHARED:
        second = to_float32(tl.load(second_ptr + at, mask=inside_column, other=1.0), FAST)[None, :]
        logvar, slope = log_variance(second, scale_eps, log_eps, low, high, SCALE, HAS_EPS, CLAMP, FAST)
    return mu, second, logvar, slope


@triton.jit
def read_prior_of_rows(
    shared, mu_ptr, second_ptr, at, row, inside, mu_stride, second_stride, scale_eps, log_eps, low, high,
    SCALE: tl.constexpr, HAS_EPS: tl.constexpr, CLAMP: tl.constexpr,
    MU_SHARED: tl.constexpr, SECOND_SHARED: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """(mu, second, logvar, d logvar / d second) of rows, [rows, columns], or [1, columns] of a half that is shared:
    `shared` is what `read_shared_prior` returned.
    """
    mu, second, logvar, slope = shared
    if not MU_SHARED:
        here = at[None, :] + row[:, None] * mu_stride
        mu = to_float32(tl.load(mu_ptr + here, mask=inside, other=0.0), FAST)
    if not SECOND_SHARED:
        here = at[None, :] + row[:, None] * second_stride
        second = to_float32(tl.load(second_ptr + here, mask=inside, other=1.0), FAST)
        logvar, slope = log_variance(second, scale_eps, log_eps, low, high, SCALE, HAS_EPS, CLAMP, FAST)
    return mu, second, logvar, slope


@triton.jit
def squared_distance(mu, prior_mu, prior_logvar, FAST: tl.constexpr):
    """((mu - prior_mu)^2 / exp(prior_logvar), (mu - prior_mu) / exp(prior_logvar)).

    1 / std is applied as two factors that stay finite: where it overflows, a difference of 0 would make NaN.
    """
    quarter = -0.25 * prior_logvar
    root = exp(tl.where(quarter > 88.0, 88.0, quarter), FAST)
    scaled = (mu - prior_mu) * root * root
    return scaled * scaled, scaled * root * root
