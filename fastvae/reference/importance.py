"""The importance-weighted bound, in plain PyTorch.

Burda et al., "Importance Weighted Autoencoders", 2015, equation 8.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastvae.reference.mixture import together


def importance_weighted_bound(log_p_x_given_z: Tensor, log_p_z: Tensor, log_q_z: Tensor) -> Tensor:
    """log mean_s exp(log_w_s) of log-densities [S, B]. Where all samples are -infinity, so is the bound, and its
    gradient is 0.
    """
    log_w = log_weights(log_p_x_given_z, log_p_z, log_q_z)
    nothing = (log_w.detach() == -math.inf).all(0)
    bound = torch.logsumexp(torch.where(nothing, 0.0, log_w), 0) - math.log(len(log_w))
    return torch.where(nothing, -math.inf, bound)


def log_weights(log_p_x_given_z: Tensor, log_p_z: Tensor, log_q_z: Tensor) -> Tensor:
    likelihood, prior, posterior = together(log_p_x_given_z, log_p_z, log_q_z)
    log_w: Tensor = likelihood + prior - posterior
    return log_w


def normalised_weights(log_w: Tensor, dim: int) -> Tensor:
    """softmax over dim; 0 where all are -infinity."""
    nothing = (log_w == -math.inf).all(dim, keepdim=True)
    return torch.where(nothing, 0.0, torch.softmax(log_w, dim))
