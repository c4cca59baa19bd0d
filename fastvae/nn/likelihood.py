"""The modules of the negative log-likelihoods."""

from __future__ import annotations

from torch import Tensor, nn

import fastvae.functional as F
from fastvae.functional.checks import check_is_likelihood
from fastvae.likelihoods import Likelihood


class NegativeLogLikelihood(nn.Module):
    """-log p(target | parameters), reduced, see `fastvae.functional.negative_log_likelihood`.

    If a variance or dispersion is learned for all samples and smaller than the target, make it a parameter of the
    decoder. Raises ``TypeError`` if ``likelihood`` is not a Likelihood.
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
