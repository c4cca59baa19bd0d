"""What is measured on test images, against the same numbers computed directly."""

from __future__ import annotations

import pytest
import torch

import fastvae
from fastvae.evaluation import elbo, evaluate, log_likelihood, posteriors, reconstruction_errors
from fastvae.evaluation.batches import batch_size
from fastvae.models import VAE, ConvVAE

SHAPE = (3, 7, 5)
COUNT = 700  # more than one batch, and no multiple of it


@pytest.fixture(autouse=True)
def exact():
    """Plain PyTorch in full float32, to compare with plain PyTorch in full float32."""
    with fastvae.use_backend("reference"):
        yield


@pytest.fixture
def model(device) -> ConvVAE:
    return ConvVAE(SHAPE, latent_dim=3, channels=(4, 6)).to(device)


@pytest.fixture
def images(device) -> torch.Tensor:
    return torch.randint(0, 256, (COUNT, *SHAPE), dtype=torch.uint8, device=device)


def fix_posterior(model: ConvVAE, logvar: float) -> None:
    with torch.no_grad():
        model.encoder.moments.weight[model.latent_dim :] = 0.0
        model.encoder.moments.bias[model.latent_dim :] = logvar


def squared_errors(model: ConvVAE, images: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """[N], summed over the pixels, in float64."""
    return (model.decode(z).sigmoid().double() - images.double() / 255).square().sum((1, 2, 3))


@torch.no_grad()
def test_evaluate(model, images):
    """With a posterior of next to no variance a sample is its mean, and everything is known."""
    fix_posterior(model, -40.0)
    mu = model.encode(images)[:, :3]
    kl = 0.5 * (mu.double().square() + 40.0 - 1.0).sum(1)
    error = squared_errors(model, images, mu)
    for beta in (1.0, 0.25):
        result = evaluate(model, images, beta=beta)
        assert result.loss == pytest.approx((0.5 * error + beta * kl).mean().item(), rel=1e-5)
        assert result.mse == pytest.approx(error.mean().item() / 105, rel=1e-5)


def test_loss_is_sampled_and_mse_is_not(model, images):
    fix_posterior(model, -40.0)
    before = evaluate(model, images, beta=0.0)
    fix_posterior(model, 3.0)
    after = evaluate(model, images, beta=0.0)
    assert after.mse == before.mse
    assert after.loss > before.loss + 0.01


def test_noise_differs_between_images(model):
    """Also between those of different batches."""
    fix_posterior(model, 3.0)
    same = torch.full((COUNT, *SHAPE), 100, dtype=torch.uint8, device=next(model.parameters()).device)
    assert len(reconstruction_errors(model, same).unique()) > 0.99 * COUNT
    assert len(reconstruction_errors(model, same, deterministic=True).unique()) < 10


def test_the_same_noise_each_time_and_none_of_training(model, images, device):
    def states():
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]

    before = states()
    assert evaluate(model, images) == evaluate(model, images)
    assert torch.equal(reconstruction_errors(model, images), reconstruction_errors(model, images))
    assert all(torch.equal(*pair) for pair in zip(before, states(), strict=True))


@torch.no_grad()
def test_reconstruction_errors(model, images):
    fix_posterior(model, 3.0)
    mean = reconstruction_errors(model, images, deterministic=True)
    expected = squared_errors(model, images, model.encode(images)[:, :3]) / 105
    torch.testing.assert_close(mean.double(), expected, rtol=1e-5, atol=0)
    assert mean.mean().item() == pytest.approx(evaluate(model, images).mse, rel=1e-5)
    sampled = reconstruction_errors(model, images)
    assert sampled.shape == (COUNT,)
    assert sampled.mean() > mean.mean()
    # The loss with beta 0 is half the sum of what is averaged here.
    assert 105 / 2 * sampled.mean().item() == pytest.approx(evaluate(model, images, beta=0.0).loss, rel=1e-5)


def test_nothing_is_left_attached(model, images):
    assert not reconstruction_errors(model, images).requires_grad


@pytest.mark.parametrize("measure", [evaluate, reconstruction_errors])
def test_no_images_is_an_error(model, images, measure):
    with pytest.raises(ValueError, match=r"images must hold at least one image, got shape \[0, 3, 7, 5\]"):
        measure(model, images[:0])


class Noisy(torch.nn.Module):
    """With Dropout, and with BatchNorm, which refuses a batch of one in training."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(105, 6), torch.nn.BatchNorm1d(6), torch.nn.Dropout(0.5)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def test_a_model_in_training_is_measured_as_it_is_used(device, images):
    """The same numbers each time, its statistics and torch's random numbers as they were, and it goes on training."""
    decoder = torch.nn.Sequential(torch.nn.Linear(3, 105), torch.nn.Unflatten(1, SHAPE))
    model = VAE(Noisy(), decoder, 3).to(device)
    model.decoder.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    some = images[:513]  # the last batch is of one image
    for measure in (evaluate, reconstruction_errors, elbo, posteriors):
        first, second = measure(model, some), measure(model, some)
        assert all(map(torch.equal, *(map(torch.as_tensor, it) for it in (first, second))))
    assert log_likelihood(model, some[:1], samples=2).isfinite()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training and model.encoder.layers[2].training and not model.decoder.training


def test_large_images_come_in_small_batches():
    """As many pixels as 512 images of 28x28 have, and one image at least."""
    sizes = {(28, 28): 512, (8, 8): 512, (64, 64): 98, (256, 256): 6, (1024, 1024): 1}
    assert {size: batch_size(torch.empty(1).expand(9, 3, *size)) for size in sizes} == sizes


@pytest.mark.gpu
def test_images_on_the_cpu_are_brought_to_the_model(model, images):
    assert evaluate(model, images.cpu()) == evaluate(model, images)
    assert torch.equal(reconstruction_errors(model, images.cpu()), reconstruction_errors(model, images))
