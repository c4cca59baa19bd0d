"""What is particular to elbo_loss and elbo_value_and_grad: weights, grad_scale, the gradient of kl, and known values.

`test_contract.py` holds them to the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

import fastvae
import fastvae.functional as F
from bounds import assert_within, ulp
from contract import EVERY, FLOATS, check, launching_nothing
from fastvae.functional import ELBO
from fastvae.nn import ELBOLoss
from fastvae.operations import Spec, flattened, named
from fastvae.reference import elbo as reference

LOSS, AT_ONCE = (named(EVERY)[name] for name in ("elbo_loss", "elbo_value_and_grad"))
Scalar = float | Tensor


def make(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """logits, target and kl."""
    return tuple(t.detach() for t in LOSS.inputs(Spec(shape, dtype, device=device)))


def assert_equal(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> None:
    """Bit by bit."""
    assert len(first) == len(second)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# -------------------------------------------------------------------------------------------------------------- weights


SCALARS: dict[str, Callable[[torch.device], Scalar]] = {
    "float": lambda device: 2.75,
    "int": lambda device: 3,
    "zero": lambda device: 0,
    "negative": lambda device: -1.5,
    "float32": lambda device: torch.tensor(0.1, device=device),
    "float64": lambda device: torch.tensor(0.1, dtype=torch.float64, device=device),
    "bfloat16": lambda device: torch.tensor(0.1, dtype=torch.bfloat16, device=device),
    "float16": lambda device: torch.tensor(0.1, dtype=torch.float16, device=device),
    "element": lambda device: torch.linspace(0, 1, 7, device=device)[3],
}


@pytest.mark.parametrize("kind", SCALARS)
def test_scalars(triton_backend, device, kind) -> None:
    inputs, scalar = make((3, 5), device), SCALARS[kind](device)
    for operation in (LOSS, AT_ONCE):
        check(operation, inputs, beta=scalar)
        check(operation, inputs, reconstruction_weight=scalar)
    for dtype in FLOATS:
        logits, target, kl = make((3, 5), device, dtype)
        check(AT_ONCE, (logits, target, kl.to(dtype)), grad_scale=scalar)
    assert_equal(F.elbo_value_and_grad(*inputs, grad_scale=scalar)[0], F.elbo_value_and_grad(*inputs)[0])


def test_defaults(triton_backend, device) -> None:
    """beta 1 and half the squared error."""
    inputs = make((3, 5), device)
    assert_equal(F.elbo_loss(*inputs), F.elbo_loss(*inputs, beta=1.0, reconstruction_weight=0.5))
    values, gradients = F.elbo_value_and_grad(*inputs)
    same_values, same_gradients = F.elbo_value_and_grad(*inputs, beta=1.0, reconstruction_weight=0.5, grad_scale=1.0)
    assert_equal((*values, *gradients), (*same_values, *same_gradients))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0, 4.0, -2.0])
def test_loss_is_reconstruction_plus_beta_kl(triton_backend, device, beta) -> None:
    """Of the returned numbers themselves, to one rounding: loss is made from them."""
    loss, reconstruction, kl = (x.double().cpu() for x in F.elbo_loss(*make((3, 5), device), beta=beta))
    rounded_beta = torch.tensor(beta, dtype=torch.float32).double()
    assert_within(loss.float(), reconstruction + rounded_beta * kl, 0.0, 0)


@pytest.mark.parametrize("name", ["beta", "reconstruction_weight"])
def test_changing_a_weight_before_backward_is_an_error(triton_backend, device, name) -> None:
    logits, target, kl = make((3, 5), device)
    weight = torch.tensor(0.5, device=device)
    loss = F.elbo_loss(logits.requires_grad_(), target, kl, **{name: weight}).loss
    weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("number", [np.float32(0.25), np.float64(0.25), np.int64(2), np.uint8(2), Fraction(1, 4)])
def test_numbers_that_are_not_pythons(device, backend, number) -> None:
    inputs = make((2, 3), device)
    with fastvae.use_backend(backend):
        for function, names in ((F.elbo_loss, 2), (F.elbo_value_and_grad, 3)):
            weights = dict.fromkeys(("beta", "reconstruction_weight", "grad_scale")[:names], number)
            expected = function(*inputs, **dict.fromkeys(weights, float(number)))
            assert_equal(flattened(function(*inputs, **weights)), flattened(expected))


HALF_WEIGHTS = {  # (beta, reconstruction_weight, grad_scale)
    "a scale beyond half of the range": (1.0, 100.0, 60000.0),
    "no number of bits": (0.3, 0.7, 3.0),
}


@pytest.mark.parametrize("weights", HALF_WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_weights_of_half_precision_are_widened_once(device, backend, dtype, weights) -> None:
    """As their value in float32: products with them are not rounded to their dtype."""
    inputs = make((2, 3), device)
    half = [torch.tensor(w, dtype=dtype, device=device) for w in HALF_WEIGHTS[weights]]
    wide = [w.float() for w in half]
    names = ("beta", "reconstruction_weight", "grad_scale")
    with fastvae.use_backend(backend):
        for function, n in ((F.elbo_loss, 2), (F.elbo_value_and_grad, 3)):
            expected = flattened(function(*inputs, **dict(zip(names[:n], wide, strict=False))))
            actual = flattened(function(*inputs, **dict(zip(names[:n], half, strict=False))))
            assert all(value.isfinite().all() for value in expected)
            assert_equal(actual, expected)


def scalar_errors(name: str) -> list[tuple[dict[str, object], type[Exception], str]]:
    """What is wrong as a weight."""
    wanted = f"{name} must be a number or a 0-dimensional floating-point tensor, got a tensor of shape"
    number = f"{name} must be a number or a 0-dimensional tensor, got"
    return [
        ({name: torch.ones(1)}, ValueError, f"{wanted} [1] and torch.float32"),
        ({name: torch.tensor(1)}, ValueError, f"{wanted} [] and torch.int64"),
        (
            {name: torch.tensor(1.0, device="meta")},
            ValueError,
            f"{name} must be on the device of logits, {{device}}, got meta",
        ),
        (
            {name: torch.tensor(1.0, requires_grad=True)},
            ValueError,
            f"{name} must not require grad: it is a weight, not a parameter; pass {name}.detach()",
        ),
        ({name: True}, TypeError, f"{number} bool"),
        ({name: "1"}, TypeError, f"{number} str"),
        ({name: np.bool_(True)}, TypeError, f"{number} bool"),
        ({name: 10**400}, ValueError, f"{name} must be in the range of a float, got an integer of 1329 bits"),
    ]


@pytest.mark.parametrize(
    ("function", "changes", "error", "message"),
    [
        (function, *case)
        for function, names in ((F.elbo_loss, 2), (F.elbo_value_and_grad, 3))
        for name in ("beta", "reconstruction_weight", "grad_scale")[:names]
        for case in scalar_errors(name)
    ],
)
def test_wrong_weights_are_refused(device, function, changes, error, message) -> None:
    ((name, value),) = changes.items()
    if isinstance(value, Tensor) and not value.is_meta:
        value = value.detach().to(device).requires_grad_(value.requires_grad)
    with launching_nothing(), pytest.raises(error) as raised:
        function(*make((2, 3), device), **{name: value})
    assert str(raised.value) == message.format(device=device)


# ------------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("batch", [4, pytest.param(140, marks=pytest.mark.slow)])
def test_each_gradient_of_kl_can_be_written(backend, device, batch) -> None:
    """It is one number for all samples, and yet writing that of one sample changes no other's."""
    logits, target, kl = make((batch, 5), device)
    wanted = torch.full((batch,), 0.3 / batch, device=device)
    wanted[-1] = 7.0
    with fastvae.use_backend(backend):
        loss = F.elbo_loss(logits, target, kl.requires_grad_(), beta=0.3).loss
        gradients = [
            *torch.autograd.grad(loss, kl, retain_graph=True),
            torch.autograd.grad(loss, kl, create_graph=True)[0].detach(),
            F.elbo_value_and_grad(logits, target, kl, beta=0.3)[1][-1],
        ]
    for gradient in gradients:
        gradient[-1] = 7.0
        torch.testing.assert_close(gradient, wanted, rtol=2**-22, atol=0)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_value_and_grad_equals_autograd(triton_backend, device, dtype) -> None:
    """The values bit by bit; the gradients to one ulp and the roundings of two orders of multiplication, 4 and 3."""
    logits, target, kl = make((5, 60), device, dtype)
    logits.requires_grad_(), kl.requires_grad_()
    expected = F.elbo_loss(logits, target, kl, beta=0.7)
    gradients = torch.autograd.grad(expected.loss, (logits, kl))
    values, own_gradients = F.elbo_value_and_grad(logits, target, kl, beta=0.7)
    assert_equal(values, tuple(v.detach() for v in expected))
    for own, gradient in zip(own_gradients, gradients, strict=True):
        own, gradient = own.double().cpu(), gradient.double().cpu()
        assert ((own - gradient).abs() <= ulp(gradient, dtype) + 7 * 2.0**-24 * gradient.abs()).all()


def test_float16_gradients_at_loss_scale_65536(triton_backend, device) -> None:
    """Gradients of well-reconstructed pixels are below float16's smallest number if not scaled before rounding."""
    scale, batch = 65536.0, 128
    generator = torch.Generator().manual_seed(0)
    logits = (-6 + 2 * torch.randn(batch, 28, generator=generator)).to(device, torch.float16).requires_grad_()
    target, kl = torch.zeros_like(logits, dtype=torch.float32), torch.logspace(-2, 2, batch, device=device)

    def zeros(gradient: Tensor) -> float:
        return (gradient == 0).double().mean().item()

    def by_autograd(function: Callable[..., ELBO]) -> Tensor:
        return torch.autograd.grad(function(logits, target, kl).loss * scale, logits)[0]

    scaled = F.elbo_value_and_grad(logits, target, kl, grad_scale=scale)[1][0]
    unscaled = F.elbo_value_and_grad(logits, target, kl)[1][0]
    by_reference = zeros(reference.elbo_value_and_grad(logits, target, kl, grad_scale=scale)[1][0])
    assert zeros(scaled) <= by_reference
    assert zeros(by_autograd(F.elbo_loss)) <= zeros(by_autograd(reference.elbo_loss))
    assert zeros(scaled) < 0.01 < 0.2 < zeros(unscaled)
    assert scaled.isfinite().all()


def test_gradcheck_of_the_reference() -> None:
    logits, target, kl = (x.double().requires_grad_() for x in make((3, 2, 2), torch.device("cpu")))

    def function(*inputs: Tensor) -> ELBO:
        return reference.elbo_loss(*inputs, beta=0.7, reconstruction_weight=0.3)

    assert torch.autograd.gradcheck(function, (logits, target, kl))
    assert torch.autograd.gradgradcheck(function, (logits, target, kl))
    gradients = torch.autograd.grad(function(logits, target, kl).loss * 8, (logits, kl))
    options = {"beta": 0.7, "reconstruction_weight": 0.3, "grad_scale": 8.0}
    for own, gradient in zip(reference.elbo_value_and_grad(logits, target, kl, **options)[1], gradients, strict=True):
        assert torch.allclose(own, gradient, rtol=1e-13, atol=0)


# --------------------------------------------------------------------------------------------------------- known values


def test_a_grey_image_of_a_black_one_costs_98(triton_backend, device) -> None:
    """784 pixels, each half of a quarter: exact in float32."""
    logits = torch.zeros(3, 1, 28, 28, device=device)
    values = F.elbo_loss(logits, torch.zeros_like(logits), torch.zeros(3, device=device))
    assert values.reconstruction.item() == values.loss.item() == 0.5 * 0.25 * 784 == 98


def test_a_grey_and_a_black_image(triton_backend, device) -> None:
    """From the definition, for an output of 0.5 everywhere and for one of 0."""
    target = (255 * torch.rand(4, 1, 28, 28)).to(device, torch.uint8)
    kl, t = torch.zeros(4, device=device), target.double() / 255
    for logit, y in ((0.0, 0.5), (-1e4, 0.0), (-math.inf, 0.0)):
        logits = torch.full(t.shape, logit, device=device)
        with fastvae.use_backend("reference"):
            value = F.elbo_loss(logits.double(), t, kl).loss
        torch.testing.assert_close(value, 0.5 * (y - t).square().flatten(1).sum(1).mean(), rtol=1e-14, atol=0)
        check(LOSS, (logits, target, kl))


def test_half_the_squared_error_of_28_by_28_is_392_times_the_mean() -> None:
    logits, target = torch.randn(2, 5, 1, 28, 28, dtype=torch.float64)
    expected = 392 * torch.nn.functional.mse_loss(torch.sigmoid(logits), target)
    value = F.elbo_loss(logits, target, torch.zeros(5)).reconstruction
    torch.testing.assert_close(value, expected, rtol=1e-14, atol=0)


def test_module(triton_backend, device) -> None:
    inputs = make((3, 5), device)
    module = ELBOLoss(beta=2.0, reconstruction_weight=1.0)
    assert_equal(module(*inputs), F.elbo_loss(*inputs, beta=2.0, reconstruction_weight=1.0))
    module.beta = torch.tensor(0.25, device=device)  # a warm-up
    assert_equal(module(*inputs), F.elbo_loss(*inputs, beta=0.25, reconstruction_weight=1.0))
    assert_equal(ELBOLoss()(*inputs), F.elbo_loss(*inputs))
    assert repr(ELBOLoss()) == "ELBOLoss(SigmoidMSE(), beta=1.0, reconstruction_weight=0.5)"
