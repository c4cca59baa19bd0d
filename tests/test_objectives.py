"""The objectives of the training loop: what each is made of, its gradients, its settings, and that it goes on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fastvae.functional as F
from fastvae.evaluation import Batch, elbo
from fastvae.likelihoods import Gaussian
from fastvae.models import VAE, ConvVAE
from fastvae.priors import MixturePrior, VampPrior
from fastvae.training import Training, read_checkpoint, train, training_step, write_checkpoint
from fastvae.training.checks import check_objective
from fastvae.training.objectives import MMD_WEIGHT, OBJECTIVES, Options
from listening import listener

SHAPE = (1, 8, 6)
ALL = tuple(OBJECTIVES)


def images(count=20):
    return torch.randint(0, 256, (count, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def model_of(prior=None, likelihood=None):
    torch.manual_seed(1)
    options = {} if likelihood is None else {"likelihood": likelihood}
    model = ConvVAE(SHAPE, latent_dim=3, channels=(4, 6), prior=prior, **options)
    with torch.no_grad():  # posteriors that differ from the prior
        model.encoder.moments.bias.normal_()
    return model


def losses(model, objective, x, *, target=None, seed=0, **options):
    """The values, and the gradient of each parameter by name."""
    torch.manual_seed(seed)
    values, roots, gradients = OBJECTIVES[objective](
        model, Batch(x, x if target is None else target), Options(**options)
    )
    model.zero_grad()
    torch.autograd.backward(roots, gradients)
    return values, {name: it.grad.clone() for name, it in model.named_parameters() if it.grad is not None}


def log_normal(z, mu, logvar):
    return torch.distributions.Normal(mu, torch.exp(logvar / 2)).log_prob(z).flatten(1).sum(1)


def log_standard(z):
    return log_normal(z, torch.zeros_like(z), torch.zeros_like(z))


@pytest.mark.parametrize("objective", ["iwae", "dreg"])
@pytest.mark.parametrize("prior", [None, "mixture", "vamp"])
def test_one_sample_is_the_lower_bound_of_that_sample(objective, prior):
    prior = {"mixture": MixturePrior(3, 4), "vamp": VampPrior(SHAPE, 4)}.get(prior)
    model, x = model_of(prior), images(6) / 255
    values, _ = losses(model, objective, x, samples=1)
    torch.manual_seed(0)
    mu, logvar = model.posterior(x)
    z = F.gaussian_sample(mu, logvar)
    log_p = log_standard(z) if prior is None else prior.log_prob(z)
    kl = (log_normal(z, mu, logvar) - log_p).mean()
    reconstruction = 0.5 * F.sigmoid_mse_loss(model.decode(z), x)
    # Sums of 48 and a few terms in float32, in another order.
    torch.testing.assert_close(values.reconstruction, reconstruction.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(values.kl, kl.detach(), rtol=0, atol=2e-5)
    torch.testing.assert_close(values.loss, (reconstruction + kl).detach(), rtol=1e-5, atol=0)


def test_several_samples_are_of_one_target(count=3):
    """Also where a parameter is one for all, and there are several."""

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.mean, self.logvar = nn.Linear(2, 5), nn.Parameter(torch.zeros(5))

        def forward(self, z):
            return self.mean(z), self.logvar

    model, x = VAE(nn.Linear(5, 4), Decoder(), 2, Gaussian()), torch.randn(6, 5)
    values, gradients = losses(model, "iwae", x, samples=count)
    torch.manual_seed(0)
    mu, logvar = model.posterior(x)
    z = F.gaussian_sample(mu, logvar, samples=count)
    mean = model.decoder.mean(z)
    log_x = torch.distributions.Normal(mean, torch.exp(model.decoder.logvar / 2)).log_prob(x).sum(2)
    log_z = torch.stack([log_standard(it) - log_normal(it, mu, logvar) for it in z])
    bound = (log_x + log_z).logsumexp(0) - math.log(count)
    expected = dict(zip(gradients, torch.autograd.grad(-bound.mean(), model.parameters()), strict=True))
    torch.testing.assert_close(values.loss, -bound.mean().detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-5)


def test_dreg_changes_the_encoders_gradient_alone():
    model, x = model_of(MixturePrior(3, 4)), images(6) / 255
    (plain, of_plain), (doubly, of_doubly) = (losses(model, it, x, samples=4) for it in ("iwae", "dreg"))
    assert plain == doubly
    for name, gradient in of_plain.items():
        same = torch.equal(gradient, of_doubly[name]) or torch.allclose(gradient, of_doubly[name], rtol=1e-5, atol=1e-7)
        assert same is not name.startswith("encoder."), name


def test_beta_tc_is_the_sum_of_its_parts():
    model, x = model_of(), images(6) / 255
    torch.manual_seed(0)
    mu, logvar = model.posterior(x)
    z = F.gaussian_sample(mu, logvar)
    parts = F.total_correlation(z, mu, logvar, 20, "stratified")
    reconstruction = 0.5 * F.sigmoid_mse_loss(model.decode(z), x)
    loss = reconstruction + parts[0] + 4 * parts[1] + parts[2]
    values, _ = losses(model, "beta-tc", x, beta=4.0, dataset_size=20)
    torch.testing.assert_close(values.loss, loss.detach())
    # The parts add up to the estimate of the divergence.
    kl = (log_normal(z, mu, logvar) - log_standard(z)).mean()
    torch.testing.assert_close(values.kl, kl.detach(), rtol=1e-4, atol=1e-4)


def test_mmd_is_the_reconstruction_and_the_discrepancy():
    model, x = model_of(), images(6) / 255
    torch.manual_seed(0)
    z, kl = model.sample_kl(model.encode(x))
    loss = 0.5 * F.sigmoid_mse_loss(model.decode(z), x)
    loss = loss + 2 * MMD_WEIGHT * F.maximum_mean_discrepancy(z, torch.randn(6, 3))
    values, _ = losses(model, "mmd", x, beta=2.0)
    torch.testing.assert_close(values.loss, loss.detach())
    torch.testing.assert_close(values.kl, kl.mean().detach())


@pytest.mark.parametrize("objective", ALL)
def test_latents_that_are_images_bytes_and_another_precision(objective):
    encoder = nn.Conv2d(1, 4, 3, padding=1)
    model = VAE(encoder, nn.Conv2d(2, 1, 3, padding=1), (2, 8, 6), prior=None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for dtype in (None, torch.bfloat16):
        values = training_step(
            model, optimizer, images(4), objective=objective, samples=2, dataset_size=20, autocast_dtype=dtype
        )
        assert all(it.dtype is torch.float32 and it.ndim == 0 and it.isfinite() for it in values)
        assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("objective", ALL)
def test_training_goes_on_where_it_stopped(objective, tmp_path):
    beta = 1.0 if objective in ("iwae", "dreg") else 2.0
    samples = 2 if objective in ("iwae", "dreg") else None
    data = images(21)
    settings = Training(
        epochs=2, batch_size=4, learning_rate=1e-2, graph="off", objective=objective, beta=beta, samples=samples
    )

    def run(path, stop_after=None, resume=None):
        model = model_of() if resume is None else resume.model
        asked = []

        def should_stop():
            asked.append(None)
            return len(asked) == stop_after

        def keep(state):
            write_checkpoint(path, model, state.epoch, state, {})

        told = [listener(should_stop=should_stop, state=keep)]
        state = None if resume is None else resume.state
        rows = train(model, data, data[:7], settings, listeners=told, resume=state)
        return rows, read_checkpoint(path)

    rows, whole = run(tmp_path / "whole.pt")
    _, stopped = run(tmp_path / "parts.pt", stop_after=7)
    rows_on, went_on = run(tmp_path / "parts.pt", resume=stopped)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, went_on.model.state_dict()[name]), name
    assert [row._replace(seconds=0) for row in rows] == [row._replace(seconds=0) for row in rows_on]
    assert all(math.isfinite(number) for row in rows for number in row)


def test_the_test_loss_is_that_of_the_objective():
    data = images(21)
    model = model_of()
    torch.manual_seed(0)
    rows = train(model, data, data[:7], Training(epochs=1, batch_size=4, graph="off", objective="iwae", samples=64))
    omitted = model.likelihood.omitted * data[0].numel()
    bounds = torch.stack([elbo(model, data[:7], seed=seed).mean() + omitted for seed in range(20)])
    assert rows[-1].test_loss < -bounds.mean()  # the bound of 64 samples is the tighter one
    assert rows[-1].loss < rows[-1].reconstruction + rows[-1].kl


def test_settings_that_mean_nothing_are_refused():
    for wrong, words in (
        ({"objective": "vae"}, "objective must be one of elbo, beta-tc, mmd, iwae, dreg, got 'vae'"),
        ({"samples": 4}, "samples must be left out for the objective elbo, which has one, got 4"),
        ({"objective": "iwae", "beta": 2.0}, "beta must be 1 and kl_warmup 0 for the objective iwae"),
        ({"objective": "dreg", "kl_warmup": 1}, "beta must be 1 and kl_warmup 0 for the objective dreg"),
        ({"objective": "mmd", "free_bits": 0.1}, "free_bits must be 0 for the objective mmd, got 0.1"),
        ({"objective": "iwae", "samples": 0}, "samples must be a positive integer, got 0"),
    ):
        with pytest.raises(ValueError, match=words):
            Training(**wrong)
    data = images()
    for objective in ("beta-tc", "mmd"):
        with pytest.raises(ValueError, match=f"because {objective} trains none"):
            train(model_of(MixturePrior(3, 2)), data, data, Training(objective=objective, batch_size=4))
        with pytest.raises(ValueError, match="batch_size must be at least 2"):
            train(model_of(), data, data, Training(objective=objective, batch_size=1))
    with pytest.raises(ValueError, match="free_bits must be 0 where the model has a prior of its own"):
        train(model_of(MixturePrior(3, 2)), data, data, Training(free_bits=0.1, batch_size=4))
    model = model_of()
    with pytest.raises(ValueError, match="objective must be one of"):
        training_step(model, torch.optim.SGD(model.parameters(), lr=0.0), data[:4], objective="vae")


def test_processes_that_train_together_have_the_elbo():
    check_objective(Training(), model_of(), 20, 4, together=True)
    with pytest.raises(ValueError, match='got "mmd", which is of a whole batch'):
        check_objective(Training(objective="mmd"), model_of(), 20, 4, together=True)
    with pytest.raises(ValueError, match='objective must be "elbo" where several processes train, got "dreg"'):
        check_objective(Training(objective="dreg"), model_of(), 20, 4, together=True)
    with pytest.raises(ValueError, match="beta-tc needs the number of training samples"):
        check_objective(Training(objective="beta-tc"), model_of(), None, 4, together=False)
