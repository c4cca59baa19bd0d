"""The module of the negative evidence lower bound."""

from __future__ import annotations

from torch import Tensor, nn

import fastvae.functional as F
from fastvae.functional import ELBO


class ELBOLoss(nn.Module):
    """ELBO(loss, reconstruction, kl) of logits, target and the per-sample kl, see `fastvae.functional.elbo_loss`.

    ``beta`` and ``reconstruction_weight`` are plain attributes, free to change between calls (a warm-up, say).
    """

    def __init__(self, *, beta: float | Tensor = 1.0, reconstruction_weight: float | Tensor = 0.5) -> None:
        super().__init__()
        self.beta = beta
        self.reconstruction_weight = reconstruction_weight

    def forward(self, logits: Tensor, target: Tensor, kl: Tensor) -> ELBO:
        return F.elbo_loss(logits, target, kl, beta=self.beta, reconstruction_weight=self.reconstruction_weight)

    def extra_repr(self) -> str:
        return f"beta={self.beta}, reconstruction_weight={self.reconstruction_weight}"
