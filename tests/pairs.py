"""What float64 says of the pairwise objectives, from their definitions, and the error that float32 is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import fastvae.functional as F

LOG_2PI = math.log(2 * math.pi)


def _of_mixture() -> Tensor:
    return F.gaussian_mixture_log_prob(torch.randn(5, 3), torch.randn(4, 3), torch.randn(4, 3))


def _of_samples() -> Tensor:
    return F.importance_weighted_bound(*torch.randn(3, 4, 5))


def _of_minibatch() -> tuple[Tensor, ...]:
    return F.total_correlation(*torch.randn(3, 5, 4), 100)


def _of_sets() -> Tensor:
    return F.maximum_mean_discrepancy(torch.randn(5, 3), torch.randn(4, 3))


# The functions that `fastvae.operations` does not list, with a call of each.
PAIRWISE = {
    "gaussian_mixture_log_prob": _of_mixture,
    "importance_weighted_bound": _of_samples,
    "total_correlation": _of_minibatch,
    "maximum_mean_discrepancy": _of_sets,
}


class Terms(NamedTuple):
    """Of pairs [B, N]: their terms, the condition of each, and r [B, N, K] and its factor e^(-logvar / 2)."""

    values: Tensor
    scale: Tensor
    r: Tensor
    factor: Tensor


def pair_terms(z: Tensor, mu: Tensor, logvar: Tensor, log_weights: Tensor) -> Terms:
    """log_weights + sum_k log N(z; mu, exp(logvar)); the scale is the sum of absolute parts, where a rounding of the
    exponent counts |logvar| times.
    """
    z, mu, logvar, log_weights = (x.detach().double() for x in (z, mu, logvar, log_weights))
    factor = torch.exp(-0.5 * logvar)
    r = (z[:, None] - mu) * factor
    values = log_weights - 0.5 * (r.square() + logvar + LOG_2PI).sum(-1)
    parts = 0.5 * (r.square() * (1 + logvar.abs()) + logvar.abs() + LOG_2PI)
    return Terms(values, log_weights.nan_to_num(neginf=0.0).abs() + parts.sum(-1), r, factor)


def levels(n: int) -> int:
    """Roundings of a sum of n terms by tiles of 32, one after the other, and in each by levels."""
    return -(-n // 32) + 5 + 3


class Kernels(NamedTuple):
    """Of pairs [n, m]: the sums over scales of their kernels and of the slopes by the squared distance, and the
    condition of each. A rounding of the squared distance counts as often as it moves the kernel: x / (1 + x) times for
    1 / (1 + x), x times for e^-x.
    """

    values: Tensor
    slopes: Tensor
    scale: Tensor
    scale_of_slopes: Tensor


def pair_kernels(z: Tensor, prior_z: Tensor, kernel: str, scales: Sequence[float]) -> Kernels:
    """By the definition, in float64."""
    z, prior_z = z.detach().double(), prior_z.detach().double()
    squares = (z[:, None] - prior_z).square().sum(-1)
    found = []
    for scale in scales:
        c = 2 * z.shape[1] * scale
        if kernel == "imq":
            value, slope, condition = c / (c + squares), c / (c + squares) ** 2, squares / (c + squares)
        else:
            value, slope, condition = torch.exp(-squares / c), torch.exp(-squares / c) / c, squares / c
        # Where the kernel is 0, its condition does not matter.
        parts = value * (1 + condition), slope * (1 + 2 * condition)
        found.append((value, slope, *[part.nan_to_num(nan=0.0) for part in parts]))
    return Kernels(*[torch.stack(each).sum(0) for each in zip(*found, strict=True)])
