"""Modules of the objectives of all pairs."""

from __future__ import annotations

from torch import Tensor, nn

import fastvae.functional as F


class GaussianMixtureLogProb(nn.Module):
    """The log-density of a mixture of diagonal Gaussians, see `fastvae.functional.gaussian_mixture_log_prob`."""

    def forward(self, z: Tensor, mu: Tensor, logvar: Tensor, log_weights: Tensor | None = None) -> Tensor:
        return F.gaussian_mixture_log_prob(z, mu, logvar, log_weights)
