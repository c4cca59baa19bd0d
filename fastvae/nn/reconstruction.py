"""Modules of the likelihoods of the data."""

from __future__ import annotations

from torch import Tensor, nn

import fastvae.functional as F


class SigmoidMSELoss(nn.Module):
    """(sigmoid(logits) - target)^2, reduced, see `fastvae.functional.sigmoid_mse_loss`."""

    def __init__(self, *, reduction: str = "batchmean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.sigmoid_mse_loss(logits, target, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"
