"""What latent dimensions are used for, against the same numbers computed directly; scores of anomalies."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import fastvae
from fastvae.evaluation import (
    active_units,
    anomaly_scores,
    elbo,
    posteriors,
    principal_components,
    reconstruction_errors,
    roc,
)
from fastvae.models import VAE, ConvVAE

SHAPE = (1, 5, 4)


@pytest.fixture(autouse=True)
def exact():
    with fastvae.use_backend("reference"):
        yield


@pytest.fixture
def model(device) -> ConvVAE:
    return ConvVAE(SHAPE, latent_dim=3, channels=(4,)).to(device)


@pytest.fixture
def images(device) -> torch.Tensor:
    """More than one batch, and no multiple of it."""
    return torch.randint(0, 256, (700, *SHAPE), dtype=torch.uint8, device=device)


@torch.no_grad()
def test_posteriors(model, images):
    found = posteriors(model, images)
    mu, logvar = model.encode(images).chunk(2, 1)
    torch.testing.assert_close(found.mu, mu, rtol=1e-5, atol=1e-6)
    kl = 0.5 * (mu.double().square() + logvar.double().exp() - 1 - logvar.double())
    assert found.kl.dtype is torch.float64
    torch.testing.assert_close(found.kl, kl.mean(0), rtol=1e-5, atol=0)


def test_posteriors_of_latents_that_are_images(device):
    model = VAE(nn.Conv2d(1, 6, 2, stride=2), nn.ConvTranspose2d(3, 1, 2, stride=2), (3, 3, 2)).to(device)
    found = posteriors(model, torch.rand(5, 1, 6, 4, device=device))
    assert found.mu.shape == (5, 3, 3, 2) and found.kl.shape == (3, 3, 2)
    assert active_units(found.mu).shape == (3, 3, 2)
    assert principal_components(found.mu)[0].shape == (5, 2)


def test_active_units(device):
    """Variances on either side of the threshold, and a large mean that does not vary."""
    signs = torch.tensor([1.0, -1.0], device=device).repeat(50)
    mu = torch.stack([signs * 0.101, 40.0 + signs * 0.099, torch.full_like(signs, 3.0), signs * 2.0], 1)
    assert active_units(mu).tolist() == [True, False, False, True]
    assert active_units(mu, threshold=5.0).tolist() == [False] * 4


def test_principal_components(device):
    """Of points with known axes: turned, off centre, with a third direction that is small."""
    torch.manual_seed(0)
    axes = torch.linalg.qr(torch.randn(5, 5)).Q
    points = torch.randn(400, 3, dtype=torch.float64)
    points = torch.linalg.qr(points - points.mean(0)).Q * torch.tensor([4.0, 2.0, 1.0])
    mu = (7.0 + points @ axes[:3].double()).to(device)
    found, share = principal_components(mu)
    assert share == pytest.approx((16 + 4) / (16 + 4 + 1))
    for column, axis in enumerate(axes[:2]):
        sign = axis[axis.abs().argmax()].sign()
        torch.testing.assert_close(found[:, column].cpu(), sign * points[:, column], rtol=1e-5, atol=1e-5)


def test_principal_components_of_nothing(device):
    """Posteriors that have collapsed onto a point show no variance; more components than dimensions are an error."""
    points, share = principal_components(torch.ones(6, 3, device=device))
    assert share == 0.0 and not points.any()
    with pytest.raises(ValueError, match="count must be from 1 to the number of latent dimensions, 3, got 4"):
        principal_components(torch.ones(6, 3), 4)


def test_anomaly_scores(model, images):
    by_error = anomaly_scores(model, images)
    assert torch.equal(by_error, reconstruction_errors(model, images, deterministic=True))
    by_bound = anomaly_scores(model, images, score="elbo", seed=3)
    assert torch.equal(by_bound, -elbo(model, images, seed=3))
    with pytest.raises(ValueError, match="score must be one of reconstruction, elbo, got 'mse'"):
        anomaly_scores(model, images, score="mse")


def test_roc(device):
    """The area is the share of pairs in which the anomaly has the higher score, ties counted half."""
    torch.manual_seed(0)
    scores = torch.cat([torch.randn(60), 1.0 + torch.randn(40)]).mul(4).round().to(device)
    anomalous = (torch.arange(100) >= 60).to(device)
    curve = roc(scores, anomalous)
    normal, odd = scores[:60, None], scores[None, 60:]
    assert curve.auc == pytest.approx(((odd > normal).float() + 0.5 * (odd == normal).float()).mean().item())
    assert (curve.false_positive_rate[0], curve.true_positive_rate[0]) == (0, 0)
    assert (curve.false_positive_rate[-1], curve.true_positive_rate[-1]) == (1, 1)


@pytest.mark.parametrize("value", [True, False])
def test_roc_needs_both(value):
    with pytest.raises(ValueError, match=f"must mark some of the 4 images and not all, got {4 * value}"):
        roc(torch.rand(4), torch.full((4,), value))


def test_scikit_learn_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r'pip install "fastvae\[examples\]"'):
        roc(torch.rand(2), torch.tensor([True, False]))


@pytest.mark.parametrize("measure", [posteriors, anomaly_scores])
def test_no_images_is_an_error(model, images, measure):
    with pytest.raises(ValueError, match=r"images must hold at least one image, got shape \[0, 1, 5, 4\]"):
        measure(model, images[:0])
