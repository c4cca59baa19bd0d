"""The module of the negative evidence lower bound."""

from __future__ import annotations

from torch import Tensor, nn

import fastvae.functional as F
from fastvae.functional import ELBO
from fastvae.functional.checks import check_is_likelihood
from fastvae.likelihoods import Likelihood, SigmoidMSE


class ELBOLoss(nn.Module):
    """ELBO(loss, reconstruction, kl) of parameters, target and the per-sample kl, see `fastvae.functional.elbo_loss`.

    The default likelihood is `fastvae.likelihoods.SigmoidMSE`. ``beta`` and ``reconstruction_weight`` are plain
    attributes and may change between calls, for example in a warm-up. The default weight is that of the likelihood.
    Raises ``TypeError`` if ``likelihood`` is not a Likelihood.
    """

    def __init__(
        self,
        likelihood: Likelihood | None = None,
        *,
        beta: float | Tensor = 1.0,
        reconstruction_weight: float | Tensor | None = None,
    ) -> None:
        super().__init__()
        self.likelihood = SigmoidMSE() if likelihood is None else likelihood
        check_is_likelihood(self.likelihood)
        self.beta = beta
        own = self.likelihood.reconstruction_weight
        self.reconstruction_weight = own if reconstruction_weight is None else reconstruction_weight

    def forward(self, parameters: Tensor | tuple[Tensor, ...], target: Tensor, kl: Tensor) -> ELBO:
        return F.elbo_loss(
            parameters,
            target,
            kl,
            likelihood=self.likelihood,
            beta=self.beta,
            reconstruction_weight=self.reconstruction_weight,
        )

    def extra_repr(self) -> str:
        return f"{self.likelihood}, beta={self.beta}, reconstruction_weight={self.reconstruction_weight}"
