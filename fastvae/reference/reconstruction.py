"""Likelihoods of the data given the decoder's logits, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae.reference.precision import in_float32, reduce_event


def sigmoid_mse_loss(logits: Tensor, target: Tensor, *, reduction: str = "batchmean") -> Tensor:
    """(sigmoid(logits) - target)^2, reduced."""
    return reduce_event((torch.sigmoid(in_float32(logits)) - in_float32(target)).square(), reduction)
