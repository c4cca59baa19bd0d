"""The Poisson likelihood of counts, from the logarithm of the rate."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastvae.likelihoods.likelihood import Likelihood, Term
from fastvae.reference import counts as reference

if TYPE_CHECKING:
    import triton.language as tl

    from fastvae.kernels import numerics, special


@Term
def term(parameters, target, SETTINGS: tl.constexpr, FAST: tl.constexpr):
    """e^x - t x + log t!, and its slope e^x - t.

    From t = 6 on the parts, of size t log t, would cancel. There the value is t (e^d - 1 - d) + (log t! - t log t + t)
    with d = x - log t, and Stirling's series for the bracket.
    """
    x = parameters[0]
    rate = numerics.exp_compensated(x, FAST)
    if not SETTINGS[0]:
        return tl.fma(-target, x, rate), (rate - target,)
    t = tl.maximum(target, 6.0, propagate_nan=tl.PropagateNan.ALL)
    inverse = numerics.reciprocal(t, FAST)
    log_t = numerics.log(t, FAST)
    deviance = t * numerics.expm1_minus(x - log_t, rate * inverse)
    series = tl.fma(inverse * inverse, -2.777777777777778e-03, 0.08333333333333333)
    large = deviance + tl.fma(inverse, series, tl.fma(0.5, log_t, 0.9189385332046727))
    small = tl.fma(-target, x, rate) + special.log_factorial(target, FAST)
    return tl.where((target >= 6.0) & (target < float("inf")), large, small), (rate - target,)


@dataclass(frozen=True)
class Poisson(Likelihood):
    """rate - t log rate + log t! with rate = e^log_rate for each element; t is a count, as a float or uint8.

    It equals torch's ``poisson_nll_loss``, with all of log t!. ``constant=False`` leaves out log t!. The gradients stay
    the same, and the estimates of `fastvae.evaluation` still include it. Choose it for counts whose variance is their
    mean, such as photons. Gene counts have a larger variance. A target that is negative or a fraction raises no error;
    the value is the result of the formula, or NaN.
    """

    constant: bool = True

    parameters = ("log_rate",)
    target = "number"
    counts = True
    roundings = (24, 5)
    term = term

    @property
    def complete(self) -> Poisson:
        return replace(self, constant=True)

    def formula(self, log_rate: Tensor, target: Tensor) -> Tensor:
        if not self.constant:
            return torch.exp(log_rate) - target * log_rate
        return reference.poisson(log_rate, target)

    def slopes(self, log_rate: Tensor, target: Tensor) -> tuple[Tensor]:
        return (torch.exp(log_rate) - target,)

    def mean(self, log_rate: Tensor) -> Tensor:
        """The rate."""
        return torch.exp(log_rate)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        log_rate = 1.5 * torch.randn(shape, generator=generator) + 1
        return log_rate, torch.poisson(log_rate.exp(), generator)
