"""Another prior, another scale, several samples and log-densities of the Gaussian posterior: the specification against
torch.distributions, which knows neither this file nor the library, and identities.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import fastvae
import fastvae.functional as F
from contract import launching_nothing

DOUBLE = torch.float64
CLAMPS = {
    "logvar": {},
    "scvi": {"scale": "logvar", "scale_eps": 1e-4},
    "diffusers": {"scale": "logvar", "scale_clamp": (-0.5, 0.75)},
    "vdvae": {"scale": "log_std"},
    "log_std_eps": {"scale": "log_std", "scale_eps": 0.25, "scale_clamp": (-0.75, 1.0)},
    "std": {"scale": "std"},
    "std_eps": {"scale": "std", "scale_eps": 1e-3, "scale_clamp": (0.25, 1.0)},
    "softplus": {"scale": "softplus"},
    "oobleck": {"scale": "softplus", "scale_eps": 1e-4},
}
each_scale = pytest.mark.parametrize("settings", CLAMPS.values(), ids=CLAMPS)


def naive_std(a: Tensor, scale: str = "logvar", scale_eps: float = 0.0, scale_clamp=None) -> Tensor:
    """As the documentation has it, without a thought of overflow."""
    if scale_clamp is not None:
        a = a.clamp(*scale_clamp)
    if scale == "logvar":
        return (a.exp() + scale_eps).sqrt()
    return {"log_std": a.exp, "std": lambda: a, "softplus": lambda: (1 + a.exp()).log()}[scale]() + scale_eps


def second(shape: tuple[int, ...], scale: str = "logvar", **_: object) -> Tensor:
    values = torch.randn(shape, dtype=DOUBLE)
    return (values.abs() + 0.1 if scale == "std" else values).requires_grad_()


def first(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, dtype=DOUBLE).requires_grad_()


# ------------------------------------------------------------------------------------------------------ the formulas


SHAPE = (5, 4, 3)
PRIORS = {
    "none": None,
    "full": (SHAPE, SHAPE),
    "one": ((1, 4, 3), (1, 4, 3)),
    "event": ((4, 3), (4, 3)),
    "mixed": (SHAPE, (4, 3)),
}


@each_scale
@pytest.mark.parametrize("prior", PRIORS)
def test_divergences_are_those_of_torch(prior, settings) -> None:
    mu, a, shapes = first(SHAPE), second(SHAPE, **settings), PRIORS[prior]
    prior_halves = None if shapes is None else (first(shapes[0]), second(shapes[1], **settings))
    inputs = (mu, a) if prior_halves is None else (mu, a, *prior_halves)
    of_torch = (
        Normal(0.0, 1.0) if prior_halves is None else Normal(prior_halves[0], naive_std(prior_halves[1], **settings))
    )
    terms = kl_divergence(Normal(mu, naive_std(a, **settings)), of_torch)
    wanted = {
        "none": terms.sum((1, 2)),
        "batchmean": terms.sum() / 5,
        "sum": terms.sum(),
        "mean": terms.mean(),
        "per_dimension": terms.mean(0),
    }
    for reduction, value in wanted.items():
        kl = F.gaussian_kl(mu, a, prior=prior_halves, reduction=reduction, **settings)
        torch.testing.assert_close(kl, value, rtol=1e-12, atol=1e-12)
        upstream = torch.randn_like(value)
        gradients = torch.autograd.grad(kl, inputs, upstream)
        expected = torch.autograd.grad(value, inputs, upstream, retain_graph=True)
        for gradient, of_naive, tensor in zip(gradients, expected, inputs, strict=True):
            assert gradient.shape == tensor.shape
            torch.testing.assert_close(gradient, of_naive, rtol=1e-11, atol=1e-12)
    bound = wanted["per_dimension"].median().item()
    kl = F.gaussian_kl(mu, a, prior=prior_halves, free_bits=bound, **settings)
    torch.testing.assert_close(kl, wanted["per_dimension"].clamp(min=bound).sum())


@pytest.mark.parametrize("dim", [1, 2, -1])
@pytest.mark.parametrize("batch", [5, 1, None])
def test_packed_priors_are_their_halves(batch, dim) -> None:
    settings = {"scale": "log_std"}
    halves = [first(SHAPE).detach() for _ in range(2)]
    prior_halves = [first(SHAPE if batch is None else (batch, 4, 3)).detach() for _ in range(2)]
    if batch is None:
        prior_halves = [half[0] for half in prior_halves]
    moments = torch.cat(halves, dim).requires_grad_()
    along = dim if batch or dim < 0 else dim - 1
    packed = torch.cat(prior_halves, along).requires_grad_()
    z, kl = F.gaussian_sample_kl_packed(moments, dim=dim, prior=packed, eps=torch.ones(SHAPE), **settings)
    halves, prior_halves = ([half.requires_grad_() for half in each] for each in (halves, prior_halves))
    wanted_z, wanted_kl = F.gaussian_sample_kl(*halves, prior=tuple(prior_halves), eps=torch.ones(SHAPE), **settings)
    torch.testing.assert_close((z, kl), (wanted_z, wanted_kl), rtol=0, atol=0)
    found = torch.autograd.grad((z.sum(), kl.sum()), (moments, packed))
    wanted = torch.autograd.grad((wanted_z.sum(), wanted_kl.sum()), (*halves, *prior_halves))
    torch.testing.assert_close(found[0], torch.cat(wanted[:2], dim))
    torch.testing.assert_close(found[1], torch.cat(wanted[2:], along))
    if dim == 1:
        torch.testing.assert_close(F.gaussian_kl(*halves, prior=packed, reduction="none", **settings), kl)


@each_scale
@pytest.mark.parametrize("samples", [None, 1, 3])
def test_samples_and_log_densities_are_those_of_torch(samples, settings) -> None:
    mu, a = first(SHAPE), second(SHAPE, **settings)
    shape = SHAPE if samples is None else (samples, *SHAPE)
    eps = torch.randn(shape, dtype=DOUBLE)
    std = naive_std(a, **settings)
    for log_prob in (True, "detached"):
        z, log_q = F.gaussian_sample(mu, a, eps=eps, samples=samples, log_prob=log_prob, **settings)
        wanted_z = mu + std * eps
        of_torch = Normal(mu, std) if log_prob is True else Normal(mu.detach(), std.detach())
        wanted = of_torch.log_prob(wanted_z).sum((-1, -2))
        torch.testing.assert_close((z, log_q), (wanted_z, wanted), rtol=1e-12, atol=1e-12)
        upstream = torch.randn_like(z), torch.randn_like(log_q)
        torch.testing.assert_close(
            torch.autograd.grad((z, log_q), (mu, a), upstream, retain_graph=True),
            torch.autograd.grad((wanted_z, wanted), (mu, a), upstream, retain_graph=True),
            rtol=1e-10, atol=1e-11,
        )  # fmt: skip
        if log_prob == "detached":
            (gradient,) = torch.autograd.grad(log_q, z, upstream[1])
            torch.testing.assert_close(gradient, -(upstream[1].unsqueeze(-1).unsqueeze(-1) * eps / std).detach())


@each_scale
def test_gradients_of_gradients_of_the_reference(settings) -> None:
    inputs = [first((2, 3)), second((2, 3), **settings), first((3,)), second((1, 3), **settings)]
    eps = torch.randn(2, 2, 3, dtype=DOUBLE)

    def function(log_prob):
        return lambda mu, a, prior_mu, prior_a: F.gaussian_sample_kl(
            mu, a, prior=(prior_mu, prior_a), eps=eps, samples=2, log_prob=log_prob, **settings
        )

    assert torch.autograd.gradgradcheck(function(True), inputs)
    z, _, log_q = function("detached")(*inputs)
    naive = Normal(inputs[0].detach(), naive_std(inputs[1], **settings).detach())
    wanted = naive.log_prob(z).sum(-1)
    weights = torch.randn_like(log_q)
    found, wanted = (
        torch.autograd.grad(
            torch.autograd.grad(value, z, weights, create_graph=True)[0].square().sum(), inputs[:2], retain_graph=True
        )
        for value in (log_q, wanted)
    )
    torch.testing.assert_close(found, wanted)


# -------------------------------------------------------------------------------------------------------- identities


@each_scale
def test_a_posterior_that_is_its_prior_has_no_divergence(settings) -> None:
    mu, a = first(SHAPE), second(SHAPE, **settings)
    kl = F.gaussian_kl(mu, a, prior=(mu, a), reduction="none", **settings)
    assert torch.equal(kl, torch.zeros(5, dtype=DOUBLE))
    gradients = torch.autograd.grad(kl.sum(), (mu, a))
    assert not any(gradient.any() for gradient in gradients)


def test_a_standard_normal_that_is_given_is_none() -> None:
    mu, a = first(SHAPE), second(SHAPE)
    standard = torch.zeros(4, 3, dtype=DOUBLE), torch.zeros(4, 3, dtype=DOUBLE)
    assert torch.equal(F.gaussian_kl(mu, a, prior=standard), F.gaussian_kl(mu, a))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_one_sample_draws_the_noise_of_a_plain_call(layout) -> None:
    mu, a = (torch.randn(3, 4, 5, 2).to(memory_format=layout) for _ in range(2))
    torch.manual_seed(3)
    plain = F.gaussian_sample(mu, a)
    torch.manual_seed(3)
    one = F.gaussian_sample(mu, a, samples=1)
    assert torch.equal(one[0], plain) and one.shape == (1, 3, 4, 5, 2)
    two = F.gaussian_sample(mu, a, samples=2)
    assert two.shape == (2, 3, 4, 5, 2) and not torch.equal(two[0], two[1])


def test_the_log_densities_average_to_minus_the_entropy() -> None:
    mu, a = torch.randn(2, 3, 2, dtype=DOUBLE)
    _, log_q = F.gaussian_sample(mu, a, samples=20000, log_prob=True)
    entropy = Normal(mu, torch.exp(a / 2)).entropy().sum(1)
    # log q is minus the entropy plus a chi-square of 2 degrees of freedom: standard deviation 1.
    assert ((log_q.mean(0) + entropy).abs() < 5 / math.sqrt(20000)).all()


# --------------------------------------------------------------------------------------------------- what is refused


def x(*shape: int) -> Tensor:
    return torch.zeros(shape)


REFUSED = {
    "scale": ({"scale": "sigma"}, ValueError, "scale must be one of logvar, log_std, std, softplus, got 'sigma'"),
    "negative eps": ({"scale_eps": -1e-4}, ValueError, "scale_eps must be finite in float32 and not negative, got -0"),
    "eps is NaN": ({"scale_eps": math.nan}, ValueError, "scale_eps must be finite in float32 and not negative, got na"),
    "eps is text": ({"scale_eps": "1"}, TypeError, "scale_eps must be a number, got str"),
    "clamp": ({"scale_clamp": 20.0}, ValueError, r"scale_clamp must be \(low, high\), got 20.0"),
    "clamp reversed": ({"scale_clamp": (2, 1)}, ValueError, r"low at most high, got \(2, 1\)"),
    "clamp of text": ({"scale_clamp": ("a", 1)}, TypeError, "scale_clamp must be two numbers, got str"),
    "prior of a number": ({"prior": 1.0}, TypeError, "prior must be None, two tensors .*, got float"),
    "three priors": ({"prior": (x(4, 6),) * 3}, TypeError, "prior must be None, two tensors .*, got 3 of them"),
    "shape of a prior": (
        {"prior": (x(4, 6), x(4, 1))},
        ValueError,
        r"prior\[1\] must have shape \[4, 6\], or \[1, 6\] or \[6\] for one prior of all samples, got \[4, 1\]",
    ),
    "packed prior": ({"prior": x(4, 6)}, ValueError, r"prior must have shape \[4, 12\], or \[1, 12\] or \[12\]"),
    "integers": ({"prior": (x(4, 6).int(), x(4, 6))}, TypeError, r"prior\[0\] must be float16, .*, got torch.int32"),
    "samples": ({"samples": 0}, ValueError, "samples must be at least 1, or None .*, got 0"),
    "samples of half": ({"samples": 1.5}, TypeError, "samples must be an integer, got float"),
    "batch_offset": ({"samples": 2, "batch_offset": 0}, ValueError, "samples and batch_offset were both given"),
    "too many": ({"samples": 2**62}, ValueError, r"samples must leave the elements of z below 2\^63"),
    "eps of one": ({"samples": 2, "eps": x(4, 6)}, ValueError, r"shape of z, \[2, 4, 6\], got \[4, 6\]"),
    "log_prob": ({"log_prob": "detach"}, ValueError, "log_prob must be False, True or \"detached\", got 'detach'"),
}


@pytest.mark.parametrize("refused", REFUSED)
def test_what_is_refused(refused) -> None:
    options, error, message = REFUSED[refused]
    mu = x(4, 6)
    calls = [
        lambda: F.gaussian_sample_kl(mu, mu, **options),
        lambda: F.gaussian_sample_kl_packed(x(4, 12), **options),
    ]
    if "prior" not in options:
        calls.append(lambda: F.gaussian_sample(mu, mu, **options))
    if not {"samples", "log_prob"} & set(options):
        calls.append(lambda: F.gaussian_kl(mu, mu, **options))
    for call in calls:
        with launching_nothing(), pytest.raises(error, match=message):
            call()


def test_numbers_of_numpy_and_lists() -> None:
    import numpy as np

    mu, a, eps = torch.randn(3, 4, 6)
    expected = F.gaussian_sample_kl(mu, a, prior=(mu, a), eps=eps, scale_eps=0.5, scale_clamp=(-1.0, 1.0))
    found = F.gaussian_sample_kl(
        mu, a, prior=[mu, a], eps=eps, scale_eps=np.float64(0.5), scale_clamp=[np.float32(-1), 1]
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert F.gaussian_sample(mu, a, samples=np.int64(2)).shape == (2, 4, 6)


@pytest.mark.parametrize("a", [-100.0, -30.0, -1.0, 30.0, 100.0])
@pytest.mark.parametrize("scale", ["logvar", "log_std", "softplus"])
def test_far_scales_stay_numbers(scale, a) -> None:
    """In float32, against the formula in logarithms in float64."""
    mu, raw = torch.tensor([[0.0, 1e-3]]), torch.full((1, 2), a)
    inputs = [t.requires_grad_() for t in (mu, raw, torch.zeros(1, 2), torch.full((1, 2), a + 0.5))]
    kl = F.gaussian_kl(*inputs[:2], prior=tuple(inputs[2:]), scale=scale, reduction="none")
    wide = [t.detach().double().requires_grad_() for t in inputs]
    logarithms = []
    for value in (wide[1], wide[3]):
        of_softplus = torch.where(value < -20, value - value.exp() / 2, torch.log(torch.log1p(value.exp())))
        logarithms.append({"logvar": value, "log_std": 2 * value, "softplus": 2 * of_softplus}[scale])
    difference = logarithms[0] - logarithms[1]
    terms = torch.expm1(difference) - difference + (wide[0] - wide[2]).square() * torch.exp(-logarithms[1])
    exact = terms.sum(1) / 2
    if exact < 1e38:
        torch.testing.assert_close(kl.double(), exact, rtol=2e-4, atol=1e-6)
        gradients = torch.autograd.grad(kl.sum(), inputs)
        for gradient, wanted in zip(gradients, torch.autograd.grad(exact.sum(), wide), strict=True):
            is_number = wanted.abs() < 1e38
            torch.testing.assert_close(gradient.double()[is_number], wanted[is_number], rtol=2e-4, atol=1e-6)
            assert not gradient.isnan().any()
    else:
        assert kl == math.inf


def test_the_hook_of_dreg_sees_the_gradient_of_the_density() -> None:
    """What arrives at z is scaled, the density's part too."""
    mu, a, eps = torch.randn(3, 1, 4, dtype=DOUBLE)
    mu.requires_grad_()
    with fastvae.use_backend("reference"):
        z, log_q = F.gaussian_sample(mu, a, eps=eps.unsqueeze(0), samples=1, log_prob="detached")
    z.register_hook(lambda gradient: 3 * gradient)
    (gradient,) = torch.autograd.grad(log_q.sum() + z.sum(), mu)
    torch.testing.assert_close(gradient, 3 * (1 - eps * torch.exp(-a / 2)))
