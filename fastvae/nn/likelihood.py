"""Modules of the likelihoods of the data."""

from __future__ import annotations

from torch import Tensor, nn

import fastvae.functional as F
from fastvae.functional.checks import check_is_likelihood
from fastvae.likelihoods import Likelihood


class NegativeLogLikelihood(nn.Module):
    """-log p(target | parameters), reduced, see `fastvae.functional.negative_log_likelihood`.

    A variance or dispersion that is learned for all samples, smaller than the target, is a parameter of the decoder.
    Raises ``TypeError`` for a likelihood that is none.
    """

    def __init__(self, likelihood: Likelihood, *, reduction: str = "batchmean") -> None:
        super().__init__()
        check_is_likelihood(likelihood)
        self.likelihood = likelihood
        self.reduction = reduction

    def forward(self, parameters: Tensor | tuple[Tensor, ...], target: Tensor) -> Tensor:
        return F.negative_log_likelihood(parameters, target, self.likelihood, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"{self.likelihood}, reduction={self.reduction!r}"


class SigmoidMSELoss(nn.Module):
    """(sigmoid(logits) - target)^2, reduced, see `fastvae.functional.sigmoid_mse_loss`."""

    def __init__(self, *, reduction: str = "batchmean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.sigmoid_mse_loss(logits, target, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"
