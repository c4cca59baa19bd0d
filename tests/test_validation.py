"""`validate` names the first value of a target that its likelihood is not for."""

from __future__ import annotations

import pytest
import torch

from fastvae.likelihoods import (
    Bernoulli,
    Categorical,
    DiscretizedLogistic,
    Gaussian,
    Multinomial,
    NegativeBinomial,
    Poisson,
    ZeroInflatedNegativeBinomial,
    validate,
)
from own_likelihood import LearnedGaussian

COUNTS = (Poisson(), NegativeBinomial(), ZeroInflatedNegativeBinomial())
GOOD = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
WRONG = [
    *[(likelihood, value, "a count, a whole number from 0 on") for likelihood in COUNTS for value in (-1.0, 0.5)],
    *[(Bernoulli(), value, "in [0, 1]") for value in (-0.25, 1.5)],
    (DiscretizedLogistic(), 2.0, "in [0, 1]"),
    (Gaussian(std=1.0, sigmoid=True), -3.0, "in [0, 1]"),
    *[(it, value, "finite") for it in (Gaussian(), Bernoulli(), *COUNTS) for value in (float("nan"), float("inf"))],
    (LearnedGaussian(), float("-inf"), "finite"),
]


@pytest.mark.parametrize(("likelihood", "value", "expected"), WRONG, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_wrong_value(likelihood, value, expected, dtype, device):
    target = GOOD.to(device, dtype, copy=True)
    validate(likelihood, target)
    target[1, 0] = value
    with pytest.raises(ValueError) as error:
        validate(likelihood, target)
    assert str(error.value) == f"target must be {expected} for {likelihood}, got {value} at [1, 0]"
    target[1, 1] = value
    with pytest.raises(ValueError, match=r"at \[1, 0\], and 1 more$"):
        validate(likelihood, target)


def test_classes(device):
    classes = torch.tensor([[0, 2], [-1, 7]], device=device)
    with pytest.raises(ValueError, match=r"number of a class, 0 or more for Categorical\(dim=1\), got -1 at \[1, 0\]$"):
        validate(Categorical(), classes)
    validate(Categorical(), classes.clamp(min=0))
    validate(Categorical(), GOOD.to(device))  # probabilities


def test_what_has_no_wrong_values(device):
    for likelihood in (Gaussian(), Multinomial()):
        validate(likelihood, torch.tensor([[-7.5, 1e6]], device=device))
    for likelihood in (*COUNTS, Bernoulli(), Categorical(), Gaussian()):
        validate(likelihood, torch.tensor([0, 255], dtype=torch.uint8, device=device))
        validate(likelihood, torch.empty(0, 3, device=device))


def test_what_is_not_a_target():
    with pytest.raises(TypeError, match="likelihood must be"):
        validate("Poisson", GOOD)
    with pytest.raises(TypeError, match=r"target must be a torch\.Tensor, got list"):
        validate(Poisson(), [1.0])
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        validate(Poisson(), torch.tensor([1, 2]))
    with pytest.raises(TypeError, match="target must be floating point for DiscretizedLogistic"):
        validate(DiscretizedLogistic(bins=100), torch.zeros(2, dtype=torch.uint8))
