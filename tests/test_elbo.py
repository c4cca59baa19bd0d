"""elbo_loss and elbo_value_and_grad: the kernels against the reference in float64, within the bound of bounds.py.

As in test_reconstruction.py, where the inputs come from, `check` runs the operations and compares all that comes out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

import fastvae
import fastvae.functional as F
from bounds import assert_within, ulp
from fastvae.functional import ELBO
from fastvae.kernels import INTERPRETED, elementwise
from fastvae.kernels import launch as launching
from fastvae.kernels import likelihood as kernels
from fastvae.nn import ELBOLoss
from fastvae.reference import elbo as reference
from test_reconstruction import (
    EVENT_4D,
    FLOATS,
    GRADIENT,
    LAYOUTS,
    TERM,
    CopyCount,
    assert_equal,
    assert_strides_of,
    condition,
    draw,
    fail_in_the_third_program,
    in_float64,
    launching_nothing,
    levels,
    make,
    memory,
    rms,
    truncated,
    use_small_tiles,
)

# Roundings of a value, from the kernel's docstring: those of its terms, these, and one per level of its sum.
MORE = 4
# Roundings of the gradients in logits, target and kl. The last is (beta * g + g') / B: beta is converted, 1 / B is a
# constant, and there are three operations.
GRADIENTS = (GRADIENT, GRADIENT, 5)
UPSTREAM = (0.75, -1.25, 2.5)  # gradients of loss, reconstruction and kl
Scalar = float | Tensor


def divergences(batch: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A positive kl for each sample, of widely different sizes."""
    return torch.logspace(-2, 2, max(batch, 1), device=device)[:batch].to(dtype)


def make_all(shape: tuple[int, ...], device: torch.device, *args, **kwargs) -> tuple[Tensor, Tensor, Tensor]:
    return *make(shape, device, *args, **kwargs), divergences(shape[0], device)


# ------------------------------------------------------------------------------------------------------------ oracle


class Oracle:
    """What float64 says, and the condition scale S of each number."""

    def __init__(
        self, logits: Tensor, target: Tensor, kl: Tensor, beta: Scalar, weight: Scalar, upstream: tuple[float, ...]
    ) -> None:
        x, t, k = (v.requires_grad_() for v in (logits.detach().double().cpu(), in_float64(target), in_float64(kl)))
        beta, weight = float(beta), float(weight)
        values = reference.elbo_loss(x, t, k, beta=beta, reconstruction_weight=weight)
        self.values = ELBO(*(value.detach() for value in values))
        upstream_tensors = [torch.tensor(g, dtype=torch.float64) for g in upstream]
        self.gradients = torch.autograd.grad(values, (x, t, k), upstream_tensors)
        error, slope = condition(logits, target)
        batch = max(len(kl), 1)
        reconstruction = abs(weight) * error.square().sum() / batch
        mean_kl = k.detach().abs().sum() / batch
        self.value_scales = reconstruction + abs(beta) * mean_kl, reconstruction, mean_kl
        loss_grad, reconstruction_grad, kl_grad = map(abs, upstream)
        error_grad = 2 * abs(weight) * (loss_grad + reconstruction_grad) / batch * error
        kl_scale = torch.full_like(k, (abs(beta) * loss_grad + kl_grad) / batch)
        self.gradient_scales = error_grad * slope, error_grad, kl_scale

        self.value_roundings = (
            TERM + MORE + levels(max(x.numel(), batch)),
            TERM + MORE + levels(x.numel()),
            MORE + levels(batch),
        )

    def check_values(self, values: ELBO) -> None:
        for i, name in enumerate(ELBO._fields):
            assert values[i].dtype is torch.float32
            assert_within(values[i], self.values[i], self.value_scales[i], self.value_roundings[i], name)

    def check_gradient(self, i: int, gradient: Tensor, of: Tensor) -> None:
        """The gradient in the i-th input, `of`."""
        assert gradient.dtype is of.dtype
        name = ("logits", "target", "kl")[i]
        assert_within(gradient, self.gradients[i], self.gradient_scales[i], GRADIENTS[i], f"gradient of {name}")
        if name == "kl":
            assert gradient.is_contiguous()
        else:
            assert_strides_of(of, gradient)


def check(
    logits: Tensor,
    target: Tensor,
    kl: Tensor,
    beta: Scalar = 0.7,
    weight: Scalar = 0.3,
    upstream: tuple[float | None, ...] = UPSTREAM,
) -> None:
    """elbo_loss and its gradients in all inputs, given those of its outputs; and that the inputs are as they were."""
    inputs = [logits.detach(), target.detach(), kl.detach()]
    before = [memory(x).clone() for x in inputs]
    for x in inputs:
        x.requires_grad_(x.is_floating_point())
    values = F.elbo_loss(*inputs, beta=beta, reconstruction_weight=weight)
    used = [i for i, g in enumerate(upstream) if g is not None]
    wanted = [x for x in inputs if x.requires_grad]
    value_grads = [torch.tensor(upstream[i], device=logits.device) for i in used]
    gradients = torch.autograd.grad([values[i] for i in used], wanted, value_grads, materialize_grads=True)

    expected = Oracle(*inputs, beta, weight, tuple(g or 0.0 for g in upstream))
    expected.check_values(values)
    for gradient, i in zip(gradients, [i for i in range(3) if inputs[i].requires_grad], strict=True):
        expected.check_gradient(i, gradient, inputs[i])
    for x, bytes_before in zip(inputs, before, strict=True):
        assert torch.equal(memory(x), bytes_before), "an input was written"
    check_value_and_grad(*inputs, beta, weight)


def check_value_and_grad(
    logits: Tensor,
    target: Tensor,
    kl: Tensor,
    beta: Scalar = 0.7,
    weight: Scalar = 0.3,
    grad_scale: Scalar | None = None,
) -> None:
    before = [memory(x).clone() for x in (logits, target, kl)]
    values, gradients = F.elbo_value_and_grad(
        logits, target, kl, beta=beta, reconstruction_weight=weight, grad_scale=grad_scale
    )
    expected = Oracle(logits, target, kl, beta, weight, (1.0 if grad_scale is None else float(grad_scale), 0.0, 0.0))
    assert isinstance(values, ELBO)
    expected.check_values(values)
    expected.check_gradient(0, gradients[0], logits)
    expected.check_gradient(2, gradients[1], kl)
    assert not any(x.requires_grad or x.grad_fn is not None for x in (*values, *gradients)), "attached to a graph"
    for x, bytes_before in zip((logits, target, kl), before, strict=True):
        assert torch.equal(memory(x), bytes_before), "an input was written"


# ------------------------------------------------------------------------------------------------ values and gradients


@pytest.mark.parametrize("target_dtype", [*FLOATS, torch.uint8], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values_and_gradients(triton_backend, device, dtype, target_dtype) -> None:
    check(*make_all((5, 7), device, dtype, target_dtype))
    check(*make_all((2, *EVENT_4D), device, dtype, target_dtype))


# One program up to 1024 or 2048 elements of 4 or 2 bytes and from there to 4096, then tiles of 1024 or 2048.
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((1, 1), torch.float32), ((3, 1), torch.float32), ((1030, 1), torch.float32), ((2, 3, 2, 3, 2), torch.float32)]
    + [((3, n), torch.float32) for n in (341, 342, 1365, 1366, 1501)]
    + [((2, n), torch.float16) for n in (1023, 1024, 1025, 2047, 2048, 2049)]
    + [((5, 3, 19, 17), torch.bfloat16)],
    ids=str,
)
def test_sizes(triton_backend, device, shape, dtype) -> None:
    check(*make_all(shape, device, dtype))


@pytest.mark.parametrize("shape", [(3, 0), (1, 0), (2, 3, 0, 4)], ids=str)
def test_empty_events(triton_backend, device, shape) -> None:
    """No reconstruction, but a divergence, and its gradient."""
    check(*make_all(shape, device))


@pytest.mark.parametrize("shape", [(0, 5), (0, 2, 3, 4), (0, 0)], ids=str)
def test_empty_batch(device, shape) -> None:
    """Means over nothing are NaN, as in torch; gradients are empty."""
    with launching_nothing():
        check(*make_all(shape, device))


@pytest.mark.parametrize("i", range(3))
def test_empty_batch_twice_differentiable(device, i) -> None:
    logits, target, kl = (x.requires_grad_() for x in make_all((0, 5), device))
    with launching_nothing():
        value = F.elbo_loss(logits, target, kl)[i]
        gradients = torch.autograd.grad(value, (logits, target, kl), create_graph=True, materialize_grads=True)
    assert [g.shape for g in gradients] == [(0, 5), (0, 5), (0,)]


@pytest.mark.parametrize("which", ["logits", "target", "both"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 5), (1, 5), (2, *EVENT_4D), (2, 2, 3, 2, 3)], ids=str)
def test_layouts(triton_backend, device, shape, layout, which) -> None:
    layouts = (layout if which != "target" else "contiguous", layout if which != "logits" else "contiguous")
    check(*make_all(shape, device, layouts=layouts))


@pytest.mark.parametrize("layout", ["contiguous", "expanded", "sliced", "reversed column"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_kl(triton_backend, device, dtype, layout) -> None:
    kl = {
        "contiguous": lambda kl: kl,
        "expanded": lambda kl: kl[3:4].expand(5),
        "sliced": lambda kl: torch.stack([kl, kl + 1], 1)[:, 0],
        "reversed column": lambda kl: torch.stack([kl, kl, kl + 1])[2].flip(0),
    }[layout](divergences(5, device, dtype))
    check(*make((5, 7), device), kl)


@pytest.mark.parametrize("batch", [1023, 1024, 1025, 2050])
def test_kl_of_large_batches(triton_backend, device, batch) -> None:
    """kl is read in blocks of 1024 samples."""
    check(*make_all((batch, 1), device))


def test_float64_is_computed_by_the_reference(device) -> None:
    """A single float64 among the tensors is enough."""
    logits, target, kl = make_all((3, 5), device)
    with fastvae.use_backend("auto"):
        assert F.elbo_loss(logits.double(), target.double(), kl.double()).loss.dtype is torch.float64
        for arguments in ((logits.double(), target, kl), (logits, target.double(), kl), (logits, target, kl.double())):
            assert {value.dtype for value in F.elbo_loss(*arguments)} == {torch.float64}
    with fastvae.use_backend("triton"), pytest.raises(RuntimeError, match="float64"):
        F.elbo_loss(logits, target, kl.double())


# ------------------------------------------------------------------------------------------------------------ scalars


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
    inputs, scalar = make_all((3, 5), device), SCALARS[kind](device)
    check(*inputs, beta=scalar)
    check(*inputs, weight=scalar)
    check_value_and_grad(*inputs, grad_scale=scalar)


def test_defaults(triton_backend, device) -> None:
    """beta 1 and half the squared error."""
    inputs = make_all((3, 5), device)
    assert_equal(F.elbo_loss(*inputs), F.elbo_loss(*inputs, beta=1.0, reconstruction_weight=0.5))
    values, gradients = F.elbo_value_and_grad(*inputs)
    same_values, same_gradients = F.elbo_value_and_grad(*inputs, beta=1.0, reconstruction_weight=0.5, grad_scale=1.0)
    assert_equal((*values, *gradients), (*same_values, *same_gradients))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0, 4.0, -2.0])
def test_loss_is_reconstruction_plus_beta_kl(triton_backend, device, beta) -> None:
    """Of the returned numbers themselves, to one rounding: loss is made from them."""
    loss, reconstruction, kl = (x.double().cpu() for x in F.elbo_loss(*make_all((3, 5), device), beta=beta))
    rounded_beta = torch.tensor(beta, dtype=torch.float32).double()
    assert_within(loss.float(), reconstruction + rounded_beta * kl, 0.0, 0)


@pytest.mark.parametrize("name", ["beta", "reconstruction_weight"])
def test_changing_a_weight_before_backward_is_an_error(triton_backend, device, name) -> None:
    logits, target, kl = make_all((3, 5), device)
    weight = torch.tensor(0.5, device=device)
    loss = F.elbo_loss(logits.requires_grad_(), target, kl, **{name: weight}).loss
    weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ----------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("used", [u for u in itertools.product((True, False), repeat=3) if any(u)], ids=str)
def test_gradients_of_some_of_the_values(triton_backend, device, used) -> None:
    upstream = tuple(g if use else None for g, use in zip(UPSTREAM, used, strict=True))
    check(*make_all((3, 5), device), upstream=upstream)
    check(*make_all((3, 5), device), beta=torch.tensor(0.4, device=device), upstream=upstream)


@pytest.mark.parametrize(
    ("i", "reached"), [(0, (True, True, True)), (1, (True, True, False)), (2, (False, False, True))]
)
@pytest.mark.parametrize("create_graph", [False, True])
def test_what_no_upstream_gradient_reaches_has_none(triton_backend, device, i, reached, create_graph) -> None:
    inputs = [x.requires_grad_() for x in make_all((3, 5), device)]
    value = F.elbo_loss(*inputs)[i]
    gradients = torch.autograd.grad(value, inputs, create_graph=create_graph, allow_unused=True)
    assert tuple(g is not None for g in gradients) == reached


@pytest.mark.parametrize("needs", [n for n in itertools.product((True, False), repeat=3) if any(n)], ids=str)
def test_one_launch_forward_and_one_backward_for_what_is_needed(triton_backend, device, needs) -> None:
    inputs = make_all((3, 1400), device)  # more than one program
    everything = [x.detach().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(F.elbo_loss(*everything).loss, everything)
    inputs = [x.requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
    before = triton_backend.count
    loss = F.elbo_loss(*inputs).loss
    assert triton_backend.count == before + 1
    wanted = [x for x in inputs if x.requires_grad]
    gradients = torch.autograd.grad(loss, wanted, torch.ones_like(loss))
    assert triton_backend.count == before + 2
    assert_equal(gradients, tuple(g for g, need in zip(expected, needs, strict=True) if need))


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("batch", [4, pytest.param(140, marks=pytest.mark.slow)])
def test_each_gradient_of_kl_can_be_written(backend, device, batch) -> None:
    """It is one number for all samples, and yet writing that of one sample changes no other's."""
    logits, target, kl = make_all((batch, 5), device)
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


def test_value_and_grad_is_one_launch(triton_backend, device) -> None:
    inputs = make_all((3, 1400), device)
    before = triton_backend.count
    F.elbo_value_and_grad(*inputs)
    assert triton_backend.count == before + 1


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_value_and_grad_equals_autograd(triton_backend, device, dtype) -> None:
    """The values bit by bit; the gradients to one ulp and the roundings of two orders of multiplication, 4 and 3."""
    logits, target, kl = make_all((5, 60), device, dtype)
    logits.requires_grad_(), kl.requires_grad_()
    expected = F.elbo_loss(logits, target, kl, beta=0.7)
    gradients = torch.autograd.grad(expected.loss, (logits, kl))
    values, own_gradients = F.elbo_value_and_grad(logits, target, kl, beta=0.7)
    assert_equal(values, tuple(v.detach() for v in expected))
    for own, gradient in zip(own_gradients, gradients, strict=True):
        own, gradient = own.double().cpu(), gradient.double().cpu()
        assert ((own - gradient).abs() <= ulp(gradient, dtype) + 7 * 2.0**-24 * gradient.abs()).all()


@pytest.mark.parametrize("kind", ["float", "int", "float32", "float64"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_grad_scale(triton_backend, device, dtype, kind) -> None:
    grad_scale = {
        "float": 1024.0,
        "int": 1024,
        "float32": torch.tensor(1024.0, device=device),
        "float64": torch.tensor(1024.0, dtype=torch.float64, device=device),
    }[kind]
    inputs = make_all((3, 7), device, dtype)
    check_value_and_grad(*inputs, grad_scale=grad_scale)
    check_value_and_grad(*make((3, 7), device, dtype), divergences(3, device, dtype), grad_scale=grad_scale)
    assert_equal(F.elbo_value_and_grad(*inputs, grad_scale=grad_scale)[0], F.elbo_value_and_grad(*inputs)[0])


@pytest.mark.parametrize("grad_scale", [None, 8.0])
def test_autograd_continues_from_the_gradients(triton_backend, device, grad_scale) -> None:
    """To the leaves, which get what loss.backward() gives them; the functions on the way are exact."""
    logits_leaf, target, kl_leaf = make_all((4, 9), device)
    scale = grad_scale or 1.0

    def gradients(backward: Callable[[Tensor, Tensor], None]) -> tuple[Tensor, Tensor]:
        leaves = logits_leaf.detach().requires_grad_(), kl_leaf.detach().requires_grad_()
        backward(2 * leaves[0], leaves[1] / 4)
        return leaves[0].grad, leaves[1].grad

    def explicit(logits: Tensor, kl: Tensor) -> None:
        _, given = F.elbo_value_and_grad(logits, target, kl, beta=0.7, grad_scale=grad_scale)
        torch.autograd.backward((logits, kl), given)

    def implicit(logits: Tensor, kl: Tensor) -> None:
        (scale * F.elbo_loss(logits, target, kl, beta=0.7).loss).backward()

    expected = Oracle(2 * logits_leaf, target, kl_leaf / 4, 0.7, 0.5, (scale, 0.0, 0.0))
    for run in (explicit, implicit):
        for gradient, i, factor in zip(gradients(run), (0, 2), (2, 0.25), strict=True):
            expected.check_gradient(i, gradient / factor, gradient)


def test_float16_gradients_at_loss_scale_65536(triton_backend, device) -> None:
    """Gradients of well-reconstructed pixels are below float16's smallest number if not scaled before rounding."""
    scale, batch = 65536.0, 128
    generator = torch.Generator().manual_seed(0)
    logits = (-6 + 2 * torch.randn(batch, 28, generator=generator)).to(device, torch.float16).requires_grad_()
    target, kl = torch.zeros_like(logits, dtype=torch.float32), divergences(batch, device)

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


# ------------------------------------------------------------------------------------------------------ anchor values


def test_a_grey_image_of_a_black_one_costs_98(triton_backend, device) -> None:
    """784 pixels, each half of a quarter: exact in float32."""
    logits = torch.zeros(3, 1, 28, 28, device=device)
    values = F.elbo_loss(logits, torch.zeros_like(logits), torch.zeros(3, device=device))
    assert values.reconstruction.item() == values.loss.item() == 0.5 * 0.25 * 784 == 98


def test_a_grey_and_a_black_image(triton_backend, device) -> None:
    """From the definition, for an output of 0.5 everywhere and for one of 0."""
    target = (255 * draw((4, 1, 28, 28))[1]).to(device, torch.uint8)
    kl, t = torch.zeros(4, device=device), target.double().cpu() / 255
    for logit, y in ((0.0, 0.5), (-1e4, 0.0), (-math.inf, 0.0)):
        value = F.elbo_loss(torch.full(t.shape, logit, device=device), target, kl).loss
        terms = 0.5 * (y - t).square().flatten(1).sum(1)
        assert_within(value, terms.mean(), 0.5 * (y + t).square().sum() / 4, TERM + MORE + levels(t.numel()))


def test_half_the_squared_error_of_28_by_28_is_392_times_the_mean(triton_backend, device) -> None:
    logits, target, kl = make_all((5, 1, 28, 28), device)
    y, t = torch.sigmoid(logits.double().cpu()), target.double().cpu()
    expected = 392 * torch.nn.functional.mse_loss(y, t)
    scale = 0.5 * condition(logits, target)[0].square().sum() / 5
    assert_within(F.elbo_loss(logits, target, kl).reconstruction, expected, scale, TERM + MORE + levels(logits.numel()))


# ---------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_error_is_at_most_twice_that_of_float32_torch(triton_backend, device, dtype) -> None:
    """The RMS error over 32 seeds, of the values and of the gradients of both operations."""

    def errors(backend: str, truncate: bool = False) -> list[float]:
        """loss, reconstruction, kl, and the gradients of logits and kl."""
        differences: list[list[Tensor]] = [[] for _ in range(7)]
        for seed in range(32):
            logits, target = (x.to(device, dtype) for x in draw((6, 30), seed))
            kl = divergences(6, device) * (1 + seed / 7)
            if truncate:
                logits, target = logits.float(), target.float()
            logits.requires_grad_(), kl.requires_grad_()
            with fastvae.use_backend(backend):
                values = F.elbo_loss(logits, target, kl, beta=0.7)
                gradients = torch.autograd.grad(values.loss, (logits, kl))
                gradients += F.elbo_value_and_grad(logits, target, kl, beta=0.7)[1]
            if truncate:
                gradients = [truncated(g) if i % 2 == 0 else g for i, g in enumerate(gradients)]
            expected = Oracle(logits, target, kl, 0.7, 0.5, (1.0, 0.0, 0.0))
            exact = (*expected.values, *[expected.gradients[0], expected.gradients[2]] * 2)
            for i, (a, e) in enumerate(zip((*values, *gradients), exact, strict=True)):
                differences[i].append((a.detach().double().cpu() - e).flatten())
        return [rms(torch.cat(d)) for d in differences]

    # On the interpreter bfloat16 is truncated, which alone has twice the error of rounding: so is the reference then.
    plain = errors("reference", truncate=dtype is torch.bfloat16 and INTERPRETED)
    for i, (own, allowed) in enumerate(zip(errors("triton"), plain, strict=True)):
        assert own <= 2 * allowed, f"result {i}: RMS error {own:.3g}, float32 torch has {allowed:.3g}"


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, which the interpreter computes with
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_extreme_values(triton_backend, device, dtype) -> None:
    """Each pair of an extreme logit and target alone: their sum would hide one behind another."""
    inf, nan = math.inf, math.nan
    kl = torch.ones(1, device=device)
    for logit, t in itertools.product((1e4, -1e4, inf, -inf, nan), (0.25, inf, nan)):
        logits = torch.tensor([[0.5, logit]], device=device, dtype=dtype).requires_grad_()
        target = torch.tensor([[0.5, t]], device=device).requires_grad_()
        values = F.elbo_loss(logits, target, kl)
        gradients = torch.autograd.grad(values.loss, (logits, target))
        expected = Oracle(logits, target, kl, 1.0, 0.5, (1.0, 0.0, 0.0))
        expected.check_values(values)
        for i, gradient in ((0, gradients[0]), (1, gradients[1]), (0, F.elbo_value_and_grad(logits, target, kl)[1][0])):
            expected.check_gradient(i, gradient, (logits, target)[i])


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_extreme_divergences(triton_backend, device, value) -> None:
    logits, target, _ = make_all((3, 5), device)
    values = F.elbo_loss(logits, target, torch.tensor([1.0, value, 2.0], device=device))
    assert_equal(
        tuple(v.nan_to_num(7.0) for v in values[::2]), (torch.tensor(value, device=device).nan_to_num(7.0),) * 2
    )
    assert values.reconstruction.isfinite()


def test_gradcheck_of_the_reference() -> None:
    logits, target, kl = (x.double().requires_grad_() for x in (*draw((3, 2, 2)), torch.rand(3)))

    def function(*inputs: Tensor) -> ELBO:
        return reference.elbo_loss(*inputs, beta=0.7, reconstruction_weight=0.3)

    assert torch.autograd.gradcheck(function, (logits, target, kl))
    assert torch.autograd.gradgradcheck(function, (logits, target, kl))
    gradients = torch.autograd.grad(function(logits, target, kl).loss * 8, (logits, kl))
    options = {"beta": 0.7, "reconstruction_weight": 0.3, "grad_scale": 8.0}
    for own, gradient in zip(reference.elbo_value_and_grad(logits, target, kl, **options)[1], gradients, strict=True):
        assert torch.allclose(own, gradient, rtol=1e-13, atol=0)


# ----------------------------------------------------------------------------------------------------------- reductions


@pytest.mark.parametrize("tile", [(1, 4), (1, 16), (1, 64), (2, 64), (4, 64)], ids=str)
def test_any_tile_gives_the_result(triton_backend, device, monkeypatch, tile) -> None:
    use_small_tiles(monkeypatch, *tile)
    check(*make_all((3, 13), device))
    check(*make_all((5, 11), device, layouts=("sliced_batch", "sliced_batch")))


@pytest.mark.parametrize("block", [1, 2, 8])
def test_partial_sums_and_kl_are_read_in_blocks(triton_backend, device, monkeypatch, block) -> None:
    def launch(kernel, plan, *arguments):
        if "BLOCK" in plan.constants:
            constants = plan.constants | {"BLOCK": block}
            plan = launching.make_plan(plan.programs, plan.num_warps, *plan.numbers, **constants)
        launching.launch(kernel, plan, *arguments)

    monkeypatch.setattr(kernels, "launch", launch)
    use_small_tiles(monkeypatch, 1, 8)
    check(*make_all((5, 7), device))


def run(logits: Tensor, target: Tensor, kl: Tensor) -> tuple[Tensor, ...]:
    inputs = [x.detach().requires_grad_() for x in (logits, target, kl)]
    values = F.elbo_loss(*inputs)
    gradients = torch.autograd.grad(values.loss, inputs)
    more_values, more_gradients = F.elbo_value_and_grad(*inputs)
    return *(v.detach() for v in values), *gradients, *more_values, *more_gradients


def test_repeats_bit_by_bit_and_leaves_the_ticket_at_zero(triton_backend, device, monkeypatch) -> None:
    use_small_tiles(monkeypatch, 1, 16)
    inputs = make_all((5, 11), device)
    assert_equal(run(*inputs), run(*inputs))
    assert launching._tickets
    assert all(ticket.item() == 0 for ticket in launching._tickets.values())


@pytest.mark.skipif(not INTERPRETED, reason="a kernel can be made to raise on the interpreter only")
def test_an_aborted_launch_does_not_poison_the_next(triton_backend, device, monkeypatch) -> None:
    use_small_tiles(monkeypatch, 1, 16)
    inputs = make_all((5, 11), device)
    expected = run(*inputs)
    with monkeypatch.context() as patch:
        fail_in_the_third_program(patch, elementwise)
        with pytest.raises(Exception, match="the third program fails"):
            run(*inputs)
    assert launching._tickets == {}
    assert_equal(run(*inputs), expected)


@pytest.mark.parametrize(
    ("layouts", "copied"),
    [
        (("contiguous", "contiguous"), 0),
        (("channels_last", "channels_last"), 0),
        (("sliced_batch", "sliced_batch"), 0),
        (("contiguous", "channels_last"), 1),
        (("sliced_inner", "contiguous"), 1),
        (("sliced_inner", "sliced_inner"), 2),
    ],
    ids=str,
)
def test_copies(triton_backend, device, layouts, copied) -> None:
    logits, target, kl = make_all((3, *EVENT_4D), device, layouts=layouts)
    logits.requires_grad_()
    kl = torch.stack([kl, kl], 1)[:, 0].requires_grad_()  # a strided kl is read as it lies
    with CopyCount() as count:
        loss = F.elbo_loss(logits, target, kl).loss
    assert count.copies == copied
    with CopyCount() as count:
        torch.autograd.grad(loss, (logits, kl), torch.ones_like(loss))
    assert count.copies == copied
    with CopyCount() as count:
        F.elbo_value_and_grad(logits, target, kl)
    assert count.copies == copied


# ------------------------------------------------------------------------------------------------------------- autograd


def test_backward_twice(triton_backend, device) -> None:
    inputs = [x.requires_grad_() for x in make_all((3, 20), device)]
    loss = F.elbo_loss(*inputs).loss
    assert_equal(torch.autograd.grad(loss, inputs, retain_graph=True), torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize("i", range(3))
def test_the_values_may_be_modified_in_place(triton_backend, device, i) -> None:
    inputs = [x.requires_grad_() for x in make_all((3, 20), device)]
    expected = torch.autograd.grad(F.elbo_loss(*inputs)[i], inputs, materialize_grads=True)
    values = F.elbo_loss(*inputs)
    others = [v.detach().clone() for v in values]
    value = values[i]
    value += 1
    assert_equal(torch.autograd.grad(value, inputs, materialize_grads=True), expected)
    others[i] += 1
    assert_equal(tuple(v.detach() for v in values), tuple(others))


def test_without_gradients_there_is_no_graph(triton_backend, device) -> None:
    inputs = make_all((2, 3), device)
    assert all(value.grad_fn is None for value in F.elbo_loss(*inputs))
    with torch.no_grad():
        assert all(value.grad_fn is None for value in F.elbo_loss(inputs[0].requires_grad_(), *inputs[1:]))


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_gradient_penalty(triton_backend, device, used) -> None:
    """Double backward: its RMS error over 32 seeds, a row each, is at most twice that of the reference in float32."""
    rows = [draw((1, 6), seed) for seed in range(32)]
    logits, target = (torch.cat(tensors) for tensors in zip(*rows, strict=True))
    kl = divergences(32, torch.device("cpu"))

    def penalty_gradients(
        function: Callable[..., ELBO], dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, ...]:
        inputs = tuple(x.detach().to(device, dtype).requires_grad_() for x in (logits, target, kl))
        values = function(*inputs, beta=0.7)
        weights = [torch.tensor(UPSTREAM[i], dtype=dtype, device=device, requires_grad=True) for i in used]
        first = torch.autograd.grad(
            [values[i] for i in used], inputs, weights, create_graph=True, materialize_grads=True
        )
        penalty = sum(g.square().sum() for g in first) + first[0].sum() + first[2].sum()
        second = torch.autograd.grad(penalty, (*inputs, *weights), materialize_grads=True)
        return *(g.detach() for g in first), *second

    exact = penalty_gradients(reference.elbo_loss, torch.float64, torch.device("cpu"))
    plain = penalty_gradients(reference.elbo_loss, torch.float32, device)
    fused = penalty_gradients(F.elbo_loss, torch.float32, device)
    for a, p, e in zip(fused, plain, exact, strict=True):
        assert a.shape == p.shape
        assert rms(a.cpu() - e) <= 2 * rms(p.cpu() - e)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_func_grad(triton_backend, device, dtype) -> None:
    logits, target, kl = make_all((4, 9), device, dtype)
    gradients = torch.func.grad(lambda *x: F.elbo_loss(*x, beta=0.7).loss, argnums=(0, 1, 2))(logits, target, kl)
    expected = Oracle(logits, target, kl, 0.7, 0.5, (1.0, 0.0, 0.0))
    # Plain PyTorch computes this gradient, with a factor 1 - y that cancels: its rounding counts as one of y.
    x = logits.double().cpu()
    scale = expected.gradient_scales[1] * torch.sigmoid(x) * (1 + x.abs())
    expected.gradient_scales = scale, *expected.gradient_scales[1:]
    for i, gradient in enumerate(gradients):
        expected.check_gradient(i, gradient, (logits, target, kl)[i])


def test_batched_gradients(triton_backend, device) -> None:
    inputs = [x.requires_grad_() for x in make_all((4, 9), device)]
    loss, upstream = F.elbo_loss(*inputs).loss, torch.tensor([1.0, -2.0], device=device)
    one_by_one = [torch.autograd.grad(loss, inputs, g, create_graph=True) for g in upstream]
    batched = torch.autograd.grad(loss, inputs, upstream, is_grads_batched=True)
    assert_equal(batched, tuple(torch.stack(gradients) for gradients in zip(*one_by_one, strict=True)))


def test_value_and_grad_is_not_transformed(device) -> None:
    logits, target, kl = make_all((2, 3), device)
    message = r"elbo_value_and_grad does not run under torch\.func transforms"
    with launching_nothing(), pytest.raises(NotImplementedError, match=message):
        torch.func.grad(lambda x: F.elbo_value_and_grad(x, target, kl)[0].loss)(logits)


def test_vmap_is_refused(device) -> None:
    logits, target = make((2, 3, 4), device)
    with launching_nothing(), pytest.raises(NotImplementedError, match=r"elbo_loss does not run under torch\.vmap"):
        torch.vmap(F.elbo_loss)(logits, target, torch.ones(2, 3, device=device))


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_dtypes_under_autocast(device, dtype, autocast, backend) -> None:
    """Arithmetic in float32 whatever arrives, float64 on the reference path: autocast changes nothing."""
    inputs = *make((3, 5), device, dtype), divergences(3, device, dtype)
    backend = "reference" if dtype is torch.float64 else backend
    with fastvae.use_backend(backend):
        expected = run(*inputs)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            results = run(*inputs)
    assert_equal(results, expected)
    value = torch.promote_types(dtype, torch.float32)
    assert [x.dtype for x in results] == [value] * 3 + [dtype] * 3 + [value] * 3 + [dtype] * 2


def test_module(triton_backend, device) -> None:
    inputs = make_all((3, 5), device)
    module = ELBOLoss(beta=2.0, reconstruction_weight=1.0)
    assert_equal(module(*inputs), F.elbo_loss(*inputs, beta=2.0, reconstruction_weight=1.0))
    module.beta = torch.tensor(0.25, device=device)  # a warm-up
    assert_equal(module(*inputs), F.elbo_loss(*inputs, beta=0.25, reconstruction_weight=1.0))
    assert_equal(ELBOLoss()(*inputs), F.elbo_loss(*inputs))
    assert repr(ELBOLoss()) == "ELBOLoss(SigmoidMSE(), beta=1.0, reconstruction_weight=0.5)"


# --------------------------------------------------------------------------------------------------------------- errors


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


COMMON_ERRORS = [
    ({"logits": None}, TypeError, "logits must be a torch.Tensor, got NoneType"),
    (
        {"logits": torch.zeros(2, 3, dtype=torch.uint8)},
        TypeError,
        "logits must be float16, bfloat16, float32 or float64, got torch.uint8",
    ),
    (
        {"logits": torch.zeros(2, 3).to_sparse()},
        TypeError,
        "logits must be a dense tensor, got layout torch.sparse_coo",
    ),
    ({"logits": torch.zeros(2)}, ValueError, "logits must have shape [B, ...] with at least 2 dimensions, got [2]"),
    ({"target": [0.0]}, TypeError, "target must be a torch.Tensor, got list"),
    ({"target": torch.zeros(2, 1)}, ValueError, "target must have the shape of logits, [2, 3], got [2, 1]"),
    (
        {"target": torch.zeros(2, 3, device="meta")},
        ValueError,
        "target must be on the device of logits, {device}, got meta",
    ),
    (
        {"target": torch.zeros(2, 3, dtype=torch.int32)},
        TypeError,
        "target must be uint8 (read as t / 255) or floating point, got torch.int32",
    ),
    ({"kl": 1.0}, TypeError, "kl must be a floating-point tensor, got float"),
    ({"kl": torch.ones(2, dtype=torch.int64)}, TypeError, "kl must be a floating-point tensor, got torch.int64"),
    (
        {"kl": torch.tensor(1.0)},
        ValueError,
        "kl must be the divergence of each sample, shape [2] (reduction='none'), got []",
    ),
    (
        {"kl": torch.ones(3)},
        ValueError,
        "kl must be the divergence of each sample, shape [2] (reduction='none'), got [3]",
    ),
    ({"kl": torch.ones(2, device="meta")}, ValueError, "kl must be on the device of logits, {device}, got meta"),
    *scalar_errors("beta"),
    *scalar_errors("reconstruction_weight"),
]


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("number", [np.float32(0.25), np.float64(0.25), np.int64(2), np.uint8(2), Fraction(1, 4)])
def test_numbers_that_are_not_pythons(device, backend, number) -> None:
    inputs = make_all((2, 3), device)
    with fastvae.use_backend(backend):
        for function, names in ((F.elbo_loss, 2), (F.elbo_value_and_grad, 3)):
            weights = dict.fromkeys(("beta", "reconstruction_weight", "grad_scale")[:names], number)
            expected = function(*inputs, **dict.fromkeys(weights, float(number)))
            assert_equal(flatten(function(*inputs, **weights)), flatten(expected))


def flatten(nested) -> tuple[Tensor, ...]:
    return tuple(pytree.tree_leaves(nested))


HALF_WEIGHTS = {  # (beta, reconstruction_weight, grad_scale)
    "a scale beyond half of the range": (1.0, 100.0, 60000.0),
    "no number of bits": (0.3, 0.7, 3.0),
}


@pytest.mark.parametrize("weights", HALF_WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_weights_of_half_precision_are_widened_once(device, backend, dtype, weights) -> None:
    """As their value in float32: products with them are not rounded to their dtype."""
    inputs = make_all((2, 3), device)
    half = [torch.tensor(w, dtype=dtype, device=device) for w in HALF_WEIGHTS[weights]]
    wide = [w.float() for w in half]
    names = ("beta", "reconstruction_weight", "grad_scale")
    with fastvae.use_backend(backend):
        for function, n in ((F.elbo_loss, 2), (F.elbo_value_and_grad, 3)):
            expected = flatten(function(*inputs, **dict(zip(names[:n], wide, strict=False))))
            actual = flatten(function(*inputs, **dict(zip(names[:n], half, strict=False))))
            assert all(value.isfinite().all() for value in expected)
            assert_equal(actual, expected)


@pytest.mark.parametrize(
    ("function", "changes", "error", "message"),
    [(function, *case) for function in (F.elbo_loss, F.elbo_value_and_grad) for case in COMMON_ERRORS]
    + [(F.elbo_value_and_grad, *case) for case in scalar_errors("grad_scale")],
)
def test_errors(device, function, changes, error, message) -> None:
    arguments = {"logits": torch.zeros(2, 3), "target": torch.zeros(2, 3), "kl": torch.ones(2), **changes}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and not value.is_meta:
            arguments[name] = value.detach().to(device).requires_grad_(value.requires_grad)
    tensors = [arguments.pop(name) for name in ("logits", "target", "kl")]
    with launching_nothing(), pytest.raises(error) as raised:
        function(*tensors, **arguments)
    assert str(raised.value) == message.format(device=device)


# ----------------------------------------------------------------------------------------------------------- everything


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(0, 5), min_size=2, max_size=5).map(tuple),
    layouts=st.tuples(st.sampled_from(list(LAYOUTS)), st.sampled_from(list(LAYOUTS))),
    dtype=st.sampled_from(FLOATS),
    target_dtype=st.sampled_from([*FLOATS, torch.uint8]),
    kl_dtype=st.sampled_from(FLOATS),
    upstream=st.tuples(*[st.sampled_from([None, 1.0, -0.5])] * 3).filter(any),
)
def test_any_input(triton_backend, device, shape, layouts, dtype, target_dtype, kl_dtype, upstream) -> None:
    inputs = make(shape, device, dtype, target_dtype, layouts)
    check(*inputs, divergences(shape[0], device, kl_dtype), upstream=upstream)
