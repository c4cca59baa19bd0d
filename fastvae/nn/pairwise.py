"""Modules of the objectives of all pairs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

import fastvae.functional as F
from fastvae.functional import TotalCorrelationTerms


class ImportanceWeightedBound(nn.Module):
    """The bound of several samples, to be maximised, see `fastvae.functional.importance_weighted_bound`."""

    def __init__(self, *, dim: int = 0, estimator: str = "iwae") -> None:
        super().__init__()
        self.dim = dim
        self.estimator = estimator

    def forward(self, log_p_x_given_z: Tensor, log_p_z: Tensor, log_q_z: Tensor, *, z: Tensor | None = None) -> Tensor:
        return F.importance_weighted_bound(log_p_x_given_z, log_p_z, log_q_z, self.dim, self.estimator, z=z)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, estimator={self.estimator!r}"


class GaussianMixtureLogProb(nn.Module):
    """The log-density of a mixture of diagonal Gaussians, see `fastvae.functional.gaussian_mixture_log_prob`."""

    def forward(self, z: Tensor, mu: Tensor, logvar: Tensor, log_weights: Tensor | None = None) -> Tensor:
        return F.gaussian_mixture_log_prob(z, mu, logvar, log_weights)


class TotalCorrelation(nn.Module):
    """The divergence from the prior in three parts, see `fastvae.functional.total_correlation`."""

    def __init__(self, dataset_size: int, weighting: str = "minibatch", *, reduction: str = "batchmean") -> None:
        super().__init__()
        self.dataset_size = dataset_size
        self.weighting = weighting
        self.reduction = reduction

    def forward(self, z: Tensor, mu: Tensor, logvar: Tensor) -> TotalCorrelationTerms:
        return F.total_correlation(z, mu, logvar, self.dataset_size, self.weighting, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"dataset_size={self.dataset_size}, weighting={self.weighting!r}, reduction={self.reduction!r}"


class MaximumMeanDiscrepancy(nn.Module):
    """How far two samples are from one distribution, see `fastvae.functional.maximum_mean_discrepancy`."""

    def __init__(self, kernel: str = "imq", scales: Sequence[float] | None = None, *, unbiased: bool = True) -> None:
        super().__init__()
        self.kernel = kernel
        self.scales = None if scales is None else tuple(scales)
        self.unbiased = unbiased

    def forward(self, z: Tensor, prior_z: Tensor) -> Tensor:
        return F.maximum_mean_discrepancy(z, prior_z, self.kernel, self.scales, unbiased=self.unbiased)

    def extra_repr(self) -> str:
        return f"kernel={self.kernel!r}, scales={self.scales}, unbiased={self.unbiased}"
