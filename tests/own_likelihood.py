"""Likelihoods that are not fastvae's own, as a user writes them: whatever the list of operations is held to, they are
too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastvae.likelihoods import Likelihood, Term

if TYPE_CHECKING:
    import triton.language as tl

    from fastvae.kernels import numerics


@Term
def smooth_l1(parameters, target, SETTINGS: tl.constexpr, FAST: tl.constexpr):
    """d^2 / (sqrt(d^2 + eps^2) + eps), which is sqrt(d^2 + eps^2) - eps without its cancellation; d = t - mean."""
    error = target - parameters[0]
    root = tl.sqrt(error * error + SETTINGS[0] * SETTINGS[0])
    slope = error * numerics.reciprocal(root, FAST)
    return error * error * numerics.reciprocal(root + SETTINGS[0], FAST), (-slope, slope)


@dataclass(frozen=True)
class SmoothL1(Likelihood):
    """sqrt((t - mean)^2 + eps^2) - eps: the absolute error, smooth near 0. One parameter, and a setting."""

    eps: float = 0.125
    parameters = ("mean_value",)
    target = "number"
    roundings = (12, 9, 9)
    target_has_slope = True
    term = smooth_l1

    def formula(self, mean_value: Tensor, target: Tensor) -> Tensor:
        squared = (target - mean_value).square()
        return squared / (torch.sqrt(squared + self.eps**2) + self.eps)

    def mean(self, mean_value: Tensor) -> Tensor:
        return mean_value


@Term
def gaussian(parameters, target, SETTINGS: tl.constexpr, FAST: tl.constexpr):
    """(d^2 e^-s + s + log 2 pi) / 2, d = t - m; slopes -d e^-s and (1 - d^2 e^-s) / 2."""
    mean, logvar = parameters
    scaled = (target - mean) * numerics.exp(-logvar, FAST)
    squared = (target - mean) * scaled
    return 0.5 * (squared + logvar) + 0.9189385332046727, (-scaled, 0.5 - 0.5 * squared)


@dataclass(frozen=True)
class LearnedGaussian(Likelihood):
    """A Gaussian whose variance is learned for each element. Two parameters, and no slope of the target."""

    parameters = ("mean", "log_variance")
    target = "unit"
    roundings = (11, 6, 10)
    term = gaussian

    def formula(self, mean: Tensor, log_variance: Tensor, target: Tensor) -> Tensor:
        return 0.5 * ((target - mean).square() * torch.exp(-log_variance) + log_variance + math.log(2 * math.pi))

    def mean(self, mean: Tensor, log_variance: Tensor) -> Tensor:
        return mean

    def draw(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        mean, logvar = (torch.randn(shape, generator=generator) for _ in range(2))
        return mean, logvar, torch.rand(shape, generator=generator)


OWN = (SmoothL1(), LearnedGaussian())
