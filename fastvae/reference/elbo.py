"""The negative evidence lower bound, reconstruction plus weighted divergence, in plain PyTorch.

Kingma and Welling, "Auto-Encoding Variational Bayes", 2013, equation 10; the weight beta is Higgins et al.,
"beta-VAE", 2017, equation 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastvae.likelihoods.likelihood import Likelihood
from fastvae.reference.likelihood import in_precision, negative_log_likelihood
from fastvae.reference.precision import in_float32, widened


class ELBO(NamedTuple):
    """loss = reconstruction + beta * kl, each 0-dimensional and in nats; reconstruction is already weighted, kl is
    not.
    """

    loss: Tensor
    reconstruction: Tensor
    kl: Tensor


def elbo_loss(
    likelihood: Likelihood,
    tensors: Sequence[Tensor],
    kl: Tensor,
    beta: float | Tensor,
    reconstruction_weight: float | Tensor,
) -> ELBO:
    """Batch mean of reconstruction_weight * the negative log-likelihood, plus beta * batch mean of kl."""
    beta, reconstruction_weight = widened(beta), widened(reconstruction_weight)
    loss = negative_log_likelihood(likelihood, tensors, "batchmean")
    mean_kl = in_float32(kl).mean()
    dtype = torch.promote_types(loss.dtype, mean_kl.dtype)
    reconstruction = (reconstruction_weight * loss).to(dtype)
    return ELBO(reconstruction + (beta * mean_kl).to(dtype), reconstruction, mean_kl.to(dtype))


def elbo_value_and_grad(
    likelihood: Likelihood,
    tensors: Sequence[Tensor],
    kl: Tensor,
    beta: float | Tensor,
    reconstruction_weight: float | Tensor,
    grad_scale: float | Tensor | None,
) -> tuple[ELBO, tuple[Tensor, ...], Tensor]:
    """elbo_loss, and its gradients times grad_scale: of each parameter, reconstruction_weight / B * slope, and of kl,
    beta / B.
    """
    with torch.no_grad():
        values = elbo_loss(likelihood, tensors, kl, beta, reconstruction_weight)
        grad_scale = 1.0 if grad_scale is None else widened(grad_scale)
        scale = grad_scale / kl.shape[0] if kl.shape[0] else 0.0
        slopes = likelihood.slopes(*in_precision(likelihood, tensors))
        weight = widened(reconstruction_weight) * scale
        gradients = tuple((weight * slope).to(x.dtype) for slope, x in zip(slopes, tensors[:-1], strict=True))
        kl_slope = torch.ones(kl.shape, dtype=slopes[0].dtype, device=kl.device) * widened(beta) * scale
        return values, gradients, kl_slope.to(kl.dtype)
