"""Bounds of log p(x): against models whose log p(x) is known, exactly or by quadrature."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal

import fastvae
import fastvae.functional as F
from fastvae.evaluation import batches, bits_per_dimension, elbo, evaluate, log_likelihood
from fastvae.models import VAE, ConvVAE

SHAPE = (2, 3, 2)
PIXELS = 12


@pytest.fixture(autouse=True)
def exact():
    """Plain PyTorch in full float32, to compare with plain PyTorch in float64."""
    with fastvae.use_backend("reference"):
        yield


class Fixed(nn.Module):
    """An encoder that gives every image the same moments."""

    def __init__(self, *moments: float) -> None:
        super().__init__()
        self.moments = nn.Parameter(torch.tensor(moments))

    def forward(self, x):
        return self.moments.expand(len(x), -1)


def linear_decoder(latent_dim: int, scale: float) -> nn.Module:
    torch.manual_seed(5)
    linear = nn.Linear(latent_dim, PIXELS)
    with torch.no_grad():
        linear.weight.normal_().mul_(scale)
    return nn.Sequential(linear, nn.Unflatten(1, SHAPE))


def some_images(device, count: int = 6) -> torch.Tensor:
    return torch.randint(0, 256, (count, *SHAPE), dtype=torch.uint8, device=device)


def log_density(model: VAE, z: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """log N(x; sigmoid(decoder(z)), 1) of pairs, by torch.distributions in float64."""
    means = torch.sigmoid(model.decoder(z).double())
    return Independent(Normal(means, 1.0), 3).log_prob(images.double() / 255)


def by_quadrature(model: VAE, images: torch.Tensor) -> torch.Tensor:
    """log p(x) of a model with one latent, by the trapezoidal rule: exact for a smooth integrand that decays."""
    z = torch.linspace(-9.0, 9.0, 1801, device=images.device)
    prior = Normal(0.0, 1.0).log_prob(z.double()).to(images.device)
    return torch.stack(
        [
            torch.logsumexp(log_density(model, z[:, None], x.expand(len(z), *SHAPE)) + prior, 0) + math.log(0.01)
            for x in images
        ]
    )


@torch.no_grad()
@pytest.mark.parametrize("moments", [(0.5, -0.4), (-0.3, 0.6)], ids=str)
def test_against_quadrature(moments, device):
    """Within 5 standard errors of the weights' mean, of a posterior that is not the true one; and they are small."""
    model = VAE(Fixed(*moments), linear_decoder(1, 3.0), 1).to(device)
    images = some_images(device)
    samples = 500
    exact = by_quadrature(model, images)
    z = moments[0] + math.exp(moments[1] / 2) * torch.randn(20_000, 1, device=device)
    posterior = Normal(moments[0], math.exp(moments[1] / 2))
    ratio = (Normal(0.0, 1.0).log_prob(z.double()) - posterior.log_prob(z.double())).squeeze(1)
    found = log_likelihood(model, images, samples=samples)
    assert found.dtype is torch.float64 and found.shape == (len(images),)
    for x, estimate, truth in zip(images, found, exact, strict=True):
        weights = torch.exp(log_density(model, z, x.expand(len(z), *SHAPE)) + ratio - truth)
        error = weights.std() / math.sqrt(samples)
        assert error < 0.1
        assert abs(estimate - truth) < 5 * error


@torch.no_grad()
def test_a_decoder_without_latents_is_exact(device):
    """Then the true posterior is the prior: with it every weight is p(x), and a single sample will do."""
    model = VAE(Fixed(0.0, 0.0, 0.0, 0.0), linear_decoder(2, 0.0), 2).to(device)
    images = some_images(device)
    exact = log_density(model, torch.zeros(len(images), 2, device=device), images)
    for samples in (1, 7):
        torch.testing.assert_close(log_likelihood(model, images, samples=samples), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(elbo(model, images), exact, rtol=1e-6, atol=0)
    assert exact.max() < -PIXELS / 2 * math.log(2 * math.pi)  # the constant is in it


@torch.no_grad()
def test_one_sample_is_a_weight(device):
    """S = 1: log p(x|z) + log p(z) - log q(z|x) of the first draw, by torch.distributions."""
    torch.manual_seed(1)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 6))
    model = VAE(encoder, linear_decoder(3, 1.0), 3).to(device)
    images = some_images(device)
    mu, logvar = (half.contiguous() for half in model.encode(images).chunk(2, 1))
    z = F.gaussian_sample(mu, logvar, generator=torch.Generator(device).manual_seed(4), batch_offset=0)
    posterior = Independent(Normal(mu.double(), torch.exp(0.5 * logvar.double())), 1)
    prior = Independent(Normal(torch.zeros_like(mu).double(), 1.0), 1)
    expected = log_density(model, z, images) + prior.log_prob(z.double()) - posterior.log_prob(z.double())
    torch.testing.assert_close(log_likelihood(model, images, samples=1, seed=4), expected, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_latents_that_are_images(device):
    """With the same numbers as the model of vectors, whose z they are in another shape."""
    torch.manual_seed(1)
    linear, decoder = nn.Linear(PIXELS, 8), linear_decoder(4, 1.0)
    vector = VAE(nn.Sequential(nn.Flatten(), linear), decoder, 4).to(device)
    image = VAE(
        nn.Sequential(nn.Flatten(), linear, nn.Unflatten(1, (4, 2, 1))), nn.Sequential(nn.Flatten(), decoder), (2, 2, 1)
    ).to(device)
    images = some_images(device)
    torch.testing.assert_close(
        log_likelihood(image, images, samples=3), log_likelihood(vector, images, samples=3), rtol=1e-6, atol=0
    )


def test_it_grows_with_the_samples(device):
    """From the lower bound towards log p(x), on average over images and with a posterior that is far off."""
    model = VAE(Fixed(0.8, 0.5), linear_decoder(1, 3.0), 1).to(device)
    images = some_images(device, 300)
    bound = elbo(model, images).mean()
    means = [log_likelihood(model, images, samples=samples).mean() for samples in (1, 8, 64)]
    assert abs(means[0] - bound) < 0.1
    assert means[0] + 0.1 < means[1] and means[1] + 0.01 < means[2]
    assert abs(means[2] - by_quadrature(model, images[:50]).mean()) < abs(bound - by_quadrature(model, images).mean())


def test_either_backend(device, triton_backend):
    """The fused operations draw the same noise, see `gaussian_sample`."""
    model = ConvVAE(SHAPE, latent_dim=3, channels=(4,)).to(device)
    images = some_images(device)
    fused = log_likelihood(model, images, samples=3)
    with fastvae.use_backend("reference"):
        torch.testing.assert_close(log_likelihood(model, images, samples=3), fused, rtol=1e-5, atol=0)


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_batching_does_not_show(device, batch, monkeypatch):
    """Images in batches with a remainder, samples in chunks with one."""
    model = ConvVAE(SHAPE, latent_dim=3, channels=(4,)).to(device)
    images = some_images(device, 10)
    whole = log_likelihood(model, images, samples=9)
    assert len(whole.unique()) == 10
    monkeypatch.setattr(batches, "_PIXELS", batch * SHAPE[1] * SHAPE[2])
    torch.testing.assert_close(log_likelihood(model, images, samples=9), whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(log_likelihood(model, images[:4], samples=9), whole[:4], rtol=1e-6, atol=0)


def test_the_decoder_never_sees_more_than_a_batch(device, monkeypatch):
    model = ConvVAE(SHAPE, latent_dim=3, channels=(4,)).to(device)
    seen = []
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda z: (seen.append(len(z)), decode(z))[1])
    monkeypatch.setattr(batches, "_PIXELS", 8 * SHAPE[1] * SHAPE[2])
    log_likelihood(model, some_images(device, 11), samples=5)
    assert max(seen) <= 8 and sum(seen) == 55


def test_the_same_noise_each_time_and_none_of_training(device):
    model = ConvVAE(SHAPE, latent_dim=3, channels=(4,)).to(device)
    images = some_images(device)

    def states():
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]

    before = states()
    for measure in (
        lambda seed: log_likelihood(model, images, samples=3, seed=seed),
        lambda s: elbo(model, images, seed=s),
    ):
        assert torch.equal(measure(0), measure(0))
        assert not torch.equal(measure(0), measure(1))
        assert not measure(0).requires_grad
    assert all(torch.equal(*pair) for pair in zip(before, states(), strict=True))


def test_elbo_is_the_test_loss(device):
    """More images than a batch; floats as well as bytes."""
    model = ConvVAE(SHAPE, latent_dim=3, channels=(4,)).to(device)
    images = some_images(device, 700)
    bounds = elbo(model, images)
    loss = evaluate(model, images).loss
    assert bounds.mean().item() == pytest.approx(-loss - PIXELS / 2 * math.log(2 * math.pi), rel=1e-6)
    torch.testing.assert_close(elbo(model, images.float() / 255), bounds, rtol=1e-5, atol=0)


def test_bits():
    """-log p of a density of 1/2 for each of 3 values is a bit each."""
    assert bits_per_dimension(3 * math.log(0.5), 3) == pytest.approx(1.0)


@pytest.mark.parametrize("samples", [0, -1, 2.0, True])
def test_samples_must_be_positive(samples, device):
    with pytest.raises(ValueError, match=f"samples must be a positive integer, got {samples}"):
        log_likelihood(ConvVAE(SHAPE, 2, (4,)).to(device), some_images(device), samples=samples)


@pytest.mark.parametrize("measure", [elbo, log_likelihood])
def test_no_images_is_an_error(measure, device):
    with pytest.raises(ValueError, match=r"images must hold at least one image, got shape \[0, 2, 3, 2\]"):
        measure(ConvVAE(SHAPE, 2, (4,)).to(device), some_images(device, 0))
