"""The Laplace likelihood, with a learned or fixed scale."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastvae.likelihoods.likelihood import Likelihood, Term, check_minimum, check_scale
from fastvae.reference.precision import clamped

if TYPE_CHECKING:
    import triton.language as tl

    from fastvae.kernels import numerics


@Term
def learned(parameters, target, SETTINGS: tl.constexpr, FAST: tl.constexpr):
    """|t - m| e^-l + l + c; slopes -sign(t - m) e^-l, 1 - |t - m| e^-l and sign(t - m) e^-l."""
    mean, log_scale = parameters
    if len(SETTINGS) == 3:
        log_scale = tl.maximum(log_scale, SETTINGS[2], propagate_nan=tl.PropagateNan.ALL)
    error = target - mean
    inverse = numerics.exp(-log_scale, FAST)
    scaled = tl.abs(error) * inverse
    slope = tl.where(error > 0, 1.0, tl.where(error < 0, -1.0, 0.0)) * inverse
    by_scale = 1.0 - scaled
    if len(SETTINGS) == 3:
        by_scale = tl.where(parameters[1] >= SETTINGS[2], by_scale, 0.0)
    return scaled + (log_scale + SETTINGS[0]), (-slope, by_scale, slope)


@Term
def fixed(parameters, target, SETTINGS: tl.constexpr, FAST: tl.constexpr):
    """|t - m| / scale + c; slopes -sign(t - m) and sign(t - m), times 1 / scale."""
    error = target - parameters[0]
    sign = tl.where(error > 0, 1.0, tl.where(error < 0, -1.0, 0.0))
    return tl.fma(tl.abs(error), SETTINGS[1], SETTINGS[0]), (-sign, sign)


@dataclass(frozen=True)
class Laplace(Likelihood):
    """|t - mean| e^-log_scale + log_scale + log 2 for each element, of any numbers; uint8 is read as t / 255.

    With a fixed ``scale`` the mean is the only parameter. ``min_log_scale``: log_scale counts as at least this number,
    and has no gradient below it. ``constant=False`` leaves out log 2, and log scale if it is fixed. The slope at t =
    mean is 0. Choose it in place of `Gaussian` if single elements may be far off, because it uses their absolute error
    and not their squared error. The decoder then learns the median, and its pictures have sharper edges.
    """

    scale: float | None = None
    constant: bool = True
    min_log_scale: float | None = None

    target = "unit"
    bounded = False
    target_has_slope = True

    def __post_init__(self) -> None:
        check_scale("scale", self.scale)
        check_minimum("min_log_scale", self.min_log_scale, fixed=self.scale is not None)
        super().__post_init__()

    @property
    def parameters(self) -> tuple[str, ...]:
        return ("mean", "log_scale") if self.scale is None else ("mean",)

    @property
    def roundings(self) -> tuple[int, ...]:
        return (8, 5, 7, 5) if self.scale is None else (5, 1, 1)

    @property
    def term(self) -> Term:
        return learned if self.scale is None else fixed

    @property
    def slope_factor(self) -> float:
        return 1.0 if self.scale is None else 1 / self.scale

    @property
    def omitted(self) -> float:
        return 0.0 if self.constant else self._constant

    @property
    def settings(self) -> tuple[float, ...]:
        minimum = () if self.min_log_scale is None else (float(self.min_log_scale),)
        return self._constant - self.omitted, self.slope_factor, *minimum

    @property
    def _constant(self) -> float:
        return math.log(2.0 if self.scale is None else 2 * self.scale)

    def formula(self, *tensors: Tensor) -> Tensor:
        error = (tensors[-1] - tensors[0]).abs()
        if self.scale is None:
            log_scale = self._limited(tensors[1])
            return error * torch.exp(-log_scale) + (log_scale + self.settings[0])
        return self.slope_factor * error + self.settings[0]

    def slopes(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        error = tensors[-1] - tensors[0]
        inverse = self.slope_factor if self.scale else torch.exp(-self._limited(tensors[1]))
        slope = -torch.sign(error) * inverse
        if self.scale:
            return (slope,)
        by_scale = 1 - error.abs() * inverse
        if self.min_log_scale is not None:
            by_scale = torch.where(tensors[1] >= self.min_log_scale, by_scale, 0.0)
        return slope, by_scale

    def _limited(self, log_scale: Tensor) -> Tensor:
        return log_scale if self.min_log_scale is None else clamped(log_scale, self.min_log_scale)

    def mean(self, mean: Tensor, *_: Tensor) -> Tensor:
        return mean

    def draw(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        parameters = [torch.randn(shape, generator=generator) for _ in self.parameters]
        return *parameters, torch.rand(shape, generator=generator)
