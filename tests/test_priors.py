"""Priors of a model's own: their densities, their gradients, and their way through training and files."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import fastvae
from fastvae.evaluation import elbo, evaluate, log_likelihood
from fastvae.export import Decoder, Encoder, write_program, write_safetensors
from fastvae.models import VAE, ConvVAE, TabularVAE
from fastvae.priors import MixturePrior, Prior, VampPrior
from fastvae.training import MovingAverage, Training, read_checkpoint, train, write_checkpoint
from listening import listener

SHAPE = (1, 8, 6)


def images(count=20):
    return torch.randint(0, 256, (count, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def prior_of(name):
    return MixturePrior(3, 5) if name == "mixture" else VampPrior(SHAPE, 4, data=images() / 255)


def model_of(name, device="cpu"):
    torch.manual_seed(1)
    return ConvVAE(SHAPE, latent_dim=3, channels=(4, 6), prior=prior_of(name)).to(device)


def standard(latent_shape):
    """A mixture of one component, N(0, I)."""
    prior = MixturePrior(latent_shape, 1)
    with torch.no_grad():
        prior.mu.zero_()
    return prior


def normal_log_prob(z, mu, logvar):
    return torch.distributions.Normal(mu, torch.exp(logvar / 2)).log_prob(z)


@pytest.mark.parametrize("latent_shape", [(3,), (2, 4, 5)])
def test_one_standard_component_is_the_standard_prior(latent_shape):
    z = torch.randn(2, 6, *latent_shape, dtype=torch.float64)
    expected = -0.5 * (z.square() + math.log(2 * math.pi)).flatten(2).sum(2)
    torch.testing.assert_close(standard(latent_shape).log_prob(z), expected)
    model = VAE(nn.Identity(), nn.Identity(), latent_shape)
    torch.testing.assert_close(model.log_prior(z), expected)


def test_a_mixture_is_the_sum_of_its_weighted_components():
    prior = MixturePrior((2, 3), 4)
    with torch.no_grad():
        prior.logits.copy_(torch.tensor([0.0, 1.0, -2.0, 0.5]))
        prior.logvar.normal_()
    z = torch.randn(5, 2, 3)
    each = normal_log_prob(z.view(5, 1, 6).double(), prior.mu.double(), prior.logvar.double()).sum(2)
    expected = (each + prior.logits.double().log_softmax(0)).logsumexp(1)
    # Values of about -20 and 6 terms in float32.
    torch.testing.assert_close(prior.log_prob(z).double(), expected, rtol=0, atol=2e-5)


def test_samples_of_a_mixture_have_its_moments():
    prior = MixturePrior(2, 3)
    with torch.no_grad():
        prior.mu.copy_(torch.tensor([[-4.0, 0.0], [4.0, 1.0], [90.0, 90.0]]))
        prior.logvar.copy_(torch.tensor([[-2.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
        prior.logits.copy_(torch.tensor([0.25, 0.75, 0.0]).log())  # the third has weight 0
    z = prior.sample(20000, torch.Generator().manual_seed(0))
    weights = torch.tensor([0.25, 0.75])
    mean = weights @ prior.mu[:2]
    variance = weights @ (prior.logvar[:2].exp() + (prior.mu[:2] - mean).square())
    # Six deviations of a mean; a variance's is at most sqrt((kurtosis - 1) / n) of it, with kurtosis below 4.
    assert ((z.mean(0) - mean).abs() < 6 * (variance / len(z)).sqrt()).all()
    assert ((z.var(0) / variance - 1).abs() < 6 * math.sqrt(3 / len(z))).all()
    assert torch.equal(z[:3], prior.sample(20000, torch.Generator().manual_seed(0))[:3])
    assert prior.sample(0).shape == (0, 2) and not z.requires_grad


def test_the_divergence_is_the_difference_of_log_densities():
    model = model_of("vamp")
    x = images(6) / 255
    _, z, kl = model(x)
    mu, logvar = model.posterior(x)
    of_inputs = [part.flatten(1) for part in model.posterior(model.prior.pseudo_inputs.clamp(0, 1))]
    log_p = normal_log_prob(z[:, None], *(part[None] for part in of_inputs)).sum(2).logsumexp(1) - math.log(4)
    # log q comes from the noise, and from z here; values of about -3.
    torch.testing.assert_close(kl, normal_log_prob(z, mu, logvar).sum(1) - log_p, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="free_bits must be 0"):
        model(x, free_bits=0.1)


def test_the_vamp_prior_trains_the_encoder_and_its_inputs():
    model = model_of("vamp")
    z = torch.randn(7, 3)
    model.log_prior(z).sum().backward()
    assert model.prior.pseudo_inputs.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())
    assert all(parameter.grad is None for parameter in model.decoder.parameters())


def test_pseudo_inputs_begin_in_the_range_of_the_data():
    data = images()
    prior = VampPrior(SHAPE, 30, data=data / 255)
    rows = (data / 255).flatten(1)
    assert all((row == rows).all(1).any() for row in prior.pseudo_inputs.flatten(1))
    noise = VampPrior(SHAPE, 4).pseudo_inputs
    assert noise.min() >= 0 and noise.max() <= 1
    model = ConvVAE(SHAPE, latent_dim=3, channels=(4,), prior=VampPrior(SHAPE, 4))
    before = model.prior.components()[0]
    with torch.no_grad():
        model.prior.pseudo_inputs.copy_(model.prior.pseudo_inputs.round() * 100)
        outside = model.prior.components()[0]
        model.prior.pseudo_inputs.clamp_(0, 1)
    assert torch.equal(outside, model.prior.components()[0]) and not torch.equal(outside, before)
    # Numbers without bounds are not cut off.
    free = TabularVAE(5, latent_dim=2, prior=VampPrior(5, 4, bounds=None))
    assert free.prior.pseudo_inputs.abs().max() > 1
    mu = free.posterior(free.prior.pseudo_inputs)[0]
    assert torch.equal(mu, free.prior.components()[0])


@pytest.mark.parametrize("name", ["mixture", "vamp"])
def test_weights_stand_once_in_a_state_dict(name):
    model = model_of(name)
    own = {key for key in model.state_dict() if key.startswith("prior.")}
    assert own == ({"prior.pseudo_inputs"} if name == "vamp" else {"prior.mu", "prior.logvar", "prior.logits"})
    twin = copy.deepcopy(model)
    if name == "vamp":  # a copy uses its own encoder
        with torch.no_grad():
            twin.encoder.moments.bias += 1
        assert not torch.equal(twin.prior.components()[0], model.prior.components()[0])


@pytest.mark.parametrize("name", ["mixture", "vamp"])
def test_a_file_keeps_the_prior(name, tmp_path):
    pytest.importorskip("safetensors")
    model, data = model_of(name).eval(), images()
    with torch.no_grad():
        for parameter in model.prior.parameters():  # other than those that are drawn
            parameter.add_(0.1)
    write_checkpoint(tmp_path / "checkpoint.pt", model, 1)
    write_safetensors(tmp_path / "model.safetensors", model)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        read = fastvae.load(path)
        assert evaluate(read, data) == evaluate(model, data)
        generators = [torch.Generator().manual_seed(3) for _ in range(2)]
        assert torch.equal(read.sample(4, generators[0]), model.sample(4, generators[1]))
    # The halves have no use for it.
    encoder, decoder = Encoder(model), Decoder(model)
    assert not any("prior" in key for half in (encoder, decoder) for key in half.state_dict())
    assert write_program(tmp_path / "decoder.pt2", decoder) < 1e-5


def test_a_table_and_a_class_of_ones_own_keep_it_too(tmp_path):
    table = TabularVAE(5, latent_dim=2, hidden=(6,), prior=VampPrior(5, 3, bounds=None)).eval()
    write_checkpoint(tmp_path / "table.pt", table, 1)
    z = torch.randn(4, 2)
    torch.testing.assert_close(fastvae.load(tmp_path / "table.pt").log_prior(z), table.log_prior(z), rtol=0, atol=0)
    own = VAE(nn.Linear(5, 4), nn.Linear(2, 5), 2, prior=MixturePrior(2, 3))
    write_checkpoint(tmp_path / "own.pt", own, 1)
    other = VAE(nn.Linear(5, 4), nn.Linear(2, 5), 2, prior=MixturePrior(2, 3))
    torch.testing.assert_close(fastvae.load(tmp_path / "own.pt", other).log_prior(z), own.log_prior(z), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["mixture", "vamp"])
def test_training_goes_on_where_it_stopped(name, tmp_path):
    data, settings = images(), Training(epochs=2, batch_size=4, learning_rate=1e-2, graph="off")

    def run(path, stop_after=None, resume=None):
        model = model_of(name) if resume is None else resume.model
        average = MovingAverage(model, 0.9)
        asked = []

        def should_stop():
            asked.append(None)
            return len(asked) == stop_after

        told = [
            listener(
                should_stop=should_stop,
                state=lambda state: write_checkpoint(path, model, state.epoch, state, {}),
            )
        ]
        state = None if resume is None else resume.state
        train(model, data, data[:7], settings, average=average, listeners=told, resume=state)
        return read_checkpoint(path)

    whole = run(tmp_path / "whole.pt")
    stopped = run(tmp_path / "parts.pt", stop_after=7)
    went_on = run(tmp_path / "parts.pt", resume=stopped)
    for first, second in ((whole.model, went_on.model), (whole.average, went_on.average)):
        for key, value in first.state_dict().items():
            assert torch.equal(value, second.state_dict()[key]), key
    began = model_of(name)
    assert all(
        not torch.equal(p, q) for p, q in zip(began.prior.parameters(), whole.model.prior.parameters(), strict=True)
    )


def test_the_bound_of_several_samples_has_the_models_prior():
    model, data = ConvVAE(SHAPE, latent_dim=3, channels=(4,), prior=standard(3)), images(6)
    same = ConvVAE(SHAPE, latent_dim=3, channels=(4,))
    same.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(log_likelihood(model, data, samples=5), log_likelihood(same, data, samples=5))
    # One sample of the bound has an estimated divergence, of the same noise as the closed one: right on average.
    closed, estimated = (torch.stack([elbo(it, data, seed=seed) for seed in range(50)]).mean(1) for it in (same, model))
    difference = estimated - closed
    assert difference.mean().abs() < 5 * difference.std() / math.sqrt(len(difference)) and difference.std() > 0


class Laplace(Prior):
    """One of one's own."""

    def log_prob(self, z):
        return torch.distributions.Laplace(0.0, 1.0).log_prob(z).sum(-1)

    def sample(self, n, generator=None):
        return torch.distributions.Laplace(0.0, 1.0).sample((n, 2))


def test_a_prior_of_ones_own():
    model = VAE(nn.Linear(5, 4), nn.Linear(2, 5), 2, prior=Laplace())
    rows = train(model, torch.rand(8, 5), torch.rand(4, 5), Training(epochs=1, batch_size=4))
    assert math.isfinite(rows[-1].test_loss) and model.sample(3).shape == (3, 5)


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"prior must be a fastvae\.priors\.Prior or None, got 'vamp'"):
        VAE(nn.Identity(), nn.Identity(), 2, prior="vamp")
    with pytest.raises(ValueError, match=r"prior must be of latents \(3,\), got a MixturePrior of \(2,\)"):
        ConvVAE(SHAPE, latent_dim=3, prior=MixturePrior(2))
    with pytest.raises(ValueError, match="the name mixture or vamp, got 'flow'"):
        ConvVAE(SHAPE, latent_dim=3, prior={"name": "flow"})
    vamp = VampPrior(SHAPE, 2)
    with pytest.raises(ValueError, match="a VampPrior uses the encoder of a model"):
        vamp.log_prob(torch.zeros(1, 3))
    ConvVAE(SHAPE, latent_dim=3, prior=vamp)
    with pytest.raises(ValueError, match="another model's encoder"):
        ConvVAE(SHAPE, latent_dim=3, prior=vamp)
    with pytest.raises(ValueError, match=r"z must have shape \[\.\.\., 3\], got \[4, 2\]"):
        vamp.log_prob(torch.zeros(4, 2))
    with pytest.raises(TypeError, match="data must be floating point"):
        VampPrior(SHAPE, 2, data=images())
    with pytest.raises(ValueError, match=r"data must have shape \[M, 1, 8, 6\], got \[3, 5\]"):
        VampPrior(SHAPE, 2, data=torch.rand(3, 5))
    with pytest.raises(ValueError, match="bounds must be two numbers"):
        VampPrior(SHAPE, 2, bounds=(1.0, 0.0))
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="components must be a positive integer"):
            MixturePrior(3, wrong)
    with pytest.raises(ValueError, match="latent_shape must be a positive integer"):
        MixturePrior((3, 0))
