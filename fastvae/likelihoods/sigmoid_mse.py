"""The squared error of a sigmoid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastvae.likelihoods.likelihood import Likelihood, Term
from fastvae.reference.precision import sigmoid

if TYPE_CHECKING:
    import triton.language as tl

    from fastvae.kernels import numerics


@Term
def term(parameters, target, SETTINGS: tl.constexpr, FAST: tl.constexpr):
    """(y - t)^2, and the halves of its slopes: (y - t) y (1 - y) and -(y - t), with y = sigmoid(x)."""
    y, slope = numerics.sigmoid(parameters[0], FAST)
    error = y - target
    return error * error, (error * slope, -error)


@dataclass(frozen=True)
class SigmoidMSE(Likelihood):
    """(sigmoid(logits) - t)^2 for each element; t in [0, 1], or uint8, which is read as t / 255.

    Its weight in the evidence lower bound is one half. With this weight it is the negative log-likelihood of a Gaussian
    with mean sigmoid(logits) and variance 1, without its constant. Choose it to reproduce MathWorks' example, or to
    train a decoder by squared error. `Bernoulli` fits contrasts better.
    """

    parameters = ("logits",)
    target = "unit"
    roundings = (20, 22, 9)
    target_has_slope = True
    slope_factor = 2.0
    reconstruction_weight = 0.5
    omitted = math.log(2 * math.pi) / 2  # of that Gaussian
    term = term

    def formula(self, logits: Tensor, target: Tensor) -> Tensor:
        return (sigmoid(logits) - target).square()

    def slopes(self, logits: Tensor, target: Tensor) -> tuple[Tensor]:
        y = torch.sigmoid(logits)
        # The last factor is 1 - y, without what rounding y to 1 would lose.
        return (2.0 * (y - target) * y * torch.sigmoid(-logits),)

    def mean(self, logits: Tensor) -> Tensor:
        return torch.sigmoid(logits)
