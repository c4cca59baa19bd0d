"""The negative log-likelihood of any likelihood, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from fastvae.likelihoods.likelihood import Likelihood
from fastvae.likelihoods.sigmoid_mse import SigmoidMSE
from fastvae.reference.precision import in_float32, pixels, reduce_event

Parameters = Tensor | tuple[Tensor, ...]


def in_precision(parameters: Parameters, target: Tensor, likelihood: Likelihood) -> list[Tensor]:
    """The parameters and the target in float32 (float64 stays); a "unit" target of bytes becomes t / 255, and classes
    become int64.
    """
    each = (parameters,) if isinstance(parameters, Tensor) else parameters
    if likelihood.target == "class" and target.ndim < each[0].ndim:
        return [*map(in_float32, each), target.long()]
    return [*map(in_float32, each), pixels(target) if likelihood.target == "unit" else in_float32(target)]


def negative_log_likelihood(
    parameters: Parameters, target: Tensor, likelihood: Likelihood, *, reduction: str = "batchmean"
) -> Tensor:
    """The formula of each element, reduced."""
    return reduce_event(likelihood.formula(*in_precision(parameters, target, likelihood)), reduction)


def sigmoid_mse_loss(logits: Tensor, target: Tensor, *, reduction: str = "batchmean") -> Tensor:
    """(sigmoid(logits) - target)^2, reduced."""
    return negative_log_likelihood(logits, target, SigmoidMSE(), reduction=reduction)
