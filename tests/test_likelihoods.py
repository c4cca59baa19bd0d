"""What a description of a likelihood must be, and what is said of one that is wrong."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastvae
import fastvae.functional as F
from bounds import assert_within
from fastvae.likelihoods import Bernoulli, Likelihood, SigmoidMSE, Term, check
from fastvae.likelihoods.checking import exact
from fastvae.likelihoods.likelihood import from_key
from fastvae.nn import ELBOLoss, NegativeLogLikelihood
from fastvae.operations import LIKELIHOODS
from own_likelihood import OWN, LearnedGaussian, SmoothL1


@pytest.mark.parametrize("likelihood", [*LIKELIHOODS, *OWN, SmoothL1(eps=1.0)], ids=str)
def test_terms_are_their_formulas(likelihood, device) -> None:
    for seed in range(2):
        check(likelihood, device=device, seed=seed)


@pytest.mark.parametrize("likelihood", [*LIKELIHOODS, *OWN, SmoothL1(eps=1.0)], ids=str)
def test_a_key_is_the_likelihood(likelihood) -> None:
    assert from_key(likelihood.key) == likelihood
    assert from_key(likelihood.key) is from_key(likelihood.key)


@pytest.mark.parametrize(
    "key",
    [
        "",
        "os:system('true')",
        "os:getcwd()",
        "fastvae.likelihoods.bernoulli:Bernoulli",
        "fastvae.likelihoods.bernoulli:Bernoulli(__import__('os').getcwd())",
        "fastvae.likelihoods.bernoulli:Bernoulli(eps=open('x'))",
        "fastvae.likelihoods.bernoulli:Bernoulli(eps=1)",
        "fastvae.likelihoods.bernoulli:Bernoulli() or 1",
        "fastvae.likelihoods.bernoulli:Normal()",
        "fastvae.likelihoods.no_such_module:Bernoulli()",
        "fastvae.likelihoods.likelihood:Term(function=1)",
    ],
)
def test_no_other_text_is_a_key(key) -> None:
    with pytest.raises(ValueError, match="names no likelihood"):
        from_key(key)


@dataclass(frozen=True)
class WithSettings(SmoothL1):
    """Settings of every kind that a term can be compiled for, and of others."""

    bounds: Any = (-math.inf, math.inf)
    name: Any = "inf"
    nested: Any = ((1,), (), True, None)


def test_settings_with_infinities_have_a_key() -> None:
    likelihood = WithSettings(eps=math.inf)
    assert "(eps=1e999, bounds=(-1e999, 1e999), name='inf', nested=((1,), (), True, None))" in likelihood.key
    assert from_key(likelihood.key) == likelihood


@pytest.mark.parametrize("value", [[1.0], {}, np.float64(0.1), np.int64(1), torch.tensor(0.1), (0.0, [1])], ids=repr)
def test_a_setting_of_another_type_is_told(value, device) -> None:
    x, likelihood = torch.zeros(2, 3, device=device), WithSettings(bounds=value)
    complaint = r"WithSettings\.bounds must be a number, a text, a boolean, None, or a tuple of them, .* got "
    with fastvae.use_backend("triton"), pytest.raises(TypeError, match=complaint):
        F.negative_log_likelihood(x, x, likelihood)
    with pytest.raises(TypeError, match=complaint):
        _ = likelihood.key


@dataclass(frozen=True)
class Incomparable(SmoothL1):
    eps: float = field(default=0.125, compare=False)


def test_a_setting_that_equality_leaves_out_is_refused(device) -> None:
    """A kernel for one value would be taken for another."""
    x = torch.zeros(2, 3, device=device)
    with (
        fastvae.use_backend("triton"),
        pytest.raises(TypeError, match=r"Incomparable\.eps must not be a field with compare"),
    ):
        F.negative_log_likelihood(x, x, Incomparable(1.0))


# ------------------------------------------------------------------------------------------------------------- check


@Term
def too_few(parameters, target, SETTINGS, FAST):
    error = target - parameters[0]
    return error * error, (-2.0 * error,)


@Term
def another_shape(parameters, target, SETTINGS, FAST):
    error = target - parameters[0]
    return (error * error)[None], (-2.0 * error, 2.0 * error)


@Term
def wrong_value(parameters, target, SETTINGS, FAST):
    error = target - parameters[0]
    return 1.0001 * error * error, (-2.0 * error, 2.0 * error)


@Term
def wrong_slope(parameters, target, SETTINGS, FAST):
    error = target - parameters[0]
    return error * error, (2.0 * error, 2.0 * error)


@dataclass(frozen=True)
class Squared(Likelihood):
    """The squared error of a term that is right."""

    parameters = ("mean",)
    target = "number"
    roundings = (3, 2, 2)
    target_has_slope = True

    def formula(self, mean: Tensor, target: Tensor) -> Tensor:
        return (target - mean).square()


@Term
def unknown_name(parameters, target, SETTINGS, FAST):
    error = target - no_such_name  # noqa: F821
    return error * error, (-2.0 * error, 2.0 * error)


def with_term(term: Term) -> Likelihood:
    return dataclass(frozen=True)(type("Squared", (Squared,), {"term": term}))()


@pytest.mark.parametrize(
    ("term", "complaint"),
    [
        (too_few, "a term returns a slope for each parameter, and for a target that has one"),
        (another_shape, "a term returns a value of the shape of its target"),
        # In the words of Python, or, compiled, under the line of the term.
        (unknown_name, r"(?s)cannot run: (name '|at .*NameError\(')no_such_name'? is not defined"),
        (wrong_value, r"the value: at mean = .*, target = .* the term has .*, the formula .* times the bound"),
        (wrong_slope, r"the slope of mean: at .* times the bound for roundings\[1\] = 2"),
    ],
    ids=lambda it: it.function.__name__ if isinstance(it, Term) else "",
)
def test_a_wrong_term_is_told(term, complaint, device) -> None:
    with pytest.raises(ValueError, match=complaint) as raised:
        check(with_term(term), device=device)
    assert "slope of target" not in str(raised.value)


@dataclass(frozen=True)
class Unstable(Squared):
    target = "unit"

    def formula(self, mean: Tensor, target: Tensor) -> Tensor:
        return -target * torch.log(torch.sigmoid(mean)) - (1 - target) * torch.log(1 - torch.sigmoid(mean))


@dataclass(frozen=True)
class Summed(Squared):
    def formula(self, mean: Tensor, target: Tensor) -> Tensor:
        return (target - mean).square().sum()


@dataclass(frozen=True)
class WrongSlopes(Squared):
    def slopes(self, mean: Tensor, target: Tensor) -> tuple[Tensor]:
        return (target - mean,)


class Undecorated(Squared):
    pass


@dataclass(frozen=True)
class DrawsTooFew(Squared):
    def draw(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        return (torch.zeros(shape),)


@pytest.mark.parametrize(
    ("likelihood", "complaint"),
    [
        (Unstable(), r"the formula is inf in float32 at mean = .*: write it in a form that is stable"),
        (Summed(), r"formula must return a value for each element, \[\d+\], got \[\]"),
        (Undecorated(), r"Undecorated must be decorated with @dataclass\(frozen=True\)"),
        (WrongSlopes(), r"the slope of mean: at .* slopes\(\) has .*, the formula .* times the bound"),
        (DrawsTooFew(), "draw must return the 1 parameters and the target, got 1 tensors"),
    ],
    ids=lambda it: type(it).__name__ if isinstance(it, Likelihood) else "",
)
def test_a_wrong_description_is_told(likelihood, complaint) -> None:
    with pytest.raises(ValueError, match=complaint):
        check(likelihood)


@pytest.mark.parametrize(
    ("attributes", "complaint"),
    [
        ({"parameters": ()}, r"\.parameters must be a tuple of names, got \(\)"),
        ({"parameters": "mean"}, r"\.parameters must be a tuple of names, got 'mean'"),
        ({"target": "image"}, r"\.target must be one of unit, number, class, got 'image'"),
        ({"term": exact}, r"\.term must be decorated with @fastvae\.likelihoods\.Term, got <function exact"),
        ({"roundings": (3, 2)}, r"\.roundings must have 3 numbers, of the value and of 2 slopes, got \(3, 2\)"),
    ],
    ids=lambda it: next(iter(it)) if isinstance(it, dict) else "",
)
def test_a_class_that_is_no_description(attributes, complaint) -> None:
    with pytest.raises(TypeError, match=complaint):
        type("Wrong", (Squared,), attributes)
    with pytest.raises(TypeError, match="Empty must define parameters"):
        type("Empty", (Likelihood,), {})


# ------------------------------------------------------------------------------------------------ calls and modules


def test_the_number_of_parameters() -> None:
    mean, target = torch.zeros(2, 3), torch.zeros(2, 3)
    for given in (mean, (mean,), (mean, mean, mean)):
        with pytest.raises(
            ValueError, match=r"parameters must be the 2 tensors \(mean, log_variance\) of LearnedGaussian"
        ):
            F.negative_log_likelihood(given, target, LearnedGaussian())
    with pytest.raises(ValueError, match=r"log_variance must have the shape of mean, \[2, 3\], or .*, got \[2, 4\]"):
        F.elbo_loss((mean, torch.zeros(2, 4)), target, torch.zeros(2), likelihood=LearnedGaussian())
    with pytest.raises(TypeError, match=r"likelihood must be a fastvae\.likelihoods\.Likelihood, got 'bernoulli'"):
        F.negative_log_likelihood(mean, target, "bernoulli")
    with pytest.raises(TypeError, match=r"likelihood must be a fastvae\.likelihoods\.Likelihood, got <class"):
        F.negative_log_likelihood(mean, target, Bernoulli)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_gradients_come_as_the_parameters_do(backend, device) -> None:
    mean, logvar, target, kl = (torch.rand(2, 3, device=device) for _ in range(4))
    with fastvae.use_backend(backend):
        _, (gradients, kl_grad) = F.elbo_value_and_grad(
            (mean, logvar), target, kl[:, 0], likelihood=LearnedGaussian(), beta=0.5
        )
        assert [g.shape for g in gradients] == [(2, 3)] * 2 and kl_grad.tolist() == [0.25, 0.25]
        _, (in_tuple, _) = F.elbo_value_and_grad((mean,), target, kl[:, 0], likelihood=Bernoulli())
        _, (alone, _) = F.elbo_value_and_grad(mean, target, kl[:, 0], likelihood=Bernoulli())
        assert isinstance(in_tuple, tuple) and torch.equal(in_tuple[0], alone)


@pytest.mark.parametrize("operation", ["loss", "bound"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_target_requires_grad_whose_slope_the_term_does_not_return(operation, compiled, device) -> None:
    def values(mean, logvar, target, kl):
        if operation == "loss":
            return F.negative_log_likelihood((mean, logvar), target, LearnedGaussian(), reduction="sum")
        return F.elbo_loss((mean, logvar), target, kl, likelihood=LearnedGaussian()).loss

    inputs = [torch.rand(2, 3, device=device, requires_grad=True) for _ in range(3)]
    kl = torch.rand(2, device=device)
    expected = torch.autograd.grad(values(*(x.double() for x in inputs), kl), inputs)
    function = torch.compile(values, fullgraph=True, backend="aot_eager") if compiled else values
    with fastvae.use_backend("triton"):
        gradients = torch.autograd.grad(function(*inputs, kl), inputs)
    torch.testing.assert_close(gradients, expected)


def test_the_weight_of_the_reconstruction_is_the_likelihoods() -> None:
    x, t, kl = torch.randn(2, 3), torch.rand(2, 3), torch.rand(2)
    for likelihood, weight in ((SigmoidMSE(), 0.5), (Bernoulli(), 1.0)):
        value = F.elbo_loss(x, t, kl, likelihood=likelihood).reconstruction
        torch.testing.assert_close(value, weight * F.negative_log_likelihood(x, t, likelihood))
        assert value == F.elbo_loss(x, t, kl, likelihood=likelihood, reconstruction_weight=weight).reconstruction


def test_modules() -> None:
    x, t, kl = torch.randn(2, 3), torch.rand(2, 3), torch.rand(2)
    module = NegativeLogLikelihood(Bernoulli(), reduction="none")
    assert torch.equal(module(x, t), F.negative_log_likelihood(x, t, Bernoulli(), reduction="none"))
    assert repr(module) == "NegativeLogLikelihood(Bernoulli(), reduction='none')"
    assert ELBOLoss(Bernoulli())(x, t, kl) == F.elbo_loss(x, t, kl, likelihood=Bernoulli())
    assert repr(ELBOLoss(SmoothL1())) == "ELBOLoss(SmoothL1(eps=0.125), beta=1.0, reconstruction_weight=1.0)"


@pytest.mark.parametrize("module", [ELBOLoss, NegativeLogLikelihood])
@pytest.mark.parametrize("given", [Bernoulli, 0.5, 0.0, "bernoulli"], ids=str)
def test_a_module_is_made_with_a_likelihood(module, given) -> None:
    with pytest.raises(TypeError, match=r"likelihood must be a fastvae\.likelihoods\.Likelihood, got "):
        module(given)


# ---------------------------------------------------------------------------------------------------------- Bernoulli


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bernoulli_is_binary_cross_entropy(dtype, backend, device) -> None:
    """In half precision too, where torch's own refuses, or rounds the loss of each pixel."""
    x = (4 * torch.randn(5, 3, 7, device=device)).to(dtype).requires_grad_()
    for t in (torch.rand(5, 3, 7, device=device), torch.randint(0, 256, (5, 3, 7), dtype=torch.uint8, device=device)):
        wide = x.detach().double().requires_grad_()
        pixels = t.double() / 255 if t.dtype is torch.uint8 else t.double()
        expected = torch.nn.functional.binary_cross_entropy_with_logits(wide, pixels, reduction="sum") / 5
        with fastvae.use_backend(backend), torch.autocast(device.type, torch.bfloat16):
            loss = F.negative_log_likelihood(x, t, Bernoulli())
        assert loss.dtype is torch.float32
        torch.testing.assert_close(loss, expected.float(), rtol=1e-6, atol=0)
        (gradient,) = torch.autograd.grad(loss, x)
        (expected_gradient,) = torch.autograd.grad(expected, wide)
        assert gradient.dtype is dtype
        assert_within(gradient, expected_gradient, exact(Bernoulli(), (wide, pixels)).first[1] / 5, 14, "gradient")


def test_the_slope_of_bernoulli_at_zero() -> None:
    x = torch.zeros(1, 3, requires_grad=True)
    loss = F.negative_log_likelihood(x, torch.tensor([[0.0, 0.25, 1.0]]), Bernoulli())
    assert torch.autograd.grad(loss, x)[0].tolist() == [[0.5, 0.25, -0.5]]
