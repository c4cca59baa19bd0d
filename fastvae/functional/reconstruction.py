"""Likelihoods of the data given the decoder's logits."""

from __future__ import annotations

from torch import Tensor

from fastvae import reference
from fastvae.functional.checks import check_batch, check_reduction, check_target, takes_triton


def sigmoid_mse_loss(logits: Tensor, target: Tensor, *, reduction: str = "batchmean") -> Tensor:
    """(sigmoid(logits) - target)^2 summed over each sample's event, differentiable in logits and target.

    Args:
        logits: [B, ...], before the sigmoid; float16, bfloat16, float32, and float64 on the reference path.
        target: of the shape and device of logits; any of those dtypes, or uint8, which is read as t / 255.
        reduction: "none" per sample, shape [B]; "batchmean" their mean; "sum" over everything; "mean" over every
            element, which is exactly ``torch.nn.functional.mse_loss(torch.sigmoid(logits), target)``.

    Returns:
        The loss, float32 (float64), shape [B] or [].

    Raises:
        TypeError: logits not floating point, target neither floating point nor uint8.
        ValueError: shapes or devices that differ, fewer than 2 dimensions, or an unknown reduction.
    """
    check_batch("logits", logits)
    check_target(target, logits)
    check_reduction(reduction)
    if takes_triton(logits, target, inductor_fuses=True):
        from fastvae.autograd import reconstruction as fused

        return fused.sigmoid_mse_loss(logits, target, reduction)
    return reference.reconstruction.sigmoid_mse_loss(logits, target, reduction=reduction)
