"""Likelihoods of the data given the decoder's logits, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from fastvae.reference.precision import in_float32, pixels, reduce_event, sigmoid


def sigmoid_mse_loss(logits: Tensor, target: Tensor, *, reduction: str = "batchmean") -> Tensor:
    """(sigmoid(logits) - target)^2, reduced."""
    return reduce_event((sigmoid(in_float32(logits)) - pixels(target)).square(), reduction)
