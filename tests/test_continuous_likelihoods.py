"""Likelihoods of continuous values, of grey values and of counts: what the contract does not hold them to.

That is: their formulas against independent ones, their settings, which the list of operations has at the defaults only,
and models with them.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import mpmath
import pytest
import torch
from torch import Tensor
from torch.nn.functional import gaussian_nll_loss, l1_loss

import fastvae
import fastvae.functional as F
import test_contract
from bounds import assert_within
from fastvae.evaluation import elbo
from fastvae.export import write_safetensors
from fastvae.likelihoods import (
    ContinuousBernoulli,
    DiscretizedLogistic,
    Gaussian,
    Laplace,
    Likelihood,
    Poisson,
    SigmoidMSE,
    check,
    from_key,
)
from fastvae.likelihoods.checking import exact
from fastvae.models import ConvVAE
from fastvae.operations import Spec, of_likelihood
from fastvae.training import Training, train

VARIANTS = [
    Gaussian(constant=False),
    Gaussian(sigmoid=True),
    Gaussian(min_logvar=-1.0),
    Gaussian(sigmoid=True, min_logvar=0.5),
    Gaussian(std=0.3),
    Gaussian(std=2.0, sigmoid=True, constant=False),
    Laplace(constant=False),
    Laplace(min_log_scale=-1.0),
    Laplace(scale=0.3),
    Laplace(scale=2.0, constant=False),
    DiscretizedLogistic(min_log_scale=-4.0),
    DiscretizedLogistic(bins=2),
    DiscretizedLogistic(bins=32),
    DiscretizedLogistic(bins=65536, min_log_scale=-11.0),
    Poisson(constant=False),
]


def values_and_slopes(likelihood: Likelihood, *tensors: Tensor) -> list[Tensor]:
    """Of each element, fused: the value, and the gradients of the parameters."""
    *parameters, target = (tensor.reshape(-1, 1) for tensor in tensors)
    parameters = [x.detach().requires_grad_() for x in parameters]
    value = F.negative_log_likelihood(tuple(parameters), target, likelihood, reduction="none")
    slopes = torch.autograd.grad(value.sum(), parameters)
    return [result.detach().flatten() for result in (value, *slopes)]


# ------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("likelihood", VARIANTS, ids=str)
def test_terms_of_other_settings_are_their_formulas(likelihood, triton_backend, device) -> None:
    for seed in range(2):
        check(likelihood, device=device, seed=seed)
    assert from_key(likelihood.key) == likelihood
    for operation in of_likelihood(likelihood)[:3]:
        test_contract.check_spec(operation, Spec((3, 5), torch.bfloat16, device=device))


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize("likelihood", VARIANTS, ids=str)
def test_extreme_values_of_other_settings(likelihood, triton_backend, device) -> None:
    names = (*likelihood.parameters, "target")
    extremes = [test_contract.EXTREMES.get(name, test_contract.PARAMETER) for name in names]
    columns = torch.tensor(list(itertools.product(*extremes)), device=device).T[..., None]
    test_contract.check(of_likelihood(likelihood)[0], tuple(columns), reduction="none")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Gaussian(std=0.0), ValueError, "std must be positive and finite, from 1e-18 to 1e18, got 0.0"),
        (lambda: Gaussian(std=-1), ValueError, "std must be positive and finite, from 1e-18 to 1e18, got -1"),
        (lambda: Gaussian(std=math.nan), ValueError, "std must be positive and finite, from 1e-18 to 1e18, got nan"),
        (lambda: Gaussian(std=math.inf), ValueError, "std must be positive and finite, from 1e-18 to 1e18, got inf"),
        (lambda: Gaussian("0.1"), TypeError, "std must be a number, or None where it is learned, got '0.1'"),
        (lambda: Gaussian(True), TypeError, "std must be a number, or None where it is learned, got True"),
        (
            lambda: Gaussian(0.1, min_logvar=-4.0),
            ValueError,
            "min_logvar must be None where the width is given, because nothing is learned, got -4.0",
        ),
        (lambda: Gaussian(min_logvar=True), TypeError, "min_logvar must be a number or None, got True"),
        (lambda: Laplace(min_log_scale=math.nan), ValueError, "min_log_scale must be finite or None, got nan"),
        (lambda: Laplace(0.0), ValueError, "scale must be positive and finite, from 1e-18 to 1e18, got 0.0"),
        (lambda: DiscretizedLogistic(1), ValueError, "bins must be at least 2, got 1"),
        (lambda: DiscretizedLogistic(256.0), TypeError, "bins must be an integer, got 256.0"),
        (lambda: DiscretizedLogistic(True), TypeError, "bins must be an integer, got True"),
        (
            lambda: DiscretizedLogistic(min_log_scale=-math.inf),
            ValueError,
            "min_log_scale must be finite or None, got -inf",
        ),
        (lambda: DiscretizedLogistic(256, "-7"), TypeError, "min_log_scale must be a number or None, got '-7'"),
    ],
)
def test_settings_that_cannot_be(make, error, message) -> None:
    with pytest.raises(error) as raised:
        make()
    assert str(raised.value) == message


def test_what_the_constant_leaves_out() -> None:
    x, t = torch.randn(2, 4, 5, dtype=torch.float64).unbind()
    for whole in (Gaussian(), Gaussian(std=0.2), Laplace(), Laplace(scale=0.2)):
        less = replace(whole, constant=False)
        parameters = (x, 0.3 * x)[: len(whole.parameters)]
        values, others = whole.formula(*parameters, t), less.formula(*parameters, t)
        assert whole.omitted == 0
        torch.testing.assert_close(values, others + less.omitted)


def test_a_gaussian_of_deviation_1_behind_a_sigmoid_is_half_the_squared_error() -> None:
    x, t = torch.randn(4, 5), torch.rand(4, 5)
    half = 0.5 * F.negative_log_likelihood(x, t, SigmoidMSE())
    unit = Gaussian(std=1.0, sigmoid=True, constant=False)
    torch.testing.assert_close(F.negative_log_likelihood(x, t, unit), half)
    assert unit.omitted == SigmoidMSE.omitted


# ------------------------------------------------------------------------------------------------- independent formulas


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_against_torch(backend, device) -> None:
    """Values in float64 of functions that torch has."""
    m, s, t = (torch.randn(64, device=device, generator=torch.Generator(device).manual_seed(i)) for i in range(3))
    wide = [x.double().requires_grad_() for x in (m, s)]
    mean, other, target = (*wide, t.double())
    with fastvae.use_backend(backend):
        for likelihood, expected in (
            (Gaussian(), gaussian_nll_loss(mean, target, other.exp(), full=True, eps=0, reduction="none")),
            (Gaussian(std=0.3), -torch.distributions.Normal(mean, 0.3).log_prob(target)),
            (Gaussian(std=0.3, sigmoid=True), -torch.distributions.Normal(mean.sigmoid(), 0.3).log_prob(target)),
            (Laplace(), -torch.distributions.Laplace(mean, other.exp()).log_prob(target)),
            (Laplace(scale=0.5, constant=False), 2 * l1_loss(mean, target, reduction="none")),
        ):
            count = len(likelihood.parameters)
            results = values_and_slopes(likelihood, *(m, s)[:count], t)
            slopes = torch.autograd.grad(expected.sum(), wide[:count])
            scales = exact(likelihood, (*(m, s)[:count], t))
            for k, (found, wanted) in enumerate(zip(results, (expected.detach(), *slopes), strict=True)):
                roundings = likelihood.roundings[k] + 5
                assert_within(found, wanted, scales.scale(k, roundings), roundings, f"{likelihood}, {k}")


def test_the_slope_of_laplace_at_its_centre_is_0(triton_backend, device) -> None:
    x = torch.tensor([0.25, -3.0], device=device)
    for likelihood in (Laplace(), Laplace(scale=0.5)):
        slopes = values_and_slopes(likelihood, *[x] * len(likelihood.parameters), x)
        assert slopes[1].tolist() == [0.0, 0.0]


LOGITS = [s * x for s in (1, -1) for x in (0.0, 1e-30, 1e-8, 1e-3, 0.1, 0.4999, 0.5, 0.75, 1.4999, 1.5, 1.5001, 2, 5)]
LOGITS += [s * x for s in (1, -1) for x in (16.6, 40.0, 88.0, 104.0, 1e4, 1e18, 1e37)]


def continuous_bernoulli(x: float, t: float) -> tuple[mpmath.mpf, mpmath.mpf]:
    """The value and its slope by x, with 80 digits: log((e^x - 1) / x) - x t, which has no case but x = 0."""
    with mpmath.workdps(80):
        x, t = mpmath.mpf(x), mpmath.mpf(t)
        if x == 0:
            return mpmath.mpf(0), 0.5 - t
        if x > 1000:
            return x * (1 - t) - mpmath.log(x), 1 - t - 1 / x
        return mpmath.log(mpmath.expm1(x) / x) - x * t, 1 / -mpmath.expm1(-x) - 1 / x - t


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy's, of the square of 1e37
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_continuous_bernoulli_over_the_whole_range(backend, device) -> None:
    """Against 80 digits; also where torch's cuts an interval out, and where 1 - y or y rounds to 1."""
    x, t = map(torch.tensor, zip(*itertools.product(LOGITS, (0.0, 1 / 255, 0.25, 0.5, 0.75, 1.0)), strict=True))
    wanted = torch.tensor(
        [[float(n) for n in continuous_bernoulli(*both)] for both in zip(x.tolist(), t.tolist(), strict=True)],
        dtype=torch.float64,
    )
    likelihood = ContinuousBernoulli()
    with fastvae.use_backend(backend):
        results = values_and_slopes(likelihood, x.to(device), t.to(device))
    results[1] = likelihood.slopes(x, t)[0] if backend == "reference" else results[1]
    condition = exact(likelihood, (x, t))
    for k, found in enumerate(results):
        assert_within(found, wanted[:, k], condition.scale(k, likelihood.roundings[k]), likelihood.roundings[k], str(k))
    for k, in_float64 in enumerate(
        (likelihood.formula(x.double(), t.double()), *likelihood.slopes(x.double(), t.double()))
    ):
        assert ((in_float64 - wanted[:, k]).abs() <= 1e-14 * (condition.first[k] + 1e-300)).all()


def test_continuous_bernoulli_is_a_density() -> None:
    """It integrates to 1, and `mean` is its mean."""
    t = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    for x in (-30.0, -3.0, -0.3, 0.0, 1e-3, 0.7, 12.0):
        density = torch.exp(-ContinuousBernoulli().formula(torch.full_like(t, x), t))
        torch.testing.assert_close(density.mean().item(), 1.0, rtol=1e-6, atol=0)
        mean = ContinuousBernoulli().mean(torch.tensor([x], dtype=torch.float64)).item()
        torch.testing.assert_close((t * density).mean().item(), mean, rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------------------ discretised logistic


def discretized_logistic(mean: float, log_scale: float, k: int, bins: int) -> list[float]:
    """The value and its slopes by the mean and by log_scale: differences of sigmoids, with 200 digits."""
    with mpmath.workdps(200):
        half, scale = mpmath.mpf(1) / (bins - 1), mpmath.exp(mpmath.mpf(log_scale))
        d = 2 * k * half - 1 - mpmath.mpf(mean)
        a, b = (d + half) / scale, (d - half) / scale
        if d > 0:  # of the symmetric mass, the side where no digits are lost
            a, b, k, sign = -b, -a, bins - 1 - k, -1
        else:
            sign = 1
        sigmoid_a = mpmath.mpf(1) if k == bins - 1 else 1 / (1 + mpmath.exp(-a))
        sigmoid_b = mpmath.mpf(0) if k == 0 else 1 / (1 + mpmath.exp(-b))
        mass = sigmoid_a - sigmoid_b
        density_a, density_b = sigmoid_a * (1 - sigmoid_a), sigmoid_b * (1 - sigmoid_b)
        by_mean = sign * (density_a - density_b) / (scale * mass)
        return [float(x) for x in (-mpmath.log(mass), by_mean, (a * density_a - b * density_b) / mass)]


MEANS = (-25.0, -1.5, -0.99, -0.3, 0.11, 0.5, 1.0, 3.0)
LOG_SCALES = (-9.0, -7.0, -5.5, -4.9, -3.0, -1.0, 0.5)


@pytest.mark.parametrize("bins", [2, 3, 256, 65536])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_discretized_logistic_is_exact(backend, bins, device) -> None:
    """Narrow and wide scales, the ends, and means so far off that the mass is 0 in float64."""
    likelihood = DiscretizedLogistic(bins)
    # The reference subtracts two sigmoids for the slope by the mean, which is right to 2^-24 / scale only.
    wide = (4.0, 20.0, 90.0) if backend == "triton" else ()
    rows = list(itertools.product(MEANS, LOG_SCALES + wide, sorted({0, 1, bins // 3, bins - 2, bins - 1})))
    mean, log_scale, k = (torch.tensor(column) for column in zip(*rows, strict=True))
    target = (k.double() / (bins - 1)).float()
    each = zip(mean.tolist(), log_scale.tolist(), k.tolist(), strict=True)
    wanted = torch.tensor([discretized_logistic(*row, bins) for row in each], dtype=torch.float64)
    condition = exact(likelihood, (mean, log_scale, target))
    with fastvae.use_backend(backend):
        results = values_and_slopes(likelihood, mean.to(device), log_scale.to(device), target.to(device))
    assert wanted[:, 0].max() > 1e4
    for i, found in enumerate(results):
        roundings = likelihood.roundings[i]
        # What is subnormal in float32 may be 0.
        wanted[:, i] = torch.where(wanted[:, i].abs() < 2.0**-126, found.double().cpu(), wanted[:, i])
        assert_within(found, wanted[:, i], condition.scale(i, roundings), roundings, f"result {i}")


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("bins", [2, 5, 256])
def test_the_masses_of_all_bins_are_1_together(bins, backend, device) -> None:
    """Whether the mean is within, outside, or between two bins; bytes are the bins where they are all there."""
    target = torch.arange(bins, device=device) / (bins - 1)
    for mean, log_scale in itertools.product((-3.0, 0.0, 0.4, 1.0), (-8.0, -3.0, 0.0, 5.0)):
        with fastvae.use_backend(backend):
            given = (torch.full_like(target, mean), torch.full_like(target, log_scale))
            values, *_ = values_and_slopes(DiscretizedLogistic(bins), *given, target)
            # The target is rounded to 2^-24, and the mass moves by 1 / scale times that.
            allowed = 1e-6 + 2.0**-24 * math.exp(-log_scale)
            assert values.double().neg().exp().sum().item() == pytest.approx(1.0, abs=allowed)
            if bins == 256:
                as_bytes = torch.arange(256, device=device, dtype=torch.uint8)
                same, *_ = values_and_slopes(DiscretizedLogistic(), *given, as_bytes)
                torch.testing.assert_close(same, values, rtol=1e-5, atol=4 * allowed)


def of_vdvae(mean: Tensor, log_scale: Tensor, target: Tensor) -> Tensor:
    """openai/vdvae's `discretized_mix_logistic_loss` of one component, in float64, without what it falls back to."""
    centered, inverse = 2 * target - 1 - mean, torch.exp(-log_scale)
    plus, minus = inverse * (centered + 1 / 255), inverse * (centered - 1 / 255)
    mass = torch.log(torch.sigmoid(plus) - torch.sigmoid(minus))
    log_plus, log_minus = plus - torch.nn.functional.softplus(plus), -torch.nn.functional.softplus(minus)
    x = 2 * target - 1
    return -torch.where(x < -0.999, log_plus, torch.where(x > 0.999, log_minus, mass))


def test_against_the_formula_of_vdvae(triton_backend, device) -> None:
    """Where that loses no digits, in float64."""
    likelihood = DiscretizedLogistic()
    tensors = [x.to(device) for x in likelihood.draw((4096,), torch.Generator().manual_seed(0))]
    wide = [x.double().requires_grad_() for x in tensors]
    wanted = of_vdvae(*wide)
    right = wanted < 15  # masses above 3e-7
    assert right.sum() > 3000
    wanted = [wanted, *torch.autograd.grad(torch.where(right, wanted, 0.0).sum(), wide[:2])]
    condition = exact(likelihood, tensors)
    for i, found in enumerate(values_and_slopes(likelihood, *tensors)):
        scale = condition.scale(i, likelihood.roundings[i])[right.cpu()]
        assert_within(found[right], wanted[i].detach()[right], scale, likelihood.roundings[i], f"result {i}")


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(
    ("likelihood", "free"),
    [
        (DiscretizedLogistic(min_log_scale=-4.0), DiscretizedLogistic()),
        (Gaussian(min_logvar=-4.0), Gaussian()),
        (Laplace(min_log_scale=-4.0), Laplace()),
    ],
    ids=str,
)
def test_a_clamped_scale_has_no_gradient_below(likelihood, free, backend, device) -> None:
    log_scale = torch.tensor([-8.0, -4.0, -3.0, math.nan], device=device)
    mean = torch.full_like(log_scale, 0.2)
    with fastvae.use_backend(backend):
        value, _, slope = values_and_slopes(likelihood, mean, log_scale, 0 * mean + 0.5)
        _, _, free = values_and_slopes(free, mean, log_scale, 0 * mean + 0.5)
    assert value[0] == value[1]
    assert slope[0] == 0 and torch.equal(slope[1:3], free[1:3])
    assert value[3].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ends_of_targets_in_half_precision(dtype, triton_backend, device) -> None:
    """The bins beside the ends stay apart from them."""
    target = torch.tensor([0, 1, 254, 255], device=device) / 255
    mean = (2 * target - 1).roll(2)
    values, *_ = values_and_slopes(DiscretizedLogistic(), mean, torch.full_like(mean, -2.0), target.to(dtype))
    expected = DiscretizedLogistic().formula(mean, torch.full_like(mean, -2.0), target)
    torch.testing.assert_close(values, expected, rtol=1e-2, atol=0)


def test_bytes_that_are_no_bins_are_refused() -> None:
    x, target = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.uint8)
    for bins in (2, 4, 16, 52, 256):
        F.negative_log_likelihood((x, x), target, DiscretizedLogistic(bins))
    for bins in (3, 32, 255, 257, 65536):
        with pytest.raises(TypeError, match=rf"target must be floating point for DiscretizedLogistic\(bins={bins},"):
            F.negative_log_likelihood((x, x), target, DiscretizedLogistic(bins))


# -------------------------------------------------------------------------------------------------------------- Poisson


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_poisson_is_right_for_counts_of_any_size(backend, device) -> None:
    """Against mpmath: counts to a million, at rates near them, where the parts cancel, and far off."""
    counts = (0, 1, 2, 5, 6, 7, 30, 255, 1e4, 1e6)
    rows = [
        (math.log(max(t, 0.5)) + offset, t)
        for t, offset in itertools.product(counts, (-20.0, -2.0, -0.3, -1e-3, 0.0, 1e-3, 0.3, 2.0, 20.0))
    ]
    log_rate, target = (torch.tensor(column, dtype=torch.float32) for column in zip(*rows, strict=True))
    with mpmath.workdps(50):
        wanted = [
            (mpmath.exp(x) - t * mpmath.mpf(x) + mpmath.loggamma(t + 1), mpmath.exp(x) - t)
            for x, t in zip(log_rate.tolist(), target.tolist(), strict=True)
        ]
    likelihood = Poisson()
    condition = exact(likelihood, (log_rate, target))
    with fastvae.use_backend(backend):
        results = values_and_slopes(likelihood, log_rate.to(device), target.to(device))
    for i, found in enumerate(results):
        expected = torch.tensor([float(row[i]) for row in wanted], dtype=torch.float64)
        roundings = likelihood.roundings[i]
        assert_within(found, expected, condition.scale(i, roundings), roundings, f"result {i}")
    torch.testing.assert_close(likelihood.mean(log_rate), log_rate.exp())


def test_poisson_trains_on_counts(device) -> None:
    """Bytes are the counts, which a model's encoder takes as fractions."""
    torch.manual_seed(0)
    counts = torch.poisson(4.0 + 40.0 * (some_images(device) > 100)).to(torch.uint8)
    model = ConvVAE((2, 8, 6), latent_dim=3, channels=(8,), likelihood=Poisson()).to(device)
    rows = train(model, counts, counts, Training(epochs=12, batch_size=8, learning_rate=1e-2))
    assert rows[-1].loss < rows[0].loss - 100
    error = model.reconstruct(counts, deterministic=True) - counts
    assert error.square().mean() < counts.float().var()


# --------------------------------------------------------------------------------------------------------------- models

ALL = (Gaussian(), Gaussian(std=0.1), Laplace(), ContinuousBernoulli(), DiscretizedLogistic(min_log_scale=-7.0))


def some_images(device: torch.device) -> Tensor:
    """Bytes of three patterns and some noise."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 2, (3, 2, 8, 6), generator=generator)[torch.arange(32) % 3]
    noise = torch.randint(0, 56, patterns.shape, generator=generator)
    return (patterns * 200 + noise).to(torch.uint8).to(device)


@pytest.mark.parametrize("likelihood", ALL, ids=str)
def test_conv_vae_trains_and_comes_back_from_a_file(likelihood, device, tmp_path) -> None:
    torch.manual_seed(0)
    model, images = (
        ConvVAE((2, 8, 6), latent_dim=3, channels=(8,), likelihood=likelihood).to(device),
        some_images(device),
    )
    rows = train(model, images, images, Training(epochs=12, batch_size=8, learning_rate=1e-2))
    assert rows[-1].loss < rows[0].loss - 1
    assert rows[-1].test_loss < rows[0].test_loss - 1
    bound = elbo(model, images).mean().item()
    assert bound == pytest.approx(-rows[-1].test_loss - 96 * likelihood.omitted, rel=1e-4, abs=1e-2)
    pictures = model.reconstruct(images, deterministic=True)
    assert pictures.shape == images.shape
    assert (pictures - images / 255).square().mean() < (images / 255).var()
    write_safetensors(tmp_path / "model.safetensors", model)
    again = fastvae.load(tmp_path / "model.safetensors")
    assert again.likelihood == likelihood
    torch.testing.assert_close(again.to(device).reconstruct(images, deterministic=True), pictures)


def test_the_parameters_of_conv_vae_are_views_of_one_tensor() -> None:
    model = ConvVAE((2, 8, 6), latent_dim=3, channels=(4,), likelihood=Gaussian())
    mean, logvar = model.decode(torch.randn(5, 3))
    assert mean.shape == logvar.shape == (5, 2, 8, 6)
    assert mean.untyped_storage().data_ptr() == logvar.untyped_storage().data_ptr()
    assert model.decoder.logits.out_channels == 4
    assert isinstance(ConvVAE(likelihood=Gaussian(std=1.0)).decode(torch.randn(5, 16)), Tensor)


def test_numbers_outside_0_and_1_are_targets_of_a_gaussian(recwarn) -> None:
    """Training warns of them where the mean cannot be such a number."""
    images = torch.randn(8, 2, 8, 6)
    for likelihood, warns in ((Gaussian(), False), (Laplace(), False), (Gaussian(sigmoid=True), True)):
        model = ConvVAE((2, 8, 6), latent_dim=3, channels=(4,), likelihood=likelihood)
        recwarn.clear()
        train(model, images, images, Training(epochs=1, batch_size=8))
        assert any("expected 0 to 1" in str(it.message) for it in recwarn) == warns
