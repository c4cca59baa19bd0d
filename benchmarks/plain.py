"""The operations as users write them in PyTorch: what fastvae is measured against.

They are fastvae's specification but for the sigmoid. The specification takes five operations more, so that pixels whose
sigmoid rounds to 1 keep their gradients, and a baseline must not pay for that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae.reference.elbo import ELBO
from fastvae.reference.gaussian import gaussian_kl, gaussian_sample, gaussian_sample_kl, gaussian_sample_kl_packed
from fastvae.reference.precision import in_float32, pixels, reduce_event

__all__ = [
    "elbo_loss",
    "elbo_value_and_grad",
    "gaussian_kl",
    "gaussian_sample",
    "gaussian_sample_kl",
    "gaussian_sample_kl_packed",
    "sigmoid_mse_loss",
]


def sigmoid_mse_loss(logits: Tensor, target: Tensor, *, reduction: str = "batchmean") -> Tensor:
    return reduce_event((torch.sigmoid(in_float32(logits)) - pixels(target)).square(), reduction)


def elbo_loss(logits: Tensor, target: Tensor, kl: Tensor, *, beta: float = 1.0) -> ELBO:
    reconstruction, mean_kl = 0.5 * sigmoid_mse_loss(logits, target), kl.mean()
    return ELBO(reconstruction + beta * mean_kl, reconstruction, mean_kl)


def elbo_value_and_grad(
    logits: Tensor, target: Tensor, kl: Tensor, *, beta: float = 1.0
) -> tuple[ELBO, tuple[Tensor, Tensor]]:
    """The gradients by hand, because autograd takes more operations."""
    with torch.no_grad():
        y = torch.sigmoid(in_float32(logits))
        error = y - pixels(target)
        reconstruction, mean_kl = 0.5 * reduce_event(error.square(), "batchmean"), kl.mean()
        logits_grad = (error * y * (1.0 - y) / len(logits)).to(logits.dtype)
        values = ELBO(reconstruction + beta * mean_kl, reconstruction, mean_kl)
        return values, (logits_grad, torch.full_like(kl, beta / len(kl)))
