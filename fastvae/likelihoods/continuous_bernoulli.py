"""The continuous Bernoulli likelihood of numbers in [0, 1], from logits.

Loaiza-Ganem and Cunningham, "The continuous Bernoulli: fixing a pervasive error in variational autoencoders", 2019.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastvae.likelihoods.likelihood import Likelihood, Term

if TYPE_CHECKING:
    import triton.language as tl

    from fastvae.kernels import numerics

# log(sinh(x/2) / (x/2)) = x^2/24 - x^4/2880 + ... = sum_n B_2n x^2n / (2n (2n)!); from n = 6 to n = 1. Below |x| = 1/2
# what follows is less than 6e-15 of it.
SERIES = (-691 / 15692092416000, 1 / 479001600, -1 / 9676800, 1 / 181440, -1 / 2880, 1 / 24)


@Term
def term(parameters, target, SETTINGS: tl.constexpr, FAST: tl.constexpr):
    """x (c - t) + e(x); slopes c - t + e'(x) and -x, with c = 1/2 near 0, else 1 for x > 0 and 0 for x < 0.

    Near 0, for |x| < 3/2, e(x) = log(sinh(x/2) / (x/2)) = x^2 p(x^2) and e'(x) = x q(x^2), minimax of degree 3, within
    0.81 and 1.04 * 2^-24 with these float32 coefficients. Beyond, e(x) = -log(|x| / (1 - e^-|x|)) and e'(x) is
    -+(1/|x| - 1 / (e^|x| - 1)). Nothing cancels in the tails, where the slope of a correctly predicted target is 1/|x|.
    """
    x = parameters[0]
    near = tl.abs(x) < 1.5
    square = x * x
    p = tl.fma(-9.453948734972073e-08, square, 5.499362487171311e-06)
    p = tl.fma(p, square, -0.00034721684642136097)
    p = tl.fma(p, square, 0.0416666679084301)
    q = tl.fma(-7.397622425742156e-07, square, 3.2949599699350074e-05)
    q = tl.fma(q, square, -0.0013888359535485506)
    q = tl.fma(q, square, 0.0833333283662796)

    size = tl.maximum(tl.abs(x), 1.5, propagate_nan=tl.PropagateNan.ALL)
    tail = numerics.exp(-size, FAST)
    inverse = numerics.reciprocal(1.0 - tail, FAST)
    rest = tl.fma(-tail, inverse, numerics.reciprocal(size, FAST))

    centred = tl.where(near, 0.5, tl.where(x > 0, 1.0, 0.0)) - target
    even = tl.where(near, square * p, -numerics.log(size * inverse, FAST))
    odd = tl.where(near, x * q, tl.where(x > 0, -rest, rest))
    return tl.fma(x, centred, even), (centred + odd, -x)


@dataclass(frozen=True)
class ContinuousBernoulli(Likelihood):
    """-t log y - (1 - t) log(1 - y) - log(x / tanh(x / 2)) with y = sigmoid(x) for each element; x are the logits.

    t is in [0, 1], or uint8, which is read as t / 255. The value is minus the log-density of torch's
    ``ContinuousBernoulli``, but holds for all logits. Choose it for grey values in [0, 1], because `Bernoulli` is not a
    density of them. The mean is not y.
    """

    parameters = ("logits",)
    target = "unit"
    roundings = (14, 14, 0)
    target_has_slope = True
    term = term

    def formula(self, logits: Tensor, target: Tensor) -> Tensor:
        near, size = logits.abs() < 0.5, logits.abs()
        square, far = torch.where(near, logits, 0.0).square(), torch.where(near, 1.0, size)
        series = torch.zeros_like(square)
        for coefficient in SERIES:
            series = series * square + coefficient
        # 1/2 at 0 only, because the derivative of |x| is 0 there.
        centred = torch.heaviside(logits.detach(), logits.new_full((), 0.5)) - target
        beyond = torch.log(-torch.expm1(-far)) - torch.log(far)
        return logits * centred + torch.where(near, square * series - 0.5 * size, beyond)

    def slopes(self, logits: Tensor, target: Tensor) -> tuple[Tensor]:
        step, odd = self._parts(logits)
        return ((step - target) + odd,)

    def mean(self, logits: Tensor) -> Tensor:
        step, odd = self._parts(logits)
        return step + odd

    def _parts(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Of the mean, 1/2 near 0 and else 0 or 1, and the rest of it, as the term has them."""
        near = logits.abs() < 0.5
        square, far = logits.square(), torch.where(near, 1.0, logits)
        series = torch.zeros_like(square)
        for n, coefficient in zip((12, 10, 8, 6, 4, 2), SERIES, strict=True):
            series = series * square + n * coefficient
        # 1/x - 1 / (e^|x| - 1), with the sign of x.
        rest = 1 / far + torch.sign(far) * torch.exp(-far.abs()) / torch.expm1(-far.abs())
        step = torch.heaviside(logits, logits.new_full((), 0.5))
        return torch.where(near, 0.5, step), torch.where(near, logits * series, -rest)
