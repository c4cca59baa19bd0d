"""The zero-inflated negative binomial likelihood of counts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastvae.likelihoods.likelihood import Likelihood, Term
from fastvae.likelihoods.negative_binomial import NegativeBinomial, check_eps
from fastvae.reference import counts as reference
from fastvae.reference.special import log_factorial

if TYPE_CHECKING:
    import triton.language as tl

    from fastvae.kernels import counts, numerics, special


@Term
def term(parameters, target, SETTINGS: tl.constexpr, FAST: tl.constexpr):
    """softplus(l) + n(t) for a count t > 0, and softplus(-l) - softplus(-l - n(0)) for 0. The second is computed
    without cancellation as -log(1 - w) with w = sigma(-l) (1 - e^-n(0)) for w < 1/2, and from w = 1/2 on, where l <= 0,
    from the exponentials of l and of -|l + n(0)|.
    """
    n, by_n = counts.negative_binomial(parameters[0], parameters[1], target, SETTINGS[0], FAST)
    logits = parameters[2]
    zero = target == 0.0
    positive, inflation = special.softplus(logits, FAST)  # sigma(l)
    tail, absolute = numerics.exp(-tl.abs(logits), FAST), tl.abs(logits + n)
    not_inflated = numerics.reciprocal(1.0 + tail, FAST)
    not_inflated = tl.where(logits >= 0, tail * not_inflated, not_inflated)
    exp_n, other_tail = numerics.exp(-n, FAST), numerics.exp(-absolute, FAST)
    rise = -numerics.expm1(-n, exp_n)
    w = not_inflated * rise
    of_zero = tl.minimum(-logits, n, propagate_nan=tl.PropagateNan.ALL) + numerics.log1p(tail)
    of_zero = tl.where(w < 0.5, w - special.log1p_minus(-w, FAST), of_zero - numerics.log1p(other_tail))
    share = numerics.reciprocal(1.0 + other_tail, FAST)  # of the negative binomial in the probability of 0
    inflated_share = tl.where(logits + n >= 0, share, other_tail * share)
    share = tl.where(logits + n >= 0, other_tail * share, share)
    by_logits = tl.where(zero, -w * inflated_share, inflation)
    value = tl.where(zero, of_zero, positive + n)
    if not SETTINGS[1]:
        value -= special.log_factorial(target, FAST)
    factor = tl.where(zero, share, 1.0)
    return value, (factor * by_n[0], factor * by_n[1], by_logits)


@dataclass(frozen=True)
class ZeroInflatedNegativeBinomial(Likelihood):
    """-log(sigma(l) [t = 0] + sigma(-l) NB(t; mean, dispersion)) for each count t, l = zero_logits.

    With probability sigma(l) the count is 0 for any mean. Otherwise it follows a `NegativeBinomial` with the same
    parameters and settings. It equals minus scVI's `log_zinb_positive`. Choose it for counts with more zeros than a
    negative binomial has, such as RNA molecules in cells if the protocol misses many.
    """

    eps: float = 1e-8
    constant: bool = True

    parameters = ("mean", "dispersion", "zero_logits")
    target = "number"
    counts = True
    roundings = (16, 20, 40, 15)
    heavy = True
    term = term

    def __post_init__(self) -> None:
        check_eps(self.eps)
        super().__post_init__()

    @property
    def complete(self) -> ZeroInflatedNegativeBinomial:
        return replace(self, constant=True)

    def formula(self, mean: Tensor, dispersion: Tensor, zero_logits: Tensor, target: Tensor) -> Tensor:
        n = reference.negative_binomial(mean, dispersion, target, self.eps)
        value = reference.inflated(n, zero_logits, target)
        return value if self.constant else value - log_factorial(target)

    def slopes(
        self, mean: Tensor, dispersion: Tensor, zero_logits: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        by_mean, by_dispersion, log_ratio = reference.slopes(mean, dispersion, target, self.eps)
        # A count has no use for n, which must only stay finite.
        n = (dispersion * log_ratio).clamp_(min=0)
        factor, by_logits = reference.inflated_slopes(n, zero_logits, target)
        return factor * by_mean, factor * by_dispersion, by_logits

    def mean(self, mean: Tensor, dispersion: Tensor, zero_logits: Tensor) -> Tensor:
        return mean * torch.sigmoid(-zero_logits)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        mean, dispersion, target = NegativeBinomial().draw(shape, generator)
        logits = 2 * torch.randn(shape, generator=generator)
        return mean, dispersion, logits, torch.where(torch.rand(shape, generator=generator) < 0.3, 0.0, target)
