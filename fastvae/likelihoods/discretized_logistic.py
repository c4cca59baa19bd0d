"""The discretised logistic likelihood: a probability for each grey value.

Kingma et al., "Improved Variational Inference with Inverse Autoregressive Flow", 2016, section 5; Salimans et al.,
"PixelCNN++", 2017, section 2.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fastvae.likelihoods.likelihood import Likelihood, Term, check_minimum
from fastvae.reference.precision import clamped

if TYPE_CHECKING:
    import triton.language as tl

    from fastvae.kernels import numerics


@Term
def term(parameters, target, SETTINGS: tl.constexpr, FAST: tl.constexpr):
    """log(1 + e^-a) + log(1 + e^b) - log(1 - e^-(a - b)), and its slopes, with a, b = (d +- h) / scale. The lowest bin
    has the first part only, and the highest bin the second part only.

    The mass of a bin is symmetric in d, so a and b are computed from |d|, and no term is negative. In an end bin whose
    mean lies on the inner side (`beyond`), the other part is used, because the sign of d is lost. The slope by |d| is
    sigma(a) sigma(b) (1 - e^-(a + b)) / scale, which does not cancel for small d. Let w = a - b. Below
    w = log 2, log(1 - e^-w) is computed as log w - w/2 + w^2/24 - ... with log w = log(2 h) - log_scale, and above as
    -log1p(1 / (e^w - 1)).
    """
    mean, log_scale = parameters
    if len(SETTINGS) == 3:
        log_scale = tl.maximum(log_scale, SETTINGS[2], propagate_nan=tl.PropagateNan.ALL)
    inverse = numerics.exp(-log_scale, FAST)
    d = tl.fma(2.0, target, -1.0) - mean
    size = tl.abs(d)
    a, b, w = (size + SETTINGS[0]) * inverse, (size - SETTINGS[0]) * inverse, (2.0 * SETTINGS[0]) * inverse
    lowest, highest = target < 0.5 * SETTINGS[0], target > 1.0 - 0.5 * SETTINGS[0]
    at_an_end = lowest | highest
    beyond = (d > 0) ^ lowest  # at an end; in other bins whether d is positive

    tail_a, tail_b = numerics.exp(-a, FAST), numerics.exp(-tl.abs(b), FAST)
    r_a, r_b = numerics.reciprocal(1.0 + tail_a, FAST), numerics.reciprocal(1.0 + tail_b, FAST)
    low_a, high_b = tail_a * r_a, tl.where(b >= 0, r_b, tail_b * r_b)  # sigmoids of -a and b
    value_a = numerics.log1p(tail_a)
    value_b = tl.maximum(b, 0.0, propagate_nan=tl.PropagateNan.ALL) + numerics.log1p(tail_b)

    tail_w = numerics.exp(-w, FAST)
    ratio = tl.minimum(tail_w, 0.5) * numerics.reciprocal(1.0 - tl.minimum(tail_w, 0.5), FAST)
    square = w * w
    series = tl.fma(tl.fma(-5.511463844797178e-06, square, 3.4722222222222224e-04), square, -0.041666666666666664)
    wide = tl.fma(series, square, tl.fma(0.5, w, log_scale - SETTINGS[1]))
    slopes = tl.fma(3.306878306878307e-05, square, -1.388888888888889e-03)
    slopes = tl.fma(tl.fma(slopes, square, 0.08333333333333333), square, tl.fma(-0.5, w, 1.0))
    narrow = w >= 0.6931471805599453

    twice = -2.0 * size * inverse
    inner = r_a * high_b * -numerics.expm1(twice, numerics.exp(twice, FAST))
    end = tl.where(beyond, value_b, value_a)
    value = tl.where(at_an_end, end, value_a + value_b + tl.where(narrow, numerics.log1p(ratio), wide))
    by_mean = tl.where(at_an_end, tl.where(beyond, high_b, low_a), inner)
    by_mean *= tl.where(highest | (beyond & (d > 0)), -inverse, inverse)
    scaled_a, scaled_b = a * low_a, -b * high_b
    end = tl.where(beyond, scaled_b, scaled_a)
    by_scale = tl.where(at_an_end, end, scaled_a + scaled_b + tl.where(narrow, w * ratio, slopes))
    if len(SETTINGS) == 3:
        by_scale = tl.where(parameters[1] >= SETTINGS[2], by_scale, 0.0)
    return value, (by_mean, by_scale)


@dataclass(frozen=True)
class DiscretizedLogistic(Likelihood):
    """-log P(t) of t = k / (bins - 1), the mass of a logistic distribution in a bin around 2 t - 1, for each element.

    The mass is sigma((d + h) / scale) - sigma((d - h) / scale) with d = 2 t - 1 - mean, scale = e^log_scale and h = 1 /
    (bins - 1). The first bin, t = 0, also has the mass below it, and the last bin, t = 1, the mass above it. The
    parameters are on the scale [-1, 1]. A float target should be k / (bins - 1) for a bin k. Any other float has a bin
    of the same width around it. uint8 is read as t / 255, and raises an error if the value of some byte is no bin.
    ``min_log_scale``: log_scale counts as at least this number, and has no gradient below it.

    Choose it for images of bytes. It is the probability of the bytes in a file, so nats can be converted to bits per
    dimension.
    """

    bins: int = 256
    min_log_scale: float | None = None

    parameters = ("mean", "log_scale")
    target = "unit"
    roundings = (28, 52, 32)
    heavy = True  # 16 elements a thread spill on sm_90 (triton 3.9)
    term = term

    def __post_init__(self) -> None:
        if isinstance(self.bins, bool) or not isinstance(self.bins, int):
            raise TypeError(f"bins must be an integer, got {self.bins!r}")
        if self.bins < 2:
            raise ValueError(f"bins must be at least 2, got {self.bins}")
        check_minimum("min_log_scale", self.min_log_scale)
        super().__post_init__()

    @property
    def reads_bytes(self) -> bool:
        return 255 % (self.bins - 1) == 0 if self.bins < 256 else self.bins == 256

    @property
    def settings(self) -> tuple[float, ...]:
        half = 1 / (self.bins - 1)
        clamp = () if self.min_log_scale is None else (float(self.min_log_scale),)
        return half, math.log(2 * half), *clamp

    def formula(self, mean: Tensor, log_scale: Tensor, target: Tensor) -> Tensor:
        half = 1 / (self.bins - 1)
        if self.min_log_scale is not None:
            log_scale = clamped(log_scale, self.min_log_scale)
        d = (2 * target - 1) - mean
        highest = target > 1 - half / 2
        at_an_end = highest | (target < half / 2)
        outer = softplus((torch.where(highest, d, -d) - half) * torch.exp(-log_scale), threshold=40)
        # What the ends do not have is computed from zeros there, so that no infinity reaches their gradients.
        d, log_scale = torch.where(at_an_end, 0.0, d), torch.where(at_an_end, 0.0, log_scale)
        inverse = torch.exp(-log_scale)
        inner = softplus((d - half) * inverse, threshold=40) + self._width(log_scale, 2 * half * inverse)
        return torch.where(at_an_end, outer, outer + inner)

    def _width(self, log_scale: Tensor, w: Tensor) -> Tensor:
        """-log(1 - e^-w), w = 2 h / scale: also for scales so large that w underflows."""
        small = w.clamp(1e-10, 1.0)
        wide = log_scale - self.settings[1] - torch.log(-torch.expm1(-small) / small)
        return torch.where(w < math.log(2), wide, -torch.log1p(-torch.exp(-w.clamp(min=0.5))))

    def mean(self, mean: Tensor, *_: Tensor) -> Tensor:
        """The distribution's centre, in [0, 1]."""
        return 0.5 * mean.clamp(-1, 1) + 0.5

    def draw(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        bins = torch.rand(shape, generator=generator).mul(1.2 * self.bins).sub(0.1 * self.bins).floor()
        target = bins.clamp(0, self.bins - 1) / (self.bins - 1)
        log_scale = 1.5 * torch.randn(shape, generator=generator) + 2.5 - math.log(self.bins - 1)
        return 2 * target - 1 + 3 * log_scale.exp() * torch.randn(shape, generator=generator), log_scale, target
