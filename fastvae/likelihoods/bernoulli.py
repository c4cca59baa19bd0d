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
    """|x| (1 - t for x > 0, else t) + log(1 + e^-|x|); slopes y - t and -x, with y = sigmoid(x)."""
    x = parameters[0]
    e = numerics.exp(-tl.abs(x), FAST)
    y = numerics.sigmoid(x, FAST)[0]
    missed = tl.where(x > 0.0, 1.0 - target, target)
    return tl.fma(tl.abs(x), missed, numerics.log1p(e)), (y - target, -x)


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    """-t log y - (1 - t) log(1 - y) with y = sigmoid(logits) for each element; t in [0, 1], or uint8, read as t / 255.

    It is torch's ``binary_cross_entropy_with_logits``. Choose it for binary data. Many choose it for grey values in
    [0, 1] too, of which it is not the density.
    """

    parameters = ("logits",)
    target = "unit"
    roundings = (8, 9, 0)
    target_has_slope = True
    term = term

    def formula(self, logits: Tensor, target: Tensor) -> Tensor:
        positive = logits > 0
        # Both parts are positive, so nothing cancels. |x| is written by `where`, because torch gives abs the slope 0 at
        # x = 0, which would lose the 1/2 of y - t there.
        tail = torch.log1p(torch.exp(torch.where(positive, -logits, logits)))
        return torch.where(positive, 1 - target, -target) * logits + tail

    def slopes(self, logits: Tensor, target: Tensor) -> tuple[Tensor]:
        return (torch.sigmoid(logits) - target,)

    def mean(self, logits: Tensor) -> Tensor:
        return torch.sigmoid(logits)
