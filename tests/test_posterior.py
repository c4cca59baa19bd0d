"""What is particular to the Gaussian posterior: small logvar, the divergence of each dimension, free bits, modules, and
what is refused. `test_contract.py` holds its operations to the rest; `test_copies.py` has its layouts.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

import fastvae
import fastvae.functional as F
from bounds import assert_within
from conftest import plan_anew
from contract import EVERY, FLOATS, check, launching_nothing, noise
from fastvae import nn, reference
from fastvae.kernels import posterior
from fastvae.kernels.posterior import cut_columns
from fastvae.operations import REDUCTIONS, Spec, named
from layouts import same_bits

SAMPLE_KL = named(EVERY)["gaussian_sample_kl"]


# ---------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
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


@pytest.mark.parametrize(
    "options",
    [*({"reduction": it} for it in (*REDUCTIONS, "per_dimension"))]
    + [{"reduction": it, "free_bits": 0.1} for it in ("per_dimension", "batchmean")],
    ids=str,
)
def test_gradcheck_of_the_reference(options) -> None:
    mu, logvar, eps = torch.randn(3, 5, 4, dtype=torch.float64)
    mu[:, :2] *= 0.01  # below the free bits
    logvar[:, :2] *= 0.01

    def function(mu, logvar):
        return reference.gaussian.gaussian_sample_kl(mu, logvar, eps=eps, **options)

    inputs = mu.requires_grad_(), logvar.requires_grad_()
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_the_reference_is_the_formula() -> None:
    """Against torch.distributions, which knows neither this file nor the library."""
    mu, logvar = torch.randn(2, 50, 3, dtype=torch.float64)
    posterior = torch.distributions.Normal(mu, torch.exp(logvar / 2))
    means = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean(0)
    torch.testing.assert_close(reference.gaussian.gaussian_kl(mu, logvar, reduction="per_dimension"), means)
    bound = means.median().item()
    torch.testing.assert_close(
        reference.gaussian.gaussian_kl(mu, logvar, free_bits=bound), means.clamp(min=bound).sum()
    )


# ----------------------------------------------------------------------------------------- dimensions, and free bits


@pytest.mark.parametrize(("most", "blocks"), [(192, 1), (384, 2), (768, 4), (10**9, 5)])
def test_every_cut_gives_the_same(most, blocks, device, triton_backend, monkeypatch) -> None:
    """Blocks of one tile of rows, blocks that go through several, and one block without partial sums: the same samples
    in every bit, sums within their bound.
    """
    spec = Spec((70, 130), device=device)
    tensors, options = SAMPLE_KL.inputs(spec), {**noise(SAMPLE_KL, spec), "reduction": "per_dimension"}
    usual, _ = F.gaussian_sample_kl(*tensors, **options)
    # So that a small problem is cut as a large one is.
    plan_anew(monkeypatch)
    monkeypatch.setattr(posterior, "_MOST_PARTIAL_SUMS", most)
    assert cut_columns(70, 130, 4)[1] == blocks
    check(SAMPLE_KL, tensors, **options)
    assert same_bits(F.gaussian_sample_kl(*tensors, **options)[0], usual)


def test_the_cut_of_large_problems() -> None:
    """No more partial sums than are allowed, and enough programs for a card."""
    for rows, columns, blocks in ((65536, 16, 1024), (4096, 1024, 16), (64, 16384, 1), (10**6, 4, 3907), (2, 10**6, 1)):
        tiling, found = cut_columns(rows, columns, 4)
        assert found == blocks
        assert found == 1 or found * columns <= 16384
        assert tiling.chunks * found >= min(128, tiling.chunks * -(-rows // tiling.tile_rows))


def test_free_bits_of_none_and_of_all(device, triton_backend) -> None:
    mu, logvar = torch.randn(2, 30, 5, device=device)
    assert same_bits(
        F.gaussian_kl(mu, logvar, reduction="per_dimension", free_bits=1e-6),
        F.gaussian_kl(mu, logvar, reduction="per_dimension"),
    )
    mu = mu.requires_grad_()
    kl = F.gaussian_kl(mu, logvar, free_bits=100)
    assert kl == F.gaussian_sample_kl(mu, logvar, reduction="batchmean", free_bits=100)[1] == 500
    assert not torch.autograd.grad(kl, mu)[0].any()


def test_the_noise_is_that_of_the_other_reductions(device, triton_backend) -> None:
    generator = torch.Generator(device)
    for shape in ((3, 5), (40, 8), (5, 3, 4, 4), (3, 300)):
        mu, logvar = torch.randn(2, *shape, device=device)
        for options in ({}, {"batch_offset": 3}):
            z, _ = F.gaussian_sample_kl(mu, logvar, generator=generator.manual_seed(1), **options)
            same, _ = F.gaussian_sample_kl(
                mu, logvar, reduction="per_dimension", generator=generator.manual_seed(1), **options
            )
            assert same_bits(z, same)


# -------------------------------------------------------------------------------------------------------------- modules


def test_behind_a_layer_under_autocast(device, triton_backend) -> None:
    layer = torch.nn.Linear(5, 8).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        z, kl = F.gaussian_sample_kl_packed(layer(torch.randn(3, 5, device=device)))
        loss = z.float().square().sum() + kl.sum()
    loss.backward()
    assert (z.dtype, kl.dtype, layer.weight.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert layer.weight.grad.isfinite().all()


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


def test_modules_with_settings(device, triton_backend) -> None:
    """They hand them on, and are refused with those that are wrong when they are made."""
    mu, logvar, prior_mu, prior_logvar = torch.randn(4, 3, 5, device=device)
    scale = {"scale": "softplus", "scale_eps": 1e-3, "scale_clamp": (-2.0, 2.0)}
    prior = prior_mu, prior_logvar
    packed, packed_prior = torch.cat((mu, logvar), -1), torch.cat(prior, -1)

    def seeded(function, *arguments, **options):
        torch.manual_seed(4)
        return function(*arguments, **options)

    sampling = nn.GaussianSampling(samples=2, log_prob="detached", **scale)
    wanted = seeded(F.gaussian_sample, mu, logvar, samples=2, log_prob="detached", **scale)
    assert all(map(torch.equal, seeded(sampling, mu, logvar), wanted))
    assert torch.equal(nn.GaussianKL(**scale)(mu, logvar, prior), F.gaussian_kl(mu, logvar, prior=prior, **scale))
    module = nn.GaussianSamplingKL(dim=-1, samples=2, log_prob=True, **scale)
    wanted = seeded(F.gaussian_sample_kl, mu, logvar, prior=prior, samples=2, log_prob=True, **scale)
    for arguments, given in (((mu, logvar), prior), ((packed,), packed_prior), ((packed,), prior)):
        assert all(map(torch.equal, seeded(module, *arguments, prior=given), wanted))
    settings = "scale='softplus', scale_eps=0.001, scale_clamp=(-2.0, 2.0)"
    assert repr(module).endswith(f"deterministic=False, samples=2, log_prob=True, {settings})")
    for each in (packed_prior, packed_prior[0], prior):
        z, kl = nn.GaussianSamplingKL(dim=-1, deterministic=True)(packed, prior=each)
        expected = tuple(h[0] for h in prior) if each is not prior and each.ndim == 1 else prior
        assert torch.equal(z, mu) and torch.equal(kl, F.gaussian_kl(mu, logvar, prior=expected, reduction="none"))
    with pytest.raises(ValueError, match="deterministic must be False with samples or log_prob"):
        nn.GaussianSampling(deterministic=True, samples=1)
    with pytest.raises(ValueError, match="scale must be one of"):
        nn.GaussianKL(scale="variance")


def test_modules_with_free_bits(device, triton_backend) -> None:
    mu, logvar = torch.randn(2, 9, 4, device=device)
    expected = F.gaussian_kl(mu, logvar, free_bits=0.5)
    module = nn.GaussianKL(free_bits=0.5)
    assert same_bits(module(mu, logvar), expected)
    assert "free_bits=0.5" in repr(module)
    for deterministic in (False, True):
        module = nn.GaussianSamplingKL(reduction="batchmean", free_bits=0.5, deterministic=deterministic)
        z, kl = module(torch.cat((mu, logvar), 1))
        torch.testing.assert_close(kl, expected, rtol=1e-6, atol=0)
        assert torch.equal(z, mu) == deterministic


# ------------------------------------------------------------------------------------------------------------- refusals


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


class Elsewhere(torch.Generator):
    """A generator of a device that neither a GPU nor a CPU machine has."""

    device = torch.device("xpu")


NOISE_ERRORS = {
    "eps of another shape": (lambda f, x: f(eps=x[1:]), ValueError, r"eps must have the shape of z, \[4, 6\], got"),
    "eps and generator": (
        lambda f, x: f(eps=x, generator=torch.Generator(x.device)),
        ValueError,
        "eps and generator were both given",
    ),
    "generator elsewhere": (
        lambda f, x: f(generator=Elsewhere()),
        ValueError,
        "generator must be of the tensor's device, .*, got xpu",
    ),
    "generator is a seed": (lambda f, x: f(generator=5), TypeError, "generator must be a torch.Generator, got int"),
    "batch_offset beyond 64 bits": (
        lambda f, x: f(batch_offset=2**62),
        ValueError,
        "batch_offset must leave the elements .* below 2.63, got 4611686018427387904 samples of 6 elements",
    ),
    "batch_offset is no integer": (lambda f, x: f(batch_offset=1.0), TypeError, "batch_offset must be an integer"),
}
REDUCTION_ERRORS = {
    "negative": ({"free_bits": -0.1}, ValueError, "free_bits must be finite in float32 and not negative, got -0.1"),
    "NaN": ({"free_bits": math.nan}, ValueError, "free_bits must be finite in float32 and not negative, got nan"),
    "beyond float32": ({"free_bits": 1e300}, ValueError, "free_bits must be finite in float32 and not negative"),
    "text": ({"free_bits": "1"}, TypeError, "free_bits must be a number, got str"),
    "none": ({"free_bits": 0.1, "reduction": "none"}, ValueError, 'reduction must be "batchmean" or "per_dimension"'),
    "mean": ({"free_bits": 0.1, "reduction": "mean"}, ValueError, 'reduction must be "batchmean" or "per_dimension"'),
}
DIM_ERRORS = {
    "odd size": (lambda f, x: f(x[:, 1:]), ValueError, r"moments must have an even size along dim 1, got \[4, 5\]"),
    "batch": (lambda f, x: f(x, dim=0), ValueError, "dim must name a dimension .* other than the batch, 1 to 1, got 0"),
    "batch from behind": (lambda f, x: f(x, dim=-2), ValueError, "dim must name .* 1 to 1, got -2"),
    "dim too large": (lambda f, x: f(x, dim=2), ValueError, "dim must name .* 1 to 1, got 2"),
    "dim too small": (lambda f, x: f(x, dim=-3), ValueError, "dim must name .* 1 to 1, got -3"),
    "dim is no integer": (lambda f, x: f(x, dim=1.5), TypeError, "dim must be an integer, got float"),
    "three tensors": (
        lambda f, x: nn.GaussianSamplingKL()(x, x, x),
        TypeError,
        "or mu and logvar, got Tensor, Tensor, T",
    ),
    "an offset as a tensor": (lambda f, x: nn.GaussianSamplingKL()(x, 3), TypeError, "mu and logvar, got Tensor, int"),
}


def bound(operation: str, x: torch.Tensor) -> Callable[..., object]:
    """The function of mu = logvar = x, without its tensors."""
    given = (torch.cat((x, x), 1),) if operation.endswith("packed") else (x, x)
    return lambda **options: getattr(F, operation)(*given, **options)


@pytest.mark.parametrize("error", NOISE_ERRORS)
@pytest.mark.parametrize("operation", ["gaussian_sample", "gaussian_sample_kl", "gaussian_sample_kl_packed"])
def test_wrong_noise_is_refused(operation, error, device) -> None:
    call, kind, message = NOISE_ERRORS[error]
    x = torch.randn(4, 6, device=device)
    with launching_nothing(), pytest.raises(kind, match=message):
        call(bound(operation, x), x)


@pytest.mark.parametrize("error", REDUCTION_ERRORS)
@pytest.mark.parametrize("operation", ["gaussian_kl", "gaussian_sample_kl", "gaussian_sample_kl_packed"])
def test_wrong_free_bits_are_refused(operation, error, device) -> None:
    options, kind, message = REDUCTION_ERRORS[error]
    with launching_nothing(), pytest.raises(kind, match=message):
        bound(operation, torch.randn(4, 6, device=device))(**options)


@pytest.mark.parametrize("error", DIM_ERRORS)
def test_a_wrong_dim_is_refused(error, device) -> None:
    call, kind, message = DIM_ERRORS[error]
    with launching_nothing(), pytest.raises(kind, match=message):
        call(F.gaussian_sample_kl_packed, torch.randn(4, 6, device=device))
