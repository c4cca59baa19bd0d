"""Code that every specification shares: the precision of its arithmetic, and the reduction of an event to a loss."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # the likelihoods import this file
    from fastvae.likelihoods.likelihood import Likelihood

Parameters = Tensor | tuple[Tensor, ...]


def in_float32(tensor: Tensor) -> Tensor:
    """The tensor in the precision of the arithmetic: float64 stays float64, everything else becomes float32."""
    return tensor if tensor.dtype is torch.float64 else tensor.float()


def pixels(target: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The target of a likelihood in the precision of the arithmetic. Bytes become t / 255 in `dtype`."""
    return target.to(dtype) / 255 if target.dtype is torch.uint8 else in_float32(target)


def in_precision(parameters: Parameters, target: Tensor, likelihood: Likelihood) -> list[Tensor]:
    """The parameters and the target in float32 (float64 stays). A "unit" target of bytes becomes t / 255, in float64 if
    a parameter is. Classes become int64.
    """
    each = [*map(in_float32, (parameters,) if isinstance(parameters, Tensor) else parameters)]
    if likelihood.target == "class" and target.ndim < each[0].ndim:
        return [*each, target.long()]
    if likelihood.target != "unit":
        return [*each, in_float32(target)]
    is_double = any(parameter.dtype is torch.float64 for parameter in each)
    return [*each, pixels(target, torch.float64 if is_double else torch.float32)]


def widened(weight: float | Tensor) -> float | Tensor:
    """A weight in the precision of the arithmetic, because otherwise its product with a number would be rounded to its
    own dtype.
    """
    return in_float32(weight) if isinstance(weight, Tensor) else weight


def clamped(x: Tensor, low: float, high: float = math.inf) -> Tensor:
    """x.clamp(low, high), with the slope 1 at both bounds, and 0 for NaN, as the kernels have it. torch's is 1 at the
    bounds up to torch 2.13, and 0 in torch 2.14.
    """
    limited = x.detach().clamp(low, high)
    return torch.where(limited == x, x, limited)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x), with a gradient that is right on both sides.

    torch computes the gradient of its sigmoid as y (1 - y). This is 0 where y rounds to 1, above x = 17 in float32.
    Therefore y is computed from the sigmoid of -|x|, which never rounds to 1.
    """
    positive = x > 0
    smaller = torch.sigmoid(torch.where(positive, -x, x))
    return torch.where(positive, 1 - smaller, smaller)


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
