"""The negative evidence lower bound, reconstruction plus weighted divergence, in plain PyTorch.

Kingma and Welling, "Auto-Encoding Variational Bayes", 2013, equation 10; the weight beta is Higgins et al.,
"beta-VAE", 2017, equation 4.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastvae.likelihoods.likelihood import Likelihood
from fastvae.likelihoods.sigmoid_mse import SigmoidMSE
from fastvae.reference import blocks
from fastvae.reference.likelihood import negative_log_likelihood
from fastvae.reference.precision import Parameters, in_float32, in_precision, widened


class ELBO(NamedTuple):
    """loss = reconstruction + beta * kl, each 0-dimensional and in nats; reconstruction is already weighted, kl is
    not.
    """

    loss: Tensor
    reconstruction: Tensor
    kl: Tensor


def elbo_loss(
    parameters: Parameters,
    target: Tensor,
    kl: Tensor,
    *,
    likelihood: Likelihood = SigmoidMSE(),
    beta: float | Tensor = 1.0,
    reconstruction_weight: float | Tensor | None = None,
) -> ELBO:
    """Batch mean of reconstruction_weight * the negative log-likelihood, plus beta * batch mean of kl."""
    weight = likelihood.reconstruction_weight if reconstruction_weight is None else widened(reconstruction_weight)
    loss = negative_log_likelihood(parameters, target, likelihood, reduction="batchmean")
    mean_kl = in_float32(kl).mean()
    dtype = torch.promote_types(loss.dtype, mean_kl.dtype)
    reconstruction = (weight * loss).to(dtype)
    return ELBO(reconstruction + (widened(beta) * mean_kl).to(dtype), reconstruction, mean_kl.to(dtype))


def elbo_value_and_grad(
    parameters: Parameters,
    target: Tensor,
    kl: Tensor,
    *,
    likelihood: Likelihood = SigmoidMSE(),
    beta: float | Tensor = 1.0,
    reconstruction_weight: float | Tensor | None = None,
    grad_scale: float | Tensor | None = None,
) -> tuple[ELBO, tuple[Parameters, Tensor]]:
    """elbo_loss, and its gradients times grad_scale: reconstruction_weight / B * slope for each parameter, and beta / B
    for kl.
    """
    with torch.no_grad():
        values = elbo_loss(
            parameters, target, kl, likelihood=likelihood, beta=beta, reconstruction_weight=reconstruction_weight
        )
        weight = likelihood.reconstruction_weight if reconstruction_weight is None else widened(reconstruction_weight)
        grad_scale = 1.0 if grad_scale is None else widened(grad_scale)
        scale = grad_scale / kl.shape[0] if kl.shape[0] else 0.0
        each = (parameters,) if isinstance(parameters, Tensor) else parameters
        rows = blocks.rows_of_a_block((*each, target))
        if rows is not None:
            found = blocks.gradients(likelihood, (*each, target), [True] * len(each), weight * scale, rows)
            gradients = tuple(gradient for gradient in found if gradient is not None)
        else:
            slopes = likelihood.slopes(*in_precision(parameters, target, likelihood))
            gradients = tuple(
                (weight * scale * slope).sum_to_size(x.shape).to(x.dtype) for slope, x in zip(slopes, each, strict=True)
            )
        kl_grad = torch.ones(kl.shape, dtype=values.loss.dtype, device=kl.device) * widened(beta) * scale
        return values, (gradients[0] if isinstance(parameters, Tensor) else gradients, kl_grad.to(kl.dtype))
