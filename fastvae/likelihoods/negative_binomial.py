"""The negative binomial likelihood of counts."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastvae.likelihoods.likelihood import Likelihood, Term
from fastvae.reference import counts as reference
from fastvae.reference.special import log_factorial

if TYPE_CHECKING:
    import triton.language as tl

    from fastvae.kernels import counts, special


@Term
def term(parameters, target, SETTINGS: tl.constexpr, FAST: tl.constexpr):
    """`counts.negative_binomial`. Without the constant log t! is subtracted, whose relative error is 11.5 * 2^-24."""
    value, slopes = counts.negative_binomial(parameters[0], parameters[1], target, SETTINGS[0], FAST)
    if not SETTINGS[1]:
        value -= special.log_factorial(target, FAST)
    return value, slopes


@dataclass(frozen=True)
class NegativeBinomial(Likelihood):
    """-log(Gamma(t + d) / (Gamma(d) t!) (d / (d + mean))^d (mean / (d + mean))^t) for each count t.

    d is the dispersion; some texts call 1 / d the dispersion. The variance is mean + mean^2 / d, so with a large d it
    is close to `Poisson`. Both parameters are positive, and the mean may be 0. The dispersion may be smaller than the
    target, such as one for each gene, [G]. ``eps`` is added where scVI's `log_nb_positive` adds it. ``constant=False``
    leaves out log t!. Choose it for counts whose variance is larger than their mean, such as RNA molecules in cells.
    Negative numbers raise no error; their value is NaN or meaningless.
    """

    eps: float = 1e-8
    constant: bool = True

    parameters = ("mean", "dispersion")
    target = "number"
    counts = True
    roundings = (16, 8, 40)
    heavy = True
    term = term

    def __post_init__(self) -> None:
        check_eps(self.eps)
        super().__post_init__()

    @property
    def complete(self) -> NegativeBinomial:
        return replace(self, constant=True)

    def formula(self, mean: Tensor, dispersion: Tensor, target: Tensor) -> Tensor:
        value = reference.negative_binomial(mean, dispersion, target, self.eps)
        return value if self.constant else value - log_factorial(target)

    def slopes(self, mean: Tensor, dispersion: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return reference.slopes(mean, dispersion, target, self.eps)[:2]

    def mean(self, mean: Tensor, *_: Tensor) -> Tensor:
        return mean

    def draw(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        mean, dispersion = (torch.randn(shape, generator=generator).mul(2).exp() for _ in range(2))
        rate = dispersion.sqrt() * torch.randn(shape, generator=generator) / dispersion.clamp(min=1) + 1
        return mean, dispersion, torch.poisson(mean * rate.clamp(min=0, max=9), generator)


def check_eps(eps: object) -> None:
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"eps must be a number, got {eps!r}")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps must be finite and not negative, got {eps}")
