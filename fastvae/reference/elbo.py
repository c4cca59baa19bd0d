"""The negative evidence lower bound, reconstruction plus weighted divergence, in plain PyTorch.

Kingma and Welling, "Auto-Encoding Variational Bayes", 2013, equation 10; the weight beta is Higgins et al.,
"beta-VAE", 2017, equation 4.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastvae.reference.precision import in_float32, pixels, widened
from fastvae.reference.reconstruction import sigmoid_mse_loss


class ELBO(NamedTuple):
    """loss = reconstruction + beta * kl, each 0-dimensional and in nats; reconstruction is already weighted, kl is
    not.
    """

    loss: Tensor
    reconstruction: Tensor
    kl: Tensor


def elbo_loss(
    logits: Tensor,
    target: Tensor,
    kl: Tensor,
    *,
    beta: float | Tensor = 1.0,
    reconstruction_weight: float | Tensor = 0.5,
) -> ELBO:
    """Batch mean of reconstruction_weight * sum_event (sigmoid(logits) - target)^2, plus beta * batch mean of kl."""
    beta, reconstruction_weight = widened(beta), widened(reconstruction_weight)
    squared_error = sigmoid_mse_loss(logits, target, reduction="batchmean")
    mean_kl = in_float32(kl).mean()
    dtype = torch.promote_types(squared_error.dtype, mean_kl.dtype)
    reconstruction = (reconstruction_weight * squared_error).to(dtype)
    return ELBO(reconstruction + (beta * mean_kl).to(dtype), reconstruction, mean_kl.to(dtype))


def elbo_value_and_grad(
    logits: Tensor,
    target: Tensor,
    kl: Tensor,
    *,
    beta: float | Tensor = 1.0,
    reconstruction_weight: float | Tensor = 0.5,
    grad_scale: float | Tensor | None = None,
) -> tuple[ELBO, tuple[Tensor, Tensor]]:
    """elbo_loss, and its gradients with respect to logits and kl times grad_scale:

    d loss / d logits = 2 * reconstruction_weight / B * (y - target) * y * (1 - y) with y = sigmoid(logits), and d
    loss / d kl = beta / B.
    """
    with torch.no_grad():
        values = elbo_loss(logits, target, kl, beta=beta, reconstruction_weight=reconstruction_weight)
        grad_scale = 1.0 if grad_scale is None else widened(grad_scale)
        scale = grad_scale / logits.shape[0] if logits.shape[0] else 0.0
        x = in_float32(logits)
        y = torch.sigmoid(x)
        # The last factor is 1 - y, without what rounding y to 1 would lose.
        slope = 2.0 * widened(reconstruction_weight) * scale * (y - pixels(target)) * y * torch.sigmoid(-x)
        kl_slope = torch.ones(kl.shape, dtype=y.dtype, device=kl.device) * widened(beta) * scale
        return values, (slope.to(logits.dtype), kl_slope.to(kl.dtype))
