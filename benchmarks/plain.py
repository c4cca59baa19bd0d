"""The operations as users write them in PyTorch, the baseline of the measurements.

They are fastvae's specification except for a few likelihoods. The specification of `SigmoidMSE` needs five more
operations, so that pixels whose sigmoid rounds to 1 keep their gradients. The specification of `Bernoulli` needs more
operations than torch's own function, so that small losses do not cancel. A baseline must not pay for either. The
likelihoods of counts are those of scvi-tools (`log_nb_positive` and `log_zinb_positive` of scvi-tools 1.x).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus

from fastvae.likelihoods import (
    Bernoulli,
    Likelihood,
    NegativeBinomial,
    SigmoidMSE,
    ZeroInflatedNegativeBinomial,
)
from fastvae.models.vae import as_tuple
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
    "negative_log_likelihood",
    "sigmoid_mse_loss",
]

Parameters = Tensor | tuple[Tensor, ...]


def read(parameters: Parameters, target: Tensor) -> list[Tensor]:
    """The parameters and the target in float32."""
    return [*map(in_float32, as_tuple(parameters)), pixels(target)]


def negative_log_likelihood(
    parameters: Parameters, target: Tensor, likelihood: Likelihood, *, reduction: str = "batchmean"
) -> Tensor:
    tensors = read(parameters, target)
    if likelihood == SigmoidMSE():
        x, t = tensors
        return reduce_event((torch.sigmoid(x) - t).square(), reduction)
    if likelihood == Bernoulli():
        if reduction == "batchmean":
            return binary_cross_entropy_with_logits(*tensors, reduction="sum") / len(target)
        return reduce_event(binary_cross_entropy_with_logits(*tensors, reduction="none"), reduction)
    if isinstance(likelihood, NegativeBinomial):
        return reduce_event(negative_binomial(*tensors, likelihood.eps), reduction)
    if isinstance(likelihood, ZeroInflatedNegativeBinomial):
        return reduce_event(zero_inflated(*tensors, likelihood.eps), reduction)
    return reduce_event(likelihood.formula(*tensors), reduction)


def negative_binomial(mean: Tensor, dispersion: Tensor, target: Tensor, eps: float) -> Tensor:
    log_total = torch.log(dispersion + mean + eps)
    return -(
        dispersion * (torch.log(dispersion + eps) - log_total)
        + target * (torch.log(mean + eps) - log_total)
        + torch.lgamma(target + dispersion)
        - torch.lgamma(dispersion)
        - torch.lgamma(target + 1)
    )


def zero_inflated(mean: Tensor, dispersion: Tensor, zero_logits: Tensor, target: Tensor, eps: float) -> Tensor:
    of_logits = softplus(-zero_logits)
    log_total = torch.log(dispersion + mean + eps)
    of_zero = -zero_logits + dispersion * (torch.log(dispersion + eps) - log_total)
    of_count = (
        of_zero
        + target * (torch.log(mean + eps) - log_total)
        + torch.lgamma(target + dispersion)
        - torch.lgamma(dispersion)
        - torch.lgamma(target + 1)
    )
    is_zero = (target < eps).to(mean.dtype)
    return of_logits - is_zero * softplus(of_zero) - (1 - is_zero) * of_count


def sigmoid_mse_loss(logits: Tensor, target: Tensor, *, reduction: str = "batchmean") -> Tensor:
    return negative_log_likelihood(logits, target, SigmoidMSE(), reduction=reduction)


def elbo_loss(
    parameters: Parameters, target: Tensor, kl: Tensor, *, likelihood: Likelihood = SigmoidMSE(), beta: float = 1.0
) -> ELBO:
    loss, mean_kl = negative_log_likelihood(parameters, target, likelihood), kl.mean()
    reconstruction = 0.5 * loss if likelihood == SigmoidMSE() else loss
    return ELBO(reconstruction + beta * mean_kl, reconstruction, mean_kl)


def elbo_value_and_grad(
    parameters: Parameters, target: Tensor, kl: Tensor, *, likelihood: Likelihood = SigmoidMSE(), beta: float = 1.0
) -> tuple[ELBO, tuple[Parameters, Tensor]]:
    """The gradients by hand, because autograd takes more operations."""
    with torch.no_grad():
        tensors, mean_kl = read(parameters, target), kl.mean()
        if likelihood == SigmoidMSE():
            x, t = tensors
            y = torch.sigmoid(x)
            error = y - t
            reconstruction, slopes = 0.5 * reduce_event(error.square(), "batchmean"), (error * y * (1.0 - y),)
        else:
            reconstruction = negative_log_likelihood(parameters, target, likelihood)
            slopes = likelihood.slopes(*tensors)
        values = ELBO(reconstruction + beta * mean_kl, reconstruction, mean_kl)
        each = zip(slopes, as_tuple(parameters), strict=True)
        gradients = tuple((slope / len(target)).to(x.dtype) for slope, x in each)
        gradient = gradients[0] if isinstance(parameters, Tensor) else gradients
        return values, (gradient, torch.full_like(kl, beta / len(kl)))
