"""The Gaussian likelihood, with a learned or fixed variance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from fastvae.likelihoods.likelihood import Likelihood, Term, check_minimum, check_scale
from fastvae.reference.precision import clamped, sigmoid

if TYPE_CHECKING:
    import triton.language as tl

    from fastvae.kernels import numerics


@Term
def learned(parameters, target, SETTINGS: tl.constexpr, FAST: tl.constexpr):
    """((t - m)^2 e^-l + l) / 2 + c; slopes -(t - m) e^-l, (1 - (t - m)^2 e^-l) / 2 and (t - m) e^-l."""
    mean, logvar = parameters
    if len(SETTINGS) == 4:
        logvar = tl.maximum(logvar, SETTINGS[3], propagate_nan=tl.PropagateNan.ALL)
    if SETTINGS[0]:
        mean, derivative = numerics.sigmoid(mean, FAST)
    error = target - mean
    scaled = error * numerics.exp(-logvar, FAST)
    squared = error * scaled
    slope = -scaled
    if SETTINGS[0]:
        slope *= derivative
    by_logvar = tl.fma(-0.5, squared, 0.5)
    if len(SETTINGS) == 4:
        by_logvar = tl.where(parameters[1] >= SETTINGS[3], by_logvar, 0.0)
    return tl.fma(0.5, squared + logvar, SETTINGS[1]), (slope, by_logvar, scaled)


@Term
def fixed(parameters, target, SETTINGS: tl.constexpr, FAST: tl.constexpr):
    """(t - m)^2 / (2 std^2) + c; slopes -(t - m) and t - m, times 1 / std^2."""
    mean = parameters[0]
    if SETTINGS[0]:
        mean, derivative = numerics.sigmoid(mean, FAST)
    error = target - mean
    slope = -error
    if SETTINGS[0]:
        slope *= derivative
    return tl.fma(error * error, SETTINGS[2], SETTINGS[1]), (slope, error)


@dataclass(frozen=True)
class Gaussian(Likelihood):
    """((t - mean)^2 e^-logvar + logvar + log 2 pi) / 2 for each element, of any numbers; uint8 is read as t / 255.

    With a fixed ``std`` the mean is the only parameter, and logvar is 2 log std. ``sigmoid``: the mean is the sigmoid
    of the first parameter, the logits. ``min_logvar``: logvar counts as at least this number, and has no gradient below
    it. ``constant=False`` leaves out log(2 pi) / 2, and log std if it is fixed. It equals torch's
    ``gaussian_nll_loss``.
    Choose it for numbers without bounds. With ``std=1`` it is the squared error of a linear decoder. A learned variance
    falls to 0 for pixels that are always right, so pass a ``min_logvar``.
    """

    std: float | None = None
    sigmoid: bool = False
    constant: bool = True
    min_logvar: float | None = None

    target = "unit"
    target_has_slope = True

    def __post_init__(self) -> None:
        check_scale("std", self.std)
        check_minimum("min_logvar", self.min_logvar, fixed=self.std is not None)
        super().__post_init__()

    @property
    def bounded(self) -> bool:
        return self.sigmoid

    @property
    def parameters(self) -> tuple[str, ...]:
        first = "logits" if self.sigmoid else "mean"
        return (first, "logvar") if self.std is None else (first,)

    @property
    def roundings(self) -> tuple[int, ...]:
        if self.std is None:
            return (27, 27, 25, 14) if self.sigmoid else (11, 6, 10, 6)
        return (22, 23, 10) if self.sigmoid else (6, 2, 2)

    @property
    def term(self) -> Term:
        return learned if self.std is None else fixed

    @property
    def slope_factor(self) -> float:
        return 1.0 if self.std is None else self.std**-2

    @property
    def omitted(self) -> float:
        return 0.0 if self.constant else self._constant

    @property
    def settings(self) -> tuple[bool | float, ...]:
        minimum = () if self.min_logvar is None else (float(self.min_logvar),)
        return self.sigmoid, self._constant - self.omitted, 0.5 * self.slope_factor, *minimum

    @property
    def _constant(self) -> float:
        return 0.5 * math.log(2 * math.pi) + (0.0 if self.std is None else math.log(self.std))

    def formula(self, *tensors: Tensor) -> Tensor:
        # One pass forward and one backward, where a difference and its square have two and three.
        squared = mse_loss(self.mean(*tensors[:-1]), tensors[-1], reduction="none")
        if self.std is None:
            logvar = self._limited(tensors[1])
            return 0.5 * (squared * torch.exp(-logvar) + logvar) + self.settings[1]
        scaled = self.settings[2] * squared
        return scaled + self.settings[1] if self.settings[1] else scaled

    def slopes(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        mean = self.mean(*tensors[:-1])
        if self.std:
            slope = mean - tensors[-1]
            if self.slope_factor != 1.0:
                slope *= self.slope_factor
            return (slope * mean * torch.sigmoid(-tensors[0]) if self.sigmoid else slope,)
        error = tensors[-1] - mean
        scaled = error * torch.exp(-self._limited(tensors[1]))
        slope = -scaled * mean * torch.sigmoid(-tensors[0]) if self.sigmoid else -scaled
        by_logvar = 0.5 - 0.5 * error * scaled
        if self.min_logvar is not None:
            by_logvar = torch.where(tensors[1] >= self.min_logvar, by_logvar, 0.0)
        return slope, by_logvar

    def _limited(self, logvar: Tensor) -> Tensor:
        return logvar if self.min_logvar is None else clamped(logvar, self.min_logvar)

    def mean(self, mean: Tensor, *_: Tensor) -> Tensor:
        return sigmoid(mean) if self.sigmoid else mean

    def draw(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        parameters = [torch.randn(shape, generator=generator) for _ in self.parameters]
        return *parameters, torch.rand(shape, generator=generator)
