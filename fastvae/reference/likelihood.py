"""The negative log-likelihood of any likelihood, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastvae.likelihoods.likelihood import Likelihood
from fastvae.reference.precision import in_float32, pixels, reduce_event


def in_precision(likelihood: Likelihood, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The parameters and the target in the precision of the arithmetic; a "unit" target of bytes becomes t / 255."""
    *parameters, target = tensors
    number = pixels(target) if likelihood.target == "unit" else in_float32(target)
    return [*map(in_float32, parameters), number]


def elements(likelihood: Likelihood, tensors: Sequence[Tensor]) -> Tensor:
    """Of each element, given the parameters and the target."""
    return likelihood.formula(*in_precision(likelihood, tensors))


def negative_log_likelihood(likelihood: Likelihood, tensors: Sequence[Tensor], reduction: str) -> Tensor:
    return reduce_event(elements(likelihood, tensors), reduction)
