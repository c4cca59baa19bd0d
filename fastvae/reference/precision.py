"""What every specification shares: the precision it computes in, and the reduction of an event to a loss."""

from __future__ import annotations

import torch
from torch import Tensor


def in_float32(tensor: Tensor) -> Tensor:
    """The tensor in the precision of the arithmetic: float64 stays, other floats become float32, and bytes become t /
    255.
    """
    if tensor.dtype is torch.float64:
        return tensor
    if tensor.dtype is torch.uint8:
        return tensor.float() / 255
    return tensor.float()


def reduce_event(terms: Tensor, reduction: str) -> Tensor:
    """Reduce terms [B, ...].

    "none" sums each sample's event, shape [B]; "batchmean" is the mean of those sums; "sum" and "mean" run over every
    element.
    """
    if reduction == "none":
        return terms.flatten(1).sum(1)
    if reduction == "batchmean":
        return terms.sum() / terms.shape[0]
    if reduction == "sum":
        return terms.sum()
    return terms.mean()
