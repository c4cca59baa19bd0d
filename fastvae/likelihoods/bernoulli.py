"""The Bernoulli likelihood, from logits: binary cross entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastvae.likelihoods.likelihood import Likelihood, Term

if TYPE_CHECKING:
    import triton.language as tl

    from fastvae.kernels import numerics


@Term
def term(parameters, target, SETTINGS: tl.constexpr, FAST: tl.constexpr):
    """max(x, 0) - x t + log(1 + e^-|x|); slopes y - t and -x, with y = sigmoid(x)."""
    x = parameters[0]
    positive = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tail = numerics.log1p(numerics.exp(-tl.abs(x), FAST))
    y = numerics.sigmoid(x, FAST)[0]
    return tl.fma(-x, target, positive) + tail, (y - target, -x)


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """-t log y - (1 - t) log(1 - y) with y = sigmoid(logits) for each element; t in [0, 1], or uint8, read as t / 255.

    It equals torch's ``binary_cross_entropy_with_logits``. Choose it for binary data. Many people also choose it for
    grey values in [0, 1], but it is not a density of them.
    """

    parameters = ("logits",)
    target = "unit"
    roundings = (8, 9, 0)
    target_has_slope = True
    term = term

    def formula(self, logits: Tensor, target: Tensor) -> Tensor:
        positive = torch.relu(logits)
        # With the slope -1 for x <= 0 it is |x|, but torch gives it the slope -1 at x = 0, and |x| the slope 0. So the
        # slope of the whole is 1/2 - t there.
        size = torch.nn.functional.leaky_relu(logits, -1.0)
        tail = torch.nn.functional.softplus(-size, threshold=40)
        return positive - logits * target + tail

    def slopes(self, logits: Tensor, target: Tensor) -> tuple[Tensor]:
        return (torch.sigmoid(logits) - target,)

    def mean(self, logits: Tensor) -> Tensor:
        return torch.sigmoid(logits)
