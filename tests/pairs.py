"""What float64 says of the pairwise objectives, from their definitions, and the error that float32 is allowed."""

from __future__ import annotations

import math
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
