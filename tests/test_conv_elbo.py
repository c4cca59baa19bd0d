"""conv_elbo_value_and_grad: the kernels against the reference in float64, within a bound that is derived from theirs.

`check` runs the operation and compares all that comes out of it; most tests only choose its inputs. A shape is (batch,
inputs, outputs, kernel, height, width).
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import conv2d, conv_transpose2d

import fastvae
import fastvae.functional as F
from bounds import assert_within
from fastvae.functional import ELBO
from fastvae.kernels import INTERPRETED
from fastvae.kernels import conv_elbo as kernels
from fastvae.kernels import launch as launching
from fastvae.kernels.tiles import power_of_2
from fastvae.reference import conv_elbo as reference
from test_elbo import GRADIENTS, MORE, Scalar, divergences, scalar_errors
from test_launches import Counted
from test_reconstruction import (
    FLOATS,
    GRADIENT,
    LAYOUTS,
    TERM,
    assert_equal,
    assert_strides_of,
    condition,
    in_float64,
    launching_nothing,
    levels,
    memory,
    poison,
    rms,
)

U = 2.0**-24
NAMES = (*ELBO._fields, "gradient of features", "gradient of weight", "gradient of bias", "gradient of kl")
Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]

# Of the last six the pixels lie at one distance from each other, but with gaps or overlaps.
ALL_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: layout for name, layout in LAYOUTS.items() if name != "transposed"},
    "swapped": lambda x: x.mT.contiguous().mT,
    "sliced_channels": lambda x: torch.cat([x, poison(x)], 1)[:, : x.shape[1]],
    "negated": lambda x: x if x.dtype is torch.uint8 else torch._neg_view(-x),
    "sliced_channels_last": lambda x: LAYOUTS["channels_last"](torch.cat([x, poison(x)], 1))[:, : x.shape[1]],
    "every_other_channel": lambda x: torch.stack([x, poison(x)], 2).flatten(1, 2)[:, ::2],
    "every_other_pixel": lambda x: torch.stack([x, poison(x)], -1).flatten(-2)[..., ::2],
    "channels_outermost": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded_channels": lambda x: x[:, :1].expand_as(x),
}


def make(
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype = torch.float32,
    target_dtype: torch.dtype = torch.float32,
    bias: bool = True,
    layouts: tuple[str, str] = ("contiguous", "contiguous"),
    seed: int = 0,
) -> Inputs:
    """Logits of a spread that saturates some sigmoids, and targets in [0, 1]."""
    batch, inputs, outputs, kernel, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, inputs, height, width, generator=generator).to(device, dtype)
    weight = torch.randn(inputs, outputs, kernel, kernel, generator=generator) * 3 / math.sqrt(inputs * kernel**2)
    biases = torch.randn(outputs, generator=generator).to(device, weight_dtype) if bias else None
    target = torch.rand(batch, outputs, height, width, generator=generator)
    target = ((255 * target).round() if target_dtype is torch.uint8 else target).to(device, target_dtype)
    images = ALL_LAYOUTS[layouts[0]](features), ALL_LAYOUTS[layouts[1]](target)
    return images[0], weight.to(device, weight_dtype), biases, images[1], divergences(batch, device)


def flat(result: tuple[ELBO, tuple[Tensor | None, ...]]) -> tuple[Tensor, ...]:
    """Values and gradients, without that of a missing bias."""
    return tuple(t for t in (*result[0], *result[1]) if t is not None)


def run(*inputs: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
    return flat(F.conv_elbo_value_and_grad(*inputs, **options))


# ------------------------------------------------------------------------------------------------------------ oracle


def oracle(
    inputs: Inputs, relu: bool = False, beta: Scalar = 1.0, reconstruction_weight: Scalar = 0.5, grad_scale: Scalar = 1
) -> list[tuple[Tensor, Tensor]]:
    """What float64 says, in the order of NAMES, each with the error it is allowed beside the rounding to its dtype.

    With u = 2^-24, y = sigmoid(x), e = y - t and s = y (1 - y), to first order in u as in bounds.py:
    A logit x is wrong by d = (KERNEL^2 + log2(CHANNELS) + 2) u conv(|hidden|, |weight|, |bias|), from the forward
    kernel's docstring. That changes e^2 by 2 |e| s d, and e s by at most (s + |e|) s d, as |1 - 2y| <= 1. Then e^2
    has TERM roundings and e s has GRADIENT, of the absolute terms that `condition` gives, and the 1 - y of the float64
    reference cancels, which allows e s another 2^-50 |e|. Values add MORE, and one per level of their sums.
    The logit's gradient, wrong by g, goes on through the sums that take |weight| or |hidden| times g. Their own
    roundings, from the backward kernel's docstring: OUTPUTS * KERNEL^2 for features, and one because the interpreter
    has no fused multiply-add; log2(PIXELS) + 1 for weight and bias, and one for each program that torch then adds.
    """
    features, weight, bias, target, kl = (None if t is None else in_float64(t) for t in inputs)
    beta, reconstruction_weight, grad_scale = float(beta), float(reconstruction_weight), float(grad_scale)
    result = reference.conv_elbo_value_and_grad(
        features, weight, bias, target, kl,
        relu=relu, beta=beta, reconstruction_weight=reconstruction_weight, grad_scale=grad_scale,
    )  # fmt: skip
    batch, channels, height, width = features.shape
    outputs, taps, padding, batch_size = weight.shape[1], weight.shape[2] ** 2, weight.shape[2] // 2, max(batch, 1)
    hidden = features.relu() if relu else features
    logits = conv_transpose2d(hidden, weight, bias, padding=padding)
    size = conv_transpose2d(hidden.abs(), weight.abs(), None if bias is None else bias.abs(), padding=padding)

    program_channels = max(4, power_of_2(channels))
    # An infinite logit is exact: there y is 0 or 1.
    d = (taps + math.log2(program_channels) + 2) * U * torch.where(size.isfinite(), size, 0.0)
    y, slope = torch.sigmoid(logits), torch.sigmoid(logits) * torch.sigmoid(-logits)
    error, (terms, slopes) = (y - target).abs(), condition(logits, target)
    own = (TERM + MORE + levels(logits.numel())) * U * terms.square()
    reconstruction = abs(reconstruction_weight) / batch_size * (own + 2 * error * slope * d).sum()
    mean_kl = (MORE + levels(batch)) * U * kl.abs().sum() / batch_size

    scale = 2 * abs(reconstruction_weight * grad_scale) / batch_size
    grad = scale * error * slope
    wrong = scale * (GRADIENT * U * terms * slopes + (slope + error) * slope * d + 2.0**-50 * error)
    pixels = kernels.pixels_of_program(program_channels, 1, most=128)
    of_a_sum = (math.log2(pixels) + 1 + batch * -(-height * width // pixels)) * U

    def to_weight(g: Tensor) -> Tensor:
        return torch.nn.grad.conv2d_weight(g, weight.shape, hidden.abs(), padding=padding)

    features_bound = conv2d(wrong + (outputs * taps + 1) * U * grad, weight.abs(), padding=padding)
    bounds = [
        reconstruction + abs(beta) * mean_kl,
        reconstruction,
        mean_kl,
        torch.where(features <= 0, 0.0, features_bound) if relu else features_bound,
        to_weight(wrong + of_a_sum * grad),
        *([] if bias is None else [(wrong + of_a_sum * grad).sum((0, 2, 3))]),
        torch.full_like(kl, GRADIENTS[2] * U * abs(beta * grad_scale) / batch_size),
    ]
    # No bound where the inputs are not finite: what is finite there is exact.
    return [(exact, bound.nan_to_num(0.0, 0.0)) for exact, bound in zip(flat(result), bounds, strict=True)]


def check(inputs: Inputs, relu: bool = False, **scalars: Scalar) -> tuple[Tensor, ...]:
    """Values, gradients, dtypes and strides; and that the inputs are as they were and nothing is attached to them."""
    before = [None if x is None else memory(x).clone() for x in inputs]
    values, gradients = F.conv_elbo_value_and_grad(*inputs, relu=relu, **scalars)
    results = flat((values, gradients))
    names = [name for name, t in zip(NAMES, (*values, *gradients), strict=True) if t is not None]
    for name, actual, (expected, bound) in zip(names, results, oracle(inputs, relu, **scalars), strict=True):
        assert_within(actual, expected, bound, 2.0**24, name)  # so many roundings of a scale are the scale
    assert isinstance(values, ELBO) and all(value.dtype is torch.float32 for value in values)
    for gradient, x in zip(gradients, (*inputs[:3], inputs[4]), strict=True):
        assert (gradient is None) == (x is None)
        assert x is None or (gradient.dtype is x.dtype and gradient.shape == x.shape)
    assert_strides_of(inputs[0], gradients[0])
    assert not any(x.requires_grad or x.grad_fn is not None for x in results), "attached to a graph"
    for x, bytes_before in zip(inputs, before, strict=True):
        assert x is None or torch.equal(memory(x), bytes_before), "an input was written"
    return results


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_the_reference_is_what_autograd_says(relu, bias, kernel) -> None:
    """Of conv_transpose2d, relu and elbo_loss in float64; they differ in the order of float64's sums."""
    inputs = make((3, 5, 2, kernel, 4, 7), torch.device("cpu"), bias=bias)
    features, weight, b, target, kl = (None if x is None else x.double() for x in inputs)
    features[:, :, 1], features[:, :, 2] = 0.0, -0.0
    leaves = [x.requires_grad_() for x in (features, weight, b, kl) if x is not None]
    logits = conv_transpose2d(features.relu() if relu else features, weight, b, padding=kernel // 2)
    scalars = {"beta": 0.7, "reconstruction_weight": 0.3}
    expected = F.elbo_loss(logits, target, kl, **scalars)
    gradients = torch.autograd.grad(8 * expected.loss, leaves)
    with fastvae.use_backend("reference"):
        actual = run(features, weight, b, target, kl, relu=relu, **scalars, grad_scale=8.0)
    torch.testing.assert_close(actual, (*expected, *gradients), rtol=1e-12, atol=1e-15)


# ------------------------------------------------------------------------------------------------ values and gradients


# A program of the backward kernel has 128 pixels up to 32 channels; of the forward kernel, 32 with 4 outputs.
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1, 1, 1), (2, 3, 1, 3, 1, 1), (1, 5, 2, 5, 1, 4), (2, 1, 4, 3, 6, 1), (1, 3, 3, 5, 2, 2)]
    + [(2, 5, 2, 1, 7, 5), (1, 33, 3, 3, 5, 7), (1, 256, 1, 1, 3, 3), (1, 32, 1, 3, 28, 28)]
    + [(1, 5, 1, 3, 1, width) for width in (127, 128, 129)]
    + [(2, 32, 4, 1, height, 1) for height in (31, 32, 33)],
    ids=str,
)
def test_sizes(triton_backend, device, shape) -> None:
    check(make(shape, device), relu=True)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_relu_and_bias(triton_backend, device, kernel, bias, relu) -> None:
    check(make((1, 3, 2, kernel, 4, 5), device, bias=bias), relu)


@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("weight_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dtypes(triton_backend, device, dtype, weight_dtype, target_dtype) -> None:
    *inputs, kl = make((1, 3, 2, 1, 3, 5), device, dtype, weight_dtype, target_dtype)
    check((*inputs, kl.to(dtype)), relu=True)


def test_a_bias_of_another_dtype(triton_backend, device) -> None:
    features, weight, *others = make((2, 3, 2, 1, 2, 3), device)
    check((features, weight.bfloat16(), *others))


@pytest.mark.parametrize("layout", ["sliced", "expanded"])
def test_strides_of_the_parameters(triton_backend, device, layout) -> None:
    features, weight, bias, *others = make((1, 3, 2, 3, 2, 3), device)
    bias = torch.stack([bias, poison(bias)], 1)[:, 0] if layout == "sliced" else bias[:1].expand(2)
    check((features, torch._neg_view(-weight).mT, bias, *others))


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_layouts_of_features(triton_backend, device, layout) -> None:
    check(make((2, 3, 2, 3, 3, 4), device, layouts=(layout, "contiguous")), relu=True)
    # Dimensions of size one have strides that mean nothing.
    check(make((2, 3, 1, 1, 1, 4), device, torch.bfloat16, layouts=(layout, layout)))
    check(make((1, 1, 1, 1, 3, 1), device, torch.bfloat16, layouts=(layout, layout)))


@pytest.mark.parametrize("layout", [name for name in ALL_LAYOUTS if name != "contiguous"])
def test_layouts_of_target(triton_backend, device, layout) -> None:
    target_dtype = torch.float32 if layout == "negated" else torch.uint8
    check(make((2, 3, 3, 1, 3, 4), device, target_dtype=target_dtype, layouts=("channels_last", layout)))


@pytest.mark.skipif(not INTERPRETED, reason="needs memory that is there only where it is touched")
def test_channels_of_target_that_are_far_from_each_other(triton_backend, device) -> None:
    """As in images that are stored plane by plane: the third begins where 32 bits end."""
    *others, target, kl = make((1, 3, 3, 1, 2, 2), device, target_dtype=torch.uint8)
    sparse = torch.frombuffer(mmap.mmap(-1, 2**31 + 4), dtype=torch.uint8)
    far = sparse.as_strided(target.shape, (4, 2**30, 2, 1)).copy_(target)
    assert_equal(run(*others, far, kl), run(*others, target, kl))


@pytest.mark.parametrize("layout", ["expanded", "sliced", "negative"])
def test_kl(triton_backend, device, layout) -> None:
    *inputs, kl = make((3, 2, 1, 1, 2, 2), device)
    if layout == "expanded":
        kl = kl[1:2].expand(3)
    elif layout == "sliced":
        kl = torch.stack([kl, poison(kl)], 1)[:, 0]
    else:  # its minus is not in memory yet
        kl = torch.complex(poison(kl), -kl).conj().imag
        assert kl.is_neg() and kl.stride() == (2,)
    assert check((*inputs, kl))[-1].is_contiguous()


@pytest.mark.parametrize("name", ["beta", "reconstruction_weight", "grad_scale"])
def test_scalars(triton_backend, device, name) -> None:
    inputs = make((2, 3, 1, 1, 2, 3), device)
    for value in (-1.5, 3, *(torch.tensor(0.1, dtype=dtype, device=device) for dtype in (torch.half, torch.double))):
        check(inputs, **{name: value})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_error_is_at_most_twice_that_of_float32_torch(triton_backend, device, dtype) -> None:
    """The RMS error over 32 seeds."""
    own, plain = [], []
    for seed in range(32):
        inputs = make((1, 4, 1, 1, 3, 5), device, dtype, seed=seed)
        exact = oracle(inputs, relu=True)
        for backend, errors in (("triton", own), ("reference", plain)):
            with fastvae.use_backend(backend):
                results = run(*inputs, relu=True)
            errors.append([(a.double().cpu() - e).flatten() for a, (e, _) in zip(results, exact, strict=True)])
    for i, name in enumerate(NAMES):
        assert rms(torch.cat([e[i] for e in own])) <= 2 * rms(torch.cat([e[i] for e in plain])), name


# ------------------------------------------------------------------------------------------------------ extreme values


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_logits_of_10000_saturate(triton_backend, device, dtype) -> None:
    features, weight, _, *others = make((2, 4, 1, 1, 1, 2), device, dtype, bias=False)
    features = torch.tensor([1e4, -1e4], device=device, dtype=dtype).expand_as(features).clone()
    assert all(result.isfinite().all() for result in check((features, torch.full_like(weight, 0.25), None, *others)))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, which the interpreter computes with
@pytest.mark.parametrize("place", [(0, 0), (2, 0), (1, 5), (3, 5)], ids=str)
def test_nan_stays_in_its_neighbourhood(triton_backend, device, place) -> None:
    """Also where the neighbour in memory is in another line or another image."""
    inputs = make((2, 2, 1, 3, 4, 6), device)
    inputs[0][(place[0] % 2, 1, *place)] = math.nan
    y, x = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    reached = torch.zeros(2, 2, 4, 6, dtype=torch.bool)
    reached[place[0] % 2] = ((y - place[0]).abs() <= 2) & ((x - place[1]).abs() <= 2)
    assert torch.equal(check(inputs)[3].isnan().cpu(), reached)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_where_the_reference_has_it(triton_backend, device, value) -> None:
    for relu, place in ((False, (1, 0)), (True, (2, 4))):
        inputs = make((1, 2, 1, 3, 3, 5), device)
        inputs[0][(0, 1, *place)] = value
        check(inputs, relu)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_relu_passes_no_gradient_at_zero(triton_backend, device, dtype) -> None:
    """As torch's: neither at 0 nor at -0."""
    features, *others = make((1, 2, 1, 1, 1, 6), device, dtype)
    tiny = torch.finfo(dtype).tiny
    features[:] = torch.tensor([0.0, -0.0, tiny, -tiny, 1.0, -1.0])
    gradient = check((features, *others), relu=True, grad_scale=1024.0)[3]
    assert torch.equal(gradient != 0, features > 0)


def test_float16_gradients_at_loss_scale_65536(triton_backend, device) -> None:
    """Gradients of well-reconstructed pixels are below float16's smallest number if not scaled before rounding."""
    features, weight, bias, target, kl = make((2, 4, 1, 1, 4, 4), device, torch.float16, torch.float16)
    inputs = features, weight / 16, torch.full_like(bias, -11.0), torch.zeros_like(target), kl
    unscaled, scaled = (check(inputs, grad_scale=scale) for scale in (1.0, 65536.0))
    for i in (3, 4, 5):
        assert (unscaled[i] == 0).double().mean() > 0.9 and (scaled[i] != 0).all() and scaled[i].isfinite().all()


# --------------------------------------------------------------------------------------------- launches and repetition


def test_two_launches_and_a_sum(triton_backend, device) -> None:
    inputs = make((2, 3, 1, 1, 12, 12), device, layouts=("channels_last", "contiguous"))
    launching.ticket(device)  # made once per device and stream
    with Counted(triton_backend) as counted:
        run(*inputs, relu=True)
    assert dict(counted.operations) == {"triton": 2, "sum": 1}


def test_repeats_bit_by_bit_and_leaves_the_ticket_at_zero(triton_backend, device) -> None:
    inputs = make((2, 3, 2, 3, 5, 30), device)  # more than one program per image
    assert_equal(run(*inputs), run(*inputs))
    assert launching._tickets and all(ticket.item() == 0 for ticket in launching._tickets.values())


@pytest.mark.parametrize("bias", [True, False])
def test_an_empty_batch(device, bias) -> None:
    with launching_nothing():
        results = check(make((0, 3, 2, 3, 4, 5), device, torch.bfloat16, bias=bias), relu=True)
    assert all(value.isnan() for value in results[:3]) and not any(gradient.any() for gradient in results[3:])


# ------------------------------------------------------------------------------------------------------------ autograd


def test_autograd_continues_from_the_gradients(triton_backend, device) -> None:
    """To the leaves behind features and kl and into .grad of the parameters, twice. Every factor is a power of two,
    and so exact.
    """
    features, weight, bias, target, kl = make((2, 3, 2, 3, 4, 4), device)
    leaves = [x.requires_grad_() for x in (features, weight, bias, kl)]

    def step(grad_scale: float | None) -> tuple[Tensor, ...]:
        inputs = 2 * features, weight, bias, kl / 4
        options = {"relu": True, "beta": 0.5, "grad_scale": grad_scale}
        _, gradients = F.conv_elbo_value_and_grad(*inputs[:3], target, inputs[3], **options)
        torch.autograd.backward(inputs, gradients)
        return tuple(factor * g for factor, g in zip((2, 1, 1, 0.25), gradients, strict=True))

    once = step(None)
    assert_equal(tuple(x.grad for x in leaves), once)
    scaled = step(4.0)
    assert_equal(scaled, tuple(4 * g for g in once))
    assert_equal(tuple(x.grad for x in leaves), tuple(a + b for a, b in zip(once, scaled, strict=True)))


def test_parameters_and_autocast_change_nothing(triton_backend, device) -> None:
    inputs = make((2, 3, 2, 1, 2, 3), device)
    with torch.autocast(device.type, torch.bfloat16):
        results = run(*map(torch.nn.Parameter, inputs[:3]), *inputs[3:])
    assert_equal(results, run(*inputs))
    assert not any(x.requires_grad for x in results)


def test_transforms_are_refused(device) -> None:
    features, *others = make((2, 3, 1, 1, 2, 2), device)
    message = r"conv_elbo_value_and_grad does not run under torch\.func transforms"
    with launching_nothing(), pytest.raises(NotImplementedError, match=message):
        torch.func.grad(lambda x: run(x, *others)[0])(features)


@pytest.mark.parametrize("i", range(5))
def test_a_float64_is_computed_by_the_reference(device, i) -> None:
    inputs = [x.double() if i == j else x for j, x in enumerate(make((2, 3, 1, 1, 2, 2), device))]
    with launching_nothing(), pytest.raises(RuntimeError, match="float64"):
        run(*inputs)
    with fastvae.use_backend("auto"):
        assert [g.dtype for g in run(*inputs)[3:]] == [inputs[j].dtype for j in (0, 1, 2, 4)]


# -------------------------------------------------------------------------------------------------------------- errors


SHAPES = {"features": (2, 3, 2, 2), "weight": (3, 1, 3, 3), "bias": (1,), "target": (2, 1, 2, 2), "kl": (2,)}
SHAPE_ERRORS = {
    "features must have shape [B, ...] with at least 2 dimensions": [[2]],
    "features must have shape [B, C, H, W] with C from 1 to 256 and H and W at least 1": [
        [2, 3], [2, 3, 2, 2, 2], [2, 0, 2, 2], [2, 257, 2, 2], [2, 3, 0, 2], [2, 3, 2, 0],
    ],
    "weight must have shape [3, O, k, k] with O from 1 to 4 and k odd, at most 5": [
        [3, 1], [1, 3, 3, 3], [3, 0, 3, 3], [3, 5, 3, 3], [3, 1, 0, 0], [3, 1, 2, 2], [3, 1, 7, 7], [3, 1, 3, 1],
    ],
    "bias must have shape [1]": [[], [2], [1, 1]],
    "target must have shape [2, 1, 2, 2]": [[2, 2, 2], [1, 1, 2, 2], [2, 3, 2, 2], [2, 1, 2, 3]],
    "kl must be the divergence of each sample, shape [2] (reduction='none')": [[], [3], [2, 1]],
}  # fmt: skip
TYPES = {
    "features": ("a torch.Tensor", "float16, bfloat16, float32 or float64"),
    "target": ("a torch.Tensor", "uint8 (read as t / 255) or floating point"),
    **{name: ("a floating-point tensor",) * 2 for name in ("weight", "bias", "kl")},
}
ERRORS: list[tuple[str, Any, type[Exception], str]] = [
    *[(message.split()[0], torch.ones(shape), ValueError, f"{message}, got {shape}")
      for message, shapes in SHAPE_ERRORS.items() for shape in shapes],
    *[(name, [0.0], TypeError, f"{name} must be {wanted}, got list") for name, (wanted, _) in TYPES.items()],
    *[(name, torch.ones(SHAPES[name]).int(), TypeError, f"{name} must be {wanted}, got torch.int32")
      for name, (_, wanted) in TYPES.items()],
    *[(name, torch.ones(shape).to_sparse(), TypeError, f"{name} must be a dense tensor, got layout torch.sparse_coo")
      for name, shape in SHAPES.items()],
    *[(name, torch.ones(shape, device="meta"), ValueError,
       f"{name} must be on the device of features, {{device}}, got meta")
      for name, shape in SHAPES.items() if name != "features"],
    *[(name, value, error, message.replace("logits", "features"))
      for name in ("beta", "reconstruction_weight", "grad_scale")
      for changes, error, message in scalar_errors(name) for value in changes.values()],
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "error", "message"), ERRORS)
def test_errors(device, name, value, error, message) -> None:
    arguments: dict[str, Any] = dict(zip(SHAPES, make((2, 3, 1, 3, 2, 2), device), strict=True))
    if isinstance(value, Tensor) and not value.is_meta:
        value = value.detach().to(device).requires_grad_(value.requires_grad)
    with launching_nothing(), pytest.raises(error) as raised:
        F.conv_elbo_value_and_grad(**{**arguments, name: value})
    assert str(raised.value) == message.format(device=device)


# ------------------------------------------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_it_compiles_whole_and_is_the_same(device, backend, bias) -> None:
    torch._dynamo.reset()
    inputs = make((2, 3, 1, 1, 3, 4), device, bias=bias, layouts=("channels_last", "contiguous"))
    arguments = *(None if x is None else x.requires_grad_() for x in inputs[:3]), *inputs[3:]

    def function(*arguments: Tensor | None) -> tuple[Tensor, ...]:
        return run(*arguments, relu=True, beta=0.3, grad_scale=8.0)

    with fastvae.use_backend(backend):
        actual = torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments)
        expected = function(*arguments)
    assert_equal(actual, expected)
    assert [x.stride() for x in actual] == [x.stride() for x in expected]


@pytest.mark.parametrize(("bias", "layout"), [(True, "channels_last"), (False, "swapped")])
def test_opcheck(triton_backend, device, bias, layout) -> None:
    import fastvae.autograd.conv_elbo  # noqa: F401 - registers

    inputs = make((2, 3, 1, 1, 3, 4), device, torch.bfloat16, bias=bias, layouts=(layout, "contiguous"))
    one = torch.ones((), device=device)
    arguments = (*inputs, True, one, one, None if bias else one)
    torch.library.opcheck(torch.ops.fastvae.conv_elbo_value_and_grad.default, arguments)


# ---------------------------------------------------------------------------------------------------------- everything


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(*[st.integers(*limits) for limits in ((0, 2), (1, 6), (1, 4), (0, 1), (1, 6), (1, 6))]),
    layouts=st.tuples(*[st.sampled_from(list(ALL_LAYOUTS))] * 2),
    dtypes=st.tuples(*[st.sampled_from(FLOATS)] * 3),
    relu=st.booleans(),
    bias=st.booleans(),
)
def test_any_input(triton_backend, device, shape, layouts, dtypes, relu, bias) -> None:
    batch, inputs, outputs, half, *size = shape
    shape = (batch, inputs, outputs, 2 * half + 1, *size)
    check(make(shape, device, *dtypes, bias=bias, layouts=layouts), relu, beta=0.7, reconstruction_weight=0.3)
