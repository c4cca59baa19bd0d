"""The Gaussian posterior: fused operations against their specification, in values, gradients, layouts and refusals."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastvae
import fastvae.functional as F
from bounds import assert_within
from conftest import Launches, plan_anew
from fastvae import nn, reference
from fastvae.kernels import INTERPRETED, gaussian, posterior
from fastvae.kernels import launch as launching
from fastvae.kernels.tiles import Tiling, sum_blocks, sum_groups_in_order
from fastvae.reference.precision import reduce_event

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("none", "batchmean", "sum", "mean")
OPERATIONS = ("gaussian_sample", "gaussian_kl", "gaussian_sample_kl", "gaussian_sample_kl_packed")
INPUTS = ("mu", "logvar", "eps", "z_grad", "kl_grad")


class Problem(NamedTuple):
    """What an operation is given, and the upstream gradients of z and kl (None: that output was not used)."""

    mu: Tensor
    logvar: Tensor
    eps: Tensor | None
    z_grad: Tensor | None
    kl_grad: Tensor | None

    @classmethod
    def like(cls, mu: Tensor, logvar: Tensor, reduction: str = "none") -> Problem:
        """The rest at random: eps and the gradient of kl in float32, that of z in mu's dtype."""
        eps = torch.randn(mu.shape).to(mu.device)
        z_grad = torch.randn(mu.shape).to(mu)
        kl_grad = torch.randn([mu.shape[0]] if reduction == "none" else []).to(mu.device)
        return cls(mu, logvar, eps, z_grad, kl_grad)

    @classmethod
    def random(cls, shape, device, dtype=torch.float32, reduction: str = "none") -> Problem:
        return cls.like(*torch.randn(2, *shape).to(device, dtype), reduction)

    def of(self, operation: str) -> Problem:
        """Without the upstream gradient of what `operation` does not return."""
        missing = {"gaussian_sample": {"kl_grad": None}, "gaussian_kl": {"z_grad": None}}
        return self._replace(**missing.get(operation, {}))


def apply(operation: str, mu: Tensor, logvar: Tensor, reduction: str = "none", **noise) -> tuple[Tensor | None, ...]:
    """(z, kl) of a public operation, None for what it does not return."""
    if operation == "gaussian_sample":
        return F.gaussian_sample(mu, logvar, **noise), None
    if operation == "gaussian_kl":
        return None, F.gaussian_kl(mu, logvar, reduction=reduction)
    if operation == "gaussian_sample_kl":
        return F.gaussian_sample_kl(mu, logvar, reduction=reduction, **noise)
    return F.gaussian_sample_kl_packed(torch.cat((mu, logvar), -1), dim=-1, reduction=reduction, **noise)


def differentiate(problem: Problem, outputs, inputs, **options) -> tuple[Tensor, ...]:
    """The gradients of the outputs that exist and were used."""
    pairs = zip(outputs, (problem.z_grad, problem.kl_grad), strict=True)
    used = [(output, grad) for output, grad in pairs if output is not None and grad is not None]
    outputs, upstream = zip(*used, strict=True)
    return torch.autograd.grad(outputs, inputs, upstream, **options)


def fused(
    problem: Problem, reduction: str = "none", operation: str = "gaussian_sample_kl", **noise
) -> dict[str, Tensor]:
    """The outputs of an operation and its gradients, by name."""
    mu, logvar = problem.mu.detach().requires_grad_(), problem.logvar.detach().requires_grad_()
    z, kl = apply(operation, mu, logvar, reduction, **(noise or {"eps": problem.eps}))
    mu_grad, logvar_grad = differentiate(problem, (z, kl), (mu, logvar))
    results = {"z": z, "kl": kl, "mu_grad": mu_grad, "logvar_grad": logvar_grad}
    return {name: value.detach() for name, value in results.items() if value is not None}


class Exact(NamedTuple):
    value: Tensor
    scale: Tensor
    roundings: int


def exact(problem: Problem, reduction: str = "none") -> dict[str, Exact]:
    """Outputs and gradients of the reference in float64, their scales, and the roundings that the kernels' docstrings
    count.

    The scale is the sum of the absolute terms of what is computed; an exponential counts 1 + |argument| times.
    """
    problem = Problem(*(None if t is None else t.detach().double().cpu() for t in problem))
    x, eps = problem.logvar.clone(), torch.zeros_like(problem.mu) if problem.eps is None else problem.eps
    inputs = problem.mu.requires_grad_(), problem.logvar.requires_grad_()
    z, kl = reference.gaussian.gaussian_sample_kl(*inputs, eps=eps, reduction=reduction)
    mu_grad, logvar_grad = differentiate(problem, (z, kl), inputs, materialize_grads=True)
    mu, z, kl = problem.mu.detach(), z.detach(), kl.detach()

    # Beyond 1e3 an exponential is 0 or infinite in every dtype, and 0 times an infinite condition would be NaN.
    condition = x.abs().clamp(max=1e3)
    std = torch.exp(x / 2) * (1 + condition / 2)
    exponential = torch.exp(x) * (1 + condition)
    # The kernels' series below 1/2 does not cancel; the differences beyond it do.
    series, small = torch.expm1(x) - x, x.abs() < 0.5
    divergence = 0.5 * (mu.square() + torch.where(small, series, exponential + 1 + x.abs()))
    slope = torch.where(small, x.abs() + series, exponential + 1)

    mu_scale, logvar_scale = torch.zeros_like(mu), torch.zeros_like(mu)
    if problem.z_grad is not None:
        mu_scale += problem.z_grad.abs()
        logvar_scale += 0.5 * problem.z_grad.abs() * std * eps.abs()
    if problem.kl_grad is not None:
        # What one term of kl weighs in the loss.
        terms = torch.ones_like(mu, requires_grad=True)
        (weight,) = torch.autograd.grad(reduce_event(terms, reduction), terms, problem.kl_grad)
        mu_scale += (weight * mu).abs()
        logvar_scale += 0.5 * weight.abs() * slope
    summed = max(1, mu.numel() // (mu.shape[0] if reduction == "none" else 1))
    return {
        "z": Exact(z, mu.abs() + std * eps.abs(), 6),
        "kl": Exact(kl, reduce_event(divergence, reduction), 10 + math.ceil(math.log2(summed)) + 3),
        # One more for the upstream factor.
        "mu_grad": Exact(mu_grad, mu_scale, 3 + 1),
        "logvar_grad": Exact(logvar_grad, logvar_scale, 10),
    }


def check(actual: dict[str, Tensor], expected: dict[str, Exact]) -> None:
    for name, value in actual.items():
        assert_within(value, *expected[name], name)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal strides and bytes, NaN included."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.stride() == b.stride() and torch.equal(a.detach().view(integer), b.detach().view(integer))


class Copies(TorchDispatchMode):
    """Counts the operations that read one tensor to write another of the same values."""

    NAMES = ("aten::copy_", "aten::clone", "aten::cat", "aten::_to_copy")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.name() in self.NAMES or function.name().startswith("aten::copy_.")
        return function(*args, **(kwargs or {}))


@pytest.fixture
def no_launch(monkeypatch) -> Iterator[None]:
    """The fused path, on which nothing may be launched."""

    def launch(*arguments):
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(posterior, "launch", launch)
    before = Launches.count
    with fastvae.use_backend("triton"):
        yield
    assert Launches.count == before


# --- values and gradients ---------------------------------------------------------------------------------------------

# Tiles hold 1024 float32 or 2048 half-precision elements, or 4096 of a row a little longer than that.
SHAPES = {
    "one element": (1, 1),
    "one column": (300, 1),  # 256 rows or 512 per program
    "one row": (1, 3),
    "two rows": (2, 4),
    "odd": (5, 7),
    "many rows": (133, 13),  # 64 or 128 rows per program
    "one tile -1": (2, 1023),
    "one tile": (2, 1024),
    "one tile +1": (2, 1025),
    "one half tile -1": (2, 2047),
    "one half tile": (2, 2048),
    "one half tile +1": (2, 2049),
    "large tile -1": (1, 4095),
    "large tile": (2, 4096),
    "large tile +1": (2, 4097),  # the first with several chunks per row
    "several chunks": (2, 5003),
    "rank 3": (2, 3, 9),
    "rank 4": (3, 2, 5, 3),
    "rank 5": (2, 3, 2, 2, 4),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_values_and_gradients(shape, dtype, device, triton_backend) -> None:
    problem = Problem.random(shape, device, dtype)
    actual = fused(problem)
    assert {name: value.dtype for name, value in actual.items()} == {
        "z": dtype,
        "kl": torch.float32,
        "mu_grad": dtype,
        "logvar_grad": dtype,
    }
    check(actual, exact(problem))


@pytest.mark.parametrize(
    ("operation", "reduction"),
    [("gaussian_sample", "none")]
    + [(operation, reduction) for operation in OPERATIONS[1:] for reduction in REDUCTIONS],
)
def test_operations_and_reductions(operation, reduction, device, triton_backend) -> None:
    # As one row this is five programs, and three of a row each where every row has its own sum.
    problem = Problem.random((3, 1400), device, reduction=reduction).of(operation)
    before = Launches.count
    actual = fused(problem, reduction, operation)
    assert Launches.count == before + 2, "one launch forward and one backward"
    check(actual, exact(problem, reduction))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS[:3])
def test_rms_error_is_at_most_twice_the_references(operation, dtype, device, triton_backend, monkeypatch) -> None:
    """Over 32 seeds, one in each row, for each output; the reference computes in float32 and rounds once."""
    if INTERPRETED:  # one program for all, because the interpreter pays for programs
        plan_anew(monkeypatch)
        monkeypatch.setattr(posterior, "cut", lambda rows, columns, itemsize: Tiling(rows, columns, rows, columns, 4))
    problems = []
    for seed in range(32):
        torch.manual_seed(seed)
        problems.append(Problem.random((1, 1024), device, dtype))
    problem = Problem(*(torch.cat(tensors) for tensors in zip(*problems, strict=True)))
    expected = exact(problem.of(operation))
    with fastvae.use_backend("reference"):
        peers = fused(Problem(*(tensor.float() for tensor in problem)), operation=operation)

    def rms(value: Tensor, name: str) -> float:
        return (value.cpu().double() - expected[name].value).square().mean().sqrt().item()

    for name, value in fused(problem, operation=operation).items():
        peer = peers[name].to(value.dtype)
        if INTERPRETED and value.dtype is torch.bfloat16:
            # Triton's interpreter cuts float32 to bfloat16 where a GPU rounds: there the reference is cut too.
            peer = (peers[name].view(torch.int32) & -65536).view(torch.float32)
        error, allowed = rms(value, name), 2 * rms(peer, name)
        assert error <= allowed, f"{name}: {error:.3g}, twice the reference {allowed:.3g}"


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 2, 3), (2, 3, 0)], ids=str)
def test_nothing_is_launched_for_no_elements(shape, reduction, device, no_launch) -> None:
    """Sums are 0 and means NaN, as in torch; gradients are empty."""
    problem = Problem.random(shape, device, reduction=reduction)
    actual = fused(problem, reduction)
    with fastvae.use_backend("reference"):
        expected = fused(problem, reduction)
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, equal_nan=True)
    packed = torch.cat((problem.mu, problem.logvar), 1)
    z, kl = F.gaussian_sample_kl_packed(packed, eps=torch.cat((problem.eps,), 1), reduction=reduction)
    assert z.shape == problem.mu.shape
    torch.testing.assert_close(kl, expected["kl"], rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize("unused", [None, "z_grad", "kl_grad"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_and_non_finite_values(dtype, unused, device, triton_backend) -> None:
    """Every pair of them is one row of one element, so that each has its own kl.

    What was not used adds nothing to a gradient, where a zero times infinity would be NaN.
    """
    infinity, nan = math.inf, math.nan
    logvars = torch.tensor([0.0, -0.0, 0.5, -0.5, 80, -80, 1e4, -1e4, infinity, -infinity, nan])
    mus = torch.tensor([0.0, -1.5, 1e30, -1e30, infinity, -infinity, nan])
    pairs = torch.cartesian_prod(mus, logvars).to(device, dtype)
    problem = Problem.like(pairs[:, :1].contiguous(), pairs[:, 1:].contiguous())
    problem = problem if unused is None else problem._replace(**{unused: None})
    check(fused(problem), exact(problem))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_logvar_keeps_its_divergence(dtype, device, triton_backend) -> None:
    """The textbook formula returns 0 here in half precision, and loses everything in float32."""
    logvar = torch.tensor([[1e-2], [1e-3], [1e-4], [1e-6]], device=device).to(dtype)
    logvar = torch.cat((logvar, -logvar)).requires_grad_()
    kl = F.gaussian_kl(torch.zeros_like(logvar), logvar, reduction="none")
    x = logvar.detach().double().cpu().squeeze(1)
    expected = x**2 / 4 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5)))  # (e^x - 1 - x) / 2 without a difference
    assert ((kl.detach().double().cpu() - expected) / expected).abs().max() < 1e-6
    if dtype is torch.float32:
        (gradient,) = torch.autograd.grad(kl.sum(), logvar)
        expected = x / 2 * (1 + x / 2 * (1 + x / 3 * (1 + x / 4)))
        assert ((gradient.double().cpu().squeeze(1) - expected) / expected).abs().max() < 1e-6


# --- layouts ----------------------------------------------------------------------------------------------------------

# Read as they come: each sample is dense.
DENSE = {
    "contiguous": lambda randn: (randn(3, 4, 2, 5), randn(3, 4, 2, 5)),
    "channels_last": lambda randn: tuple(randn(2, 3, 4, 2, 5).permute(0, 1, 4, 2, 3)),
    "channels_last_3d": lambda randn: tuple(randn(2, 2, 2, 3, 2, 3).permute(0, 1, 5, 2, 3, 4)),
    "another order": lambda randn: tuple(randn(2, 3, 4, 2, 5).permute(0, 1, 3, 4, 2)),
    "every second sample": lambda randn: (randn(6, 7)[::2], randn(6, 7)[::2]),
    "columns of a matrix": lambda randn: (randn(3, 9)[:, 1:8], randn(3, 9)[:, 2:]),
    "halves": lambda randn: randn(3, 14).chunk(2, 1),
    "halves of many samples": lambda randn: randn(70, 40).chunk(2, 1),  # three programs
    "halves of the channels": lambda randn: randn(3, 8, 2, 2).chunk(2, 1),
    "one sample for all": lambda randn: (randn(1, 7).expand(3, 7), randn(1, 7).expand(3, 7)),
    "dimensions of size 1": lambda randn: (randn(3, 1, 5, 1), randn(3, 5, 1, 1).transpose(1, 2)),
}
# Copied once.
EXOTIC = {
    "every second column": lambda randn: (randn(3, 14)[:, ::2], randn(3, 14)[:, 1::2]),
    "transposed": lambda randn: (randn(7, 3).t(), randn(7, 3).t()),
    "batch in the middle": lambda randn: tuple(randn(2, 4, 3, 5).transpose(1, 2)),
    "halves of the last dimension": lambda randn: randn(3, 2, 10).chunk(2, 2),
    "halves of channels_last": lambda randn: randn(2, 3, 2, 8).permute(0, 3, 1, 2).chunk(2, 1),
    "one element for all": lambda randn: (randn(3, 1).expand(3, 7), randn(3, 1).expand(3, 7)),
}
MIXED = {
    "contiguous and channels_last": lambda randn: (randn(3, 4, 2, 5), randn(3, 2, 5, 4).permute(0, 3, 1, 2)),
    "channels_last and contiguous": lambda randn: (randn(3, 2, 5, 4).permute(0, 3, 1, 2), randn(3, 4, 2, 5)),
    "half and whole": lambda randn: (randn(3, 14)[:, 7:], randn(3, 7)),
    "whole and transposed": lambda randn: (randn(3, 7), randn(7, 3).t()),
    "transposed and expanded": lambda randn: (randn(7, 3).t(), randn(3, 1).expand(3, 7)),
}
LAYOUTS = DENSE | EXOTIC | MIXED


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their memory, each exactly once: what torch's own results lie like."""
    return lies_like(torch.empty_like(tensor), tensor)


def lies_like(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same strides, where they matter."""
    return all(s == t for s, t, length in zip(a.stride(), b.stride(), b.shape, strict=True) if length != 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_of_any_layout(layout, device, triton_backend) -> None:
    mu, logvar = LAYOUTS[layout](lambda *shape: torch.randn(shape).to(device))
    problem = Problem.like(mu, logvar)
    actual = fused(problem)
    check(actual, exact(problem))
    for name, tensor in (("mu_grad", mu), ("logvar_grad", logvar)):
        if is_dense(tensor):
            assert lies_like(actual[name], tensor), f"{name} lies in memory as its tensor does"
    if layout in DENSE and is_dense(mu):
        assert lies_like(actual["z"], mu)
    for memory_format in (torch.contiguous_format, torch.channels_last, torch.channels_last_3d):
        if mu.ndim == {torch.channels_last: 4, torch.channels_last_3d: 5}.get(memory_format, mu.ndim):
            assert not mu.is_contiguous(memory_format=memory_format) or actual["z"].is_contiguous(
                memory_format=memory_format
            )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_a_sample_with_gaps_is_copied_and_only_once(layout, device, triton_backend) -> None:
    mu, logvar = LAYOUTS[layout](lambda *shape: torch.randn(shape).to(device))
    with Copies() as copies:
        F.gaussian_sample_kl(mu, logvar, generator=torch.Generator(device))
    if layout in MIXED:
        assert 1 <= copies.count <= 2, "one tensor follows the other"
    else:
        assert copies.count == (2 if layout in EXOTIC else 0)


def test_one_sample_cut_from_many(device, triton_backend) -> None:
    """A batch of one has any stride along the batch, and counts as contiguous with each of them."""
    mu, logvar = torch.randn(2, 4, 14, device=device)[:, 2:3, 3:10]
    assert mu.is_contiguous() and mu.stride(0) == 14
    problem = Problem.like(mu, logvar)
    # kl first: it shows what was read, before anything is written.
    check({"kl": F.gaussian_kl(mu, logvar, reduction="none")}, exact(problem))
    check(fused(problem), exact(problem))
    for packed in (torch.randn(4, 30, device=device)[1:2, 2:16], torch.randn(1, 14, device=device)):
        problem = Problem.like(*packed.chunk(2, 1))
        check({"kl": F.gaussian_kl(*packed.chunk(2, 1), reduction="none")}, exact(problem))
        z, kl = F.gaussian_sample_kl_packed(packed, eps=problem.eps)
        check({"z": z, "kl": kl}, exact(problem))
        check(fused(problem), exact(problem))


UPSTREAM = {
    "contiguous": lambda grad: grad,
    "of a sum": lambda grad: grad.new_tensor(0.75).expand(grad.shape),
    "one for all samples": lambda grad: grad[:1].expand(grad.shape),
    "transposed": lambda grad: grad.transpose(0, 1).contiguous().transpose(0, 1),
    "channels_last": lambda grad: grad.contiguous(memory_format=torch.channels_last),
    "every second column": lambda grad: torch.stack((grad, grad), -1)[..., 0],
    "missing": lambda grad: None,
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("layout", UPSTREAM)
def test_upstream_gradient_of_z_of_any_layout(layout, memory_format, device, triton_backend) -> None:
    mu, logvar = (torch.randn(3, 4, 2, 3).to(device).contiguous(memory_format=memory_format) for _ in range(2))
    problem = Problem.like(mu, logvar)
    problem = problem._replace(z_grad=UPSTREAM[layout](problem.z_grad))
    check(fused(problem), exact(problem))


@pytest.mark.parametrize("layout", ["of a sum", "every second column", "missing"])
def test_upstream_gradient_of_kl_of_any_layout(layout, device, triton_backend) -> None:
    problem = Problem.random((4, 6), device)
    problem = problem._replace(kl_grad=UPSTREAM[layout](problem.kl_grad))
    check(fused(problem), exact(problem))


PACKED = {
    "[B, 2K]": (lambda randn: randn(3, 14), 1),
    "[B, 2K], dim -1": (lambda randn: randn(3, 12), -1),
    "[B, 2]": (lambda randn: randn(5, 2), 1),
    "some samples": (lambda randn: randn(7, 14)[1::2], 1),
    "some of many samples": (lambda randn: randn(140, 40)[::2], 1),  # three programs
    "some columns": (lambda randn: randn(3, 19)[:, 2:16], 1),
    "[B, 2C, H, W]": (lambda randn: randn(3, 6, 2, 5), 1),
    "[B, 2C, H, W] channels_last": (lambda randn: randn(3, 2, 5, 6).permute(0, 3, 1, 2), 1),
    "[B, 16, H, W] channels_last": (lambda randn: randn(2, 5, 5, 16).permute(0, 3, 1, 2), 1),
    "[B, 2C, T, H, W] channels_last_3d": (lambda randn: randn(2, 2, 2, 3, 6).permute(0, 4, 1, 2, 3), 1),
    "[B, T, 2K]": (lambda randn: randn(3, 4, 10), 2),
    "[B, T, 2K], dim -1": (lambda randn: randn(3, 4, 10), -1),
    "[B, C, 2H, W]": (lambda randn: randn(2, 3, 4, 5), 2),
    "[B, C, 2H, W] channels_last": (lambda randn: randn(2, 4, 5, 3).permute(0, 3, 1, 2), 2),
    "[B, 2C, 1, 1] channels_last": (lambda randn: randn(3, 1, 1, 6).permute(0, 3, 1, 2), 1),
    "interleaved in several programs": (lambda randn: randn(1, 1500, 6).transpose(1, 2), 1),
}


@pytest.mark.parametrize("layout", PACKED)
def test_packed_moments(layout, device, triton_backend) -> None:
    """The result of the two halves, in two launches, without a copy, and with one gradient tensor."""
    make, dim = PACKED[layout]
    packed = make(lambda *shape: torch.randn(shape).to(device)).requires_grad_()
    seed = torch.Generator(device)
    noise, _ = F.gaussian_sample_kl_packed(torch.zeros_like(packed), dim=dim, generator=seed.manual_seed(5))
    problem = Problem.like(*packed.detach().chunk(2, dim))._replace(eps=noise.detach())
    # A gradient as autograd hands it to the operation: with the strides of z.
    z_grad = torch.empty_like(noise).copy_(problem.z_grad)
    before = Launches.count
    with Copies() as copies:
        z, kl = F.gaussian_sample_kl_packed(packed, dim=dim, generator=seed.manual_seed(5))
        (gradient,) = torch.autograd.grad((z, kl), packed, (z_grad, problem.kl_grad))
    assert Launches.count == before + 2
    assert copies.count == 0
    assert not is_dense(packed) or lies_like(gradient, packed)
    mu_grad, logvar_grad = gradient.chunk(2, dim)
    actual = {"z": z, "kl": kl, "mu_grad": mu_grad, "logvar_grad": logvar_grad}
    check(actual, exact(problem))

    halves = fused(problem, generator=seed.manual_seed(5))
    assert torch.equal(z, halves["z"]), "the same noise, whichever way the moments lie"
    if INTERPRETED:  # a compiler may add in another order
        assert all(torch.equal(actual[name], halves[name]) for name in actual)

    z_given, kl_given = F.gaussian_sample_kl_packed(packed, dim=dim, eps=problem.eps)
    check({"z": z_given, "kl": kl_given}, exact(problem))
    assert z_given.stride() == z.stride()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("layout", ["[B, 2K]", "[B, 2C, H, W] channels_last"])
def test_packed_reductions(layout, reduction, device, triton_backend) -> None:
    make, dim = PACKED[layout]
    packed = make(lambda *shape: torch.randn(shape).to(device)).requires_grad_()
    problem = Problem.like(*packed.detach().chunk(2, dim), reduction)
    z, kl = F.gaussian_sample_kl_packed(packed, dim=dim, eps=problem.eps, reduction=reduction)
    (gradient,) = torch.autograd.grad((z, kl), packed, (problem.z_grad, problem.kl_grad))
    mu_grad, logvar_grad = gradient.chunk(2, dim)
    actual = {"z": z, "kl": kl, "mu_grad": mu_grad, "logvar_grad": logvar_grad}
    check(actual, exact(problem, reduction))


# --- autograd ---------------------------------------------------------------------------------------------------------


def test_gradcheck_of_the_reference() -> None:
    mu, logvar, eps = torch.randn(3, 2, 3, dtype=torch.float64)
    mu.requires_grad_()
    logvar.requires_grad_()
    for reduction in REDUCTIONS:
        arguments = (
            lambda mu, logvar, r=reduction: reference.gaussian.gaussian_sample_kl(mu, logvar, eps=eps, reduction=r),
            (mu, logvar),
        )
        assert torch.autograd.gradcheck(*arguments)
        assert torch.autograd.gradgradcheck(*arguments)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_backward_twice_gives_the_same_and_writes_no_input(operation, device, triton_backend) -> None:
    problem = Problem.random((3, 6), device, torch.bfloat16)
    problem.mu[0, 0] = math.nan
    before = [tensor.clone() for tensor in problem]
    mu, logvar = problem.mu.requires_grad_(), problem.logvar.requires_grad_()
    for noise in ({}, {"eps": problem.eps}):
        outputs = apply(operation, mu, logvar, **noise)
        kept = [None if output is None else output.detach().clone() for output in outputs]
        first, second = (differentiate(problem, outputs, (mu, logvar), retain_graph=True) for _ in range(2))
        assert all(same_bits(*pair) for pair in zip(first, second, strict=True))
        for output, copy in zip(outputs, kept, strict=True):
            assert output is None or same_bits(output, copy), "backward wrote an output"
    for name, tensor, copy in zip(INPUTS, problem, before, strict=True):
        assert same_bits(tensor, copy), f"{name} was written"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_two_runs_agree_in_every_bit(operation, device, triton_backend) -> None:
    problem = Problem.random((1, 4100), device, reduction="sum")  # five programs
    seed = torch.Generator(device)
    first, second = (fused(problem, "sum", operation, generator=seed.manual_seed(1)) for _ in range(2))
    assert all(same_bits(first[name], second[name]) for name in first)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)], ids=["mu", "logvar", "neither"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_only_the_gradients_that_are_needed(operation, needs, device, triton_backend) -> None:
    problem = Problem.random((3, 6), device).of(operation)
    mu, logvar = problem.mu.requires_grad_(needs[0]), problem.logvar.requires_grad_(needs[1])
    outputs = apply(operation, mu, logvar, eps=problem.eps)
    assert all(output.requires_grad == any(needs) for output in outputs if output is not None)
    wanted = [name for name, needed in zip(("mu", "logvar"), needs, strict=True) if needed]
    if wanted:
        gradients = differentiate(problem, outputs, [getattr(problem, name) for name in wanted])
        check({f"{name}_grad": g for name, g in zip(wanted, gradients, strict=True)}, exact(problem))


def drawn_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """The noise of the next call, exactly: z with mu = logvar = 0."""
    zero = torch.zeros(shape, device=generator.device)
    return F.gaussian_sample(zero, zero, generator=generator)


@pytest.mark.parametrize("drawn", [False, True], ids=["eps given", "eps drawn"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_gradient_penalty(operation, drawn, device, triton_backend) -> None:
    """Double backward is that of the reference in float64, for the same noise.

    The penalty sum(m^2 + l^2) of m = z_grad + kl_grad * mu and l = (z_grad * std * eps + kl_grad * expm1(logvar)) / 2
    has the gradients 2 * kl_grad * m and l * (z_grad * std * eps / 2 + kl_grad * exp(logvar)): two factors, each made
    in at most 10 roundings of plain PyTorch.
    """
    seed = torch.Generator(device)
    problem = Problem.random((3, 6), device).of(operation)
    if drawn:
        problem = problem._replace(eps=drawn_noise((3, 6), seed.manual_seed(2)))

    def penalty(problem: Problem, apply) -> tuple[Tensor, ...]:
        inputs = problem.mu.requires_grad_(), problem.logvar.requires_grad_()
        gradients = differentiate(problem, apply(*inputs), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs, materialize_grads=True)

    noise = {"generator": seed.manual_seed(2)} if drawn else {"eps": problem.eps}
    actual = penalty(problem, lambda mu, logvar: apply(operation, mu, logvar, **noise))
    wide = Problem(*(None if t is None else t.detach().double().cpu() for t in problem))
    expected = penalty(
        wide, lambda mu, logvar: reference.gaussian.gaussian_sample_kl(mu, logvar, eps=wide.eps, reduction="none")
    )

    scales = exact(problem)
    x = wide.logvar.detach()
    condition = 1 + x.abs()
    z_grad = 0 if wide.z_grad is None else wide.z_grad.abs()
    kl_grad = 0 if wide.kl_grad is None else wide.kl_grad.abs()[:, None]
    slope = 0.5 * z_grad * torch.exp(x / 2) * condition * wide.eps.abs() + kl_grad * torch.exp(x) * condition
    assert_within(actual[0], expected[0], 2 * kl_grad * scales["mu_grad"].scale, 20, "mu")
    assert_within(actual[1], expected[1], scales["logvar_grad"].scale * slope, 20, "logvar")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_torch_func_grad(operation, device, triton_backend) -> None:
    seed = torch.Generator(device)
    problem = Problem.random((3, 6), device).of(operation)._replace(eps=drawn_noise((3, 6), seed.manual_seed(2)))

    def loss(mu: Tensor, logvar: Tensor) -> Tensor:
        outputs = apply(operation, mu, logvar, generator=seed.manual_seed(2))
        pairs = zip(outputs, (problem.z_grad, problem.kl_grad), strict=True)
        return sum((output * grad).sum() for output, grad in pairs if output is not None)

    gradients = torch.func.grad(loss, argnums=(0, 1))(problem.mu, problem.logvar)
    check(dict(zip(("mu_grad", "logvar_grad"), gradients, strict=True)), exact(problem))


@pytest.mark.parametrize("operation", OPERATIONS)
def test_vmap_is_refused_in_a_sentence(operation, device, no_launch) -> None:
    mu, logvar = torch.randn(2, 2, 3, 4, device=device)
    with pytest.raises(
        NotImplementedError, match=r"is batched over its first dimension already\. Call it on the whole batch"
    ):
        torch.func.vmap(lambda mu, logvar: apply(operation, mu, logvar)[0], randomness="different")(mu, logvar)


# --- launches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("shape", [(2, 26), (2, 28)], ids=str)
def test_every_tile_gives_the_same(shape, reduction, device, triton_backend, monkeypatch) -> None:
    """The same noise and samples in every bit; the sums, whose order depends on the tile, within their bound."""
    seed = torch.Generator(device)
    problem = Problem.random(shape, device, reduction=reduction)
    problem = problem._replace(eps=drawn_noise(shape, seed.manual_seed(3)))
    expected = exact(problem, reduction)
    first = fused(problem, reduction, generator=seed.manual_seed(3))
    check(first, expected)
    plan_anew(monkeypatch)
    for rows, columns in ((1, 8), (1, 64), (4, 32)):

        def cut(all_rows: int, all_columns: int, itemsize: int, rows: int = rows, columns: int = columns) -> Tiling:
            return Tiling(all_rows, all_columns, rows if all_columns <= columns else 1, columns, 4)

        monkeypatch.setattr(posterior, "cut", cut)
        actual = fused(problem, reduction, generator=seed.manual_seed(3))
        check(actual, expected)
        assert same_bits(actual["z"], first["z"])


@triton.jit
def sum_kernel(terms_ptr, sums_ptr, groups, count, scale, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    sum_groups_in_order(terms_ptr, sums_ptr, groups, count, scale, GROUPS, BLOCK)


@pytest.mark.parametrize(("groups", "count"), [(1, 1), (1, 3000), (3, 1025), (130, 9), (1500, 1)])
def test_partial_sums_of_more_programs_than_one_block_holds(groups, count, device) -> None:
    """Of integers, whose sums are exact: what a launch of that many programs leaves to its last one."""
    terms = torch.randint(-50, 50, (groups, count)).float().to(device)
    sums = torch.empty(groups, device=device)
    sum_kernel[(1,)](terms, sums, groups, count, 0.5, **sum_blocks(groups, count))
    assert torch.equal(sums, 0.5 * terms.sum(1))


def test_the_ticket_of_a_reduction_returns_to_0(device, triton_backend) -> None:
    mu, logvar = torch.randn(2, 1, 4100, device=device)
    for _ in range(2):
        F.gaussian_kl(mu, logvar)
        assert launching.ticket(device).item() == 0


@pytest.mark.skipif(not INTERPRETED, reason="only the interpreter is cut short by an exception")
def test_a_launch_that_was_cut_short_spoils_nothing(device, triton_backend, monkeypatch) -> None:
    mu, logvar = torch.randn(2, 1, 4100, device=device)
    before = F.gaussian_kl(mu, logvar)
    draw, drawn = gaussian.drew_last_ticket, []

    def interrupted(ticket):
        drawn.append(draw(ticket))
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return drawn[-1]

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gaussian, "drew_last_ticket", interrupted)
        F.gaussian_kl(mu, logvar)
    assert len(drawn) == 2
    assert torch.equal(F.gaussian_kl(mu, logvar), before)


# --- dtypes and modules -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_changes_nothing(dtype, device, triton_backend) -> None:
    """The operations take what arrives: z in its dtype, kl in float32."""
    problem = Problem.random((3, 6), device, dtype)
    expected = fused(problem)
    with torch.autocast(device.type, torch.bfloat16):
        actual = fused(problem)
    assert all(same_bits(actual[name], expected[name]) for name in expected)


def test_behind_a_layer_under_autocast(device, triton_backend) -> None:
    layer = torch.nn.Linear(5, 8).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        z, kl = F.gaussian_sample_kl_packed(layer(torch.randn(3, 5, device=device)))
        loss = z.float().square().sum() + kl.sum()
    loss.backward()
    assert (z.dtype, kl.dtype, layer.weight.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_float64_is_refused_or_computed_by_the_reference(operation, device, no_launch) -> None:
    mu, logvar, eps = torch.randn(3, 2, 4, device=device, dtype=torch.float64)
    with pytest.raises(
        RuntimeError, match='"triton" was asked for but cannot run: float64 is computed by the reference'
    ):
        apply(operation, mu, logvar, eps=eps)
    with fastvae.use_backend("auto"):
        actual = apply(operation, mu, logvar, eps=eps)
        # A float64 eps is enough: nothing is rounded unasked.
        mixed = apply(operation, mu.float(), logvar.float(), eps=eps) if operation != "gaussian_kl" else actual
    expected = reference.gaussian.gaussian_sample_kl(mu, logvar, eps=eps, reduction="none")
    for value, wanted, other in zip(actual, expected, mixed, strict=True):
        assert value is None or (value.dtype is torch.float64 and torch.equal(value, wanted))
        assert value is None or other.dtype is not torch.float16
    if operation != "gaussian_kl":
        with pytest.raises(RuntimeError, match="float64"):
            apply(operation, mu.float(), logvar.float(), eps=eps)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_modules(training, device, triton_backend) -> None:
    """They are the functions, and sample in eval mode too; a deterministic one returns mu."""
    packed = torch.randn(3, 4, 10, device=device)
    mu, logvar = packed.chunk(2, -1)

    def seeded(function, *arguments, **options):
        torch.manual_seed(4)
        return function(*arguments, **options)

    def module(kind, **options):
        return kind(**options).train(training)

    assert torch.equal(seeded(module(nn.GaussianSampling), mu, logvar), seeded(F.gaussian_sample, mu, logvar))
    assert module(nn.GaussianSampling, deterministic=True)(mu, logvar) is mu
    assert torch.equal(module(nn.GaussianKL)(mu, logvar), F.gaussian_kl(mu, logvar))
    assert torch.equal(module(nn.GaussianKL, reduction="none")(mu, logvar), F.gaussian_kl(mu, logvar, reduction="none"))
    z, kl = seeded(module(nn.GaussianSamplingKL, dim=-1, reduction="mean"), packed)
    expected_z, expected_kl = seeded(F.gaussian_sample_kl_packed, packed, dim=-1, reduction="mean")
    assert torch.equal(z, expected_z) and torch.equal(kl, expected_kl)
    z, kl = module(nn.GaussianSamplingKL, dim=-1, reduction="mean", deterministic=True)(packed)
    assert torch.equal(z, mu) and torch.equal(kl, F.gaussian_kl(mu, logvar, reduction="mean"))
    with torch.inference_mode():
        assert torch.equal(seeded(module(nn.GaussianSampling), mu, logvar), seeded(F.gaussian_sample, mu, logvar))
    text = "GaussianSamplingKL(dim=1, reduction='none', free_bits=0.0, deterministic=False)"
    assert repr(module(nn.GaussianSamplingKL)) == text


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_numbers_of_numpy(backend, device) -> None:
    moments = torch.randn(4, 6, device=device)

    def seeded(**numbers):
        torch.manual_seed(3)
        return F.gaussian_sample_kl_packed(moments, reduction="batchmean", **numbers)

    with fastvae.use_backend(backend):
        expected = seeded(dim=1, batch_offset=2, free_bits=0.25)
        actual = seeded(dim=np.int64(1), batch_offset=np.int32(2), free_bits=np.float32(0.25))
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_small_upstream_gradients_of_half_precision(create_graph, backend, device) -> None:
    """Half of float16's smallest number is not 0 before it is multiplied with what makes it large again."""
    mu = torch.zeros(2, 3, dtype=torch.float16, device=device, requires_grad=True)
    logvar = torch.full_like(mu, 4.0).requires_grad_()
    smallest = torch.full_like(mu, 2.0**-24).detach()
    with fastvae.use_backend(backend):
        z = F.gaussian_sample(mu, logvar, eps=torch.full((2, 3), 2.0, device=device))
        gradients = torch.autograd.grad(z, (mu, logvar), smallest, create_graph=create_graph)
    wanted = smallest.double() * 0.5 * math.exp(2.0) * 2.0
    assert torch.equal(gradients[0], smallest)
    assert_within(gradients[1], wanted, wanted.abs(), 10)


class Elsewhere(torch.Generator):
    """A generator of a device that neither a GPU nor a CPU machine has."""

    device = torch.device("xpu")


PAIR_ERRORS = {
    "mu is a list": (lambda f, x: f([[1.0]], x), TypeError, "mu must be a torch.Tensor, got list"),
    "mu of integers": (lambda f, x: f(x.int(), x), TypeError, "mu must be float16, .* or float64, got torch.int32"),
    "mu of rank 1": (lambda f, x: f(x[0], x[0]), ValueError, r"mu must have .* at least 2 dimensions, got \[6\]"),
    "logvar missing": (lambda f, x: f(x, None), TypeError, "logvar must be a torch.Tensor, got NoneType"),
    "logvar of another shape": (
        lambda f, x: f(x, x[:, :1]),
        ValueError,
        r"logvar must have the shape of mu, \[4, 6\], got \[4, 1\]",
    ),
    "logvar of another dtype": (
        lambda f, x: f(x, x.half()),
        TypeError,
        "logvar must have the dtype of mu, torch.float32, got torch.float16",
    ),
    "logvar elsewhere": (
        lambda f, x: f(x, x.to("meta")),
        ValueError,
        "logvar must be on the device of mu, .*, got meta",
    ),
}
NOISE_ERRORS = {
    "eps is a number": (lambda f, x: f(x, eps=1.0), TypeError, "eps must be a floating-point tensor, got float"),
    "eps of integers": (
        lambda f, x: f(x, eps=x.int()),
        TypeError,
        "eps must be a floating-point tensor, got torch.int32",
    ),
    "eps of another shape": (
        lambda f, x: f(x, eps=x[1:]),
        ValueError,
        r"eps must have the shape of z, \[4, 6\], got \[3, 6\]",
    ),
    "eps elsewhere": (lambda f, x: f(x, eps=x.to("meta")), ValueError, "eps must be on the device of .*, got meta"),
    "eps with gradient": (
        lambda f, x: f(x, eps=x.clone().requires_grad_()),
        ValueError,
        "eps must not require grad: .*; pass eps.detach",
    ),
    "eps and generator": (
        lambda f, x: f(x, eps=x, generator=torch.Generator(x.device)),
        ValueError,
        "eps and generator were both given",
    ),
    "generator elsewhere": (
        lambda f, x: f(x, generator=Elsewhere()),
        ValueError,
        "generator must be of the tensor's device, .*, got xpu",
    ),
    "batch_offset beyond 64 bits": (
        lambda f, x: f(x, batch_offset=2**62),
        ValueError,
        "batch_offset must leave the elements .* below 2.63, got 4611686018427387904 samples of 6 elements",
    ),
    "batch_offset is no integer": (lambda f, x: f(x, batch_offset=1.0), TypeError, "batch_offset must be an integer"),
    "generator is a seed": (lambda f, x: f(x, generator=5), TypeError, "generator must be a torch.Generator, got int"),
}
REDUCTION_ERROR = (
    lambda f, x: f(x, reduction="avg"),
    ValueError,
    "reduction must be one of none, batchmean, sum, mean, per_dimension, got 'avg'",
)
PACKED_ERRORS = {
    "moments is None": (lambda f, x: f(None), TypeError, "moments must be a torch.Tensor, got NoneType"),
    "moments of booleans": (lambda f, x: f(x > 0), TypeError, "moments must be float16, .* or float64, got torch.bool"),
    "moments of rank 0": (lambda f, x: f(x.sum()), ValueError, r"moments must have .* at least 2 dimensions, got \[\]"),
    "odd size": (lambda f, x: f(x[:, 1:]), ValueError, r"moments must have an even size along dim 1, got \[4, 5\]"),
    "batch": (lambda f, x: f(x, dim=0), ValueError, "dim must name a dimension .* other than the batch, 1 to 1, got 0"),
    "batch from behind": (lambda f, x: f(x, dim=-2), ValueError, "dim must name .* 1 to 1, got -2"),
    "dim too large": (lambda f, x: f(x, dim=2), ValueError, "dim must name .* 1 to 1, got 2"),
    "dim too small": (lambda f, x: f(x, dim=-3), ValueError, "dim must name .* 1 to 1, got -3"),
    "dim is no integer": (lambda f, x: f(x, dim=1.5), TypeError, "dim must be an integer, got float"),
    "a second tensor": (lambda f, x: nn.GaussianSamplingKL()(x, x), TypeError, "one tensor, got two tensors"),
}


def refuses(function, error, device) -> None:
    call, kind, message = error
    with pytest.raises(kind, match=message):
        call(function, torch.randn(4, 6, device=device))


@pytest.mark.parametrize("error", PAIR_ERRORS)
@pytest.mark.parametrize("operation", OPERATIONS[:3])
def test_wrong_moments_are_refused(operation, error, device, no_launch) -> None:
    refuses(getattr(F, operation), PAIR_ERRORS[error], device)


@pytest.mark.parametrize("error", PACKED_ERRORS)
def test_wrong_packed_moments_are_refused(error, device, no_launch) -> None:
    refuses(F.gaussian_sample_kl_packed, PACKED_ERRORS[error], device)


@pytest.mark.parametrize("error", NOISE_ERRORS)
@pytest.mark.parametrize("operation", ["gaussian_sample", "gaussian_sample_kl", "gaussian_sample_kl_packed"])
def test_wrong_noise_is_refused(operation, error, device, no_launch) -> None:
    # x is a half of the moments: what eps must look like.
    given = {"gaussian_sample_kl_packed": lambda x: [torch.cat((x, x), 1)]}.get(operation, lambda x: [x, x])
    refuses(lambda x, **noise: getattr(F, operation)(*given(x), **noise), NOISE_ERRORS[error], device)


@pytest.mark.parametrize("operation", OPERATIONS[1:])
def test_an_unknown_reduction_is_refused(operation, device, no_launch) -> None:
    given = {"gaussian_sample_kl_packed": lambda x: [x]}.get(operation, lambda x: [x, x])
    refuses(lambda x, **options: getattr(F, operation)(*given(x), **options), REDUCTION_ERROR, device)


# --- any shape, any strides -------------------------------------------------------------------------------------------


@st.composite
def problems(draw) -> tuple[tuple[int, ...], list, torch.dtype, str]:
    """A shape, two ways to lay it out (order of dimensions in memory, steps, expanded ones), a dtype, a reduction."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=2, max_size=5)))
    layout = st.tuples(
        st.permutations(range(len(shape))),
        st.lists(st.sampled_from([1, 1, 1, 2]), min_size=len(shape), max_size=len(shape)),
        st.lists(st.sampled_from([False, False, False, False, True]), min_size=len(shape), max_size=len(shape)),
    )
    first = draw(layout)
    return (
        shape,
        [first, draw(st.sampled_from([first, draw(layout)]))],
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(REDUCTIONS)),
    )


def laid_out(shape, order, steps, expanded, seed: int, device, dtype) -> Tensor:
    """Random numbers: the dimensions lie in memory in `order`, `steps` apart, and those that are `expanded` once."""
    stored = [1 if expanded[d] else shape[d] * steps[d] for d in order]
    numbers = torch.randn(stored, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    tensor = numbers.permute([order.index(d) for d in range(len(shape))])
    return tensor[tuple(slice(None, None, 1 if expanded[d] else steps[d]) for d in range(len(shape)))].expand(shape)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=problems())
def test_any_shape_and_strides(drawn, device, triton_backend) -> None:
    shape, layouts, dtype, reduction = drawn
    mu, logvar = (laid_out(shape, *layout, seed, device, dtype) for seed, layout in enumerate(layouts))
    problem = Problem.like(mu, logvar, reduction)
    actual = fused(problem, reduction)
    check(actual, exact(problem, reduction))
    assert not is_dense(mu) or lies_like(actual["mu_grad"], mu)


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=problems(), data=st.data())
def test_any_packed_moments(drawn, data, device, triton_backend) -> None:
    shape, layouts, dtype, reduction = drawn
    dim = data.draw(st.integers(1, len(shape) - 1))
    shape = tuple(2 * length if d == dim else length for d, length in enumerate(shape))
    packed = laid_out(shape, *layouts[0], 0, device, dtype)
    problem = Problem.like(*packed.chunk(2, dim), reduction)
    packed = packed.detach().requires_grad_()
    z, kl = F.gaussian_sample_kl_packed(packed, dim=dim, eps=problem.eps, reduction=reduction)
    (gradient,) = torch.autograd.grad((z, kl), packed, (problem.z_grad, problem.kl_grad))
    mu_grad, logvar_grad = gradient.chunk(2, dim)
    check({"z": z, "kl": kl, "mu_grad": mu_grad, "logvar_grad": logvar_grad}, exact(problem, reduction))
    assert not is_dense(packed) or lies_like(gradient, packed)
