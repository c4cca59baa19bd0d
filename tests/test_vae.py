"""`VAE` around encoders and decoders that are not the example's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastvae.functional as F
from fastvae.evaluation import evaluate, reconstruction_errors
from fastvae.models import VAE, ConvVAE
from fastvae.training import Training, train

EXAMPLE = Path(__file__).parents[1] / "examples" / "own_vae.py"


def with_vector_latents() -> VAE:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(30, 8))
    decoder = nn.Sequential(nn.Linear(4, 30), nn.Unflatten(1, (1, 6, 5)))
    return VAE(encoder, decoder, 4)


def with_image_latents() -> VAE:
    torch.manual_seed(0)
    return VAE(nn.Conv2d(1, 6, 2, stride=2), nn.ConvTranspose2d(3, 1, 2, stride=2), (3, 3, 2))


MODELS = {"vector": (with_vector_latents, (1, 6, 5), (4,)), "image": (with_image_latents, (1, 6, 4), (3, 3, 2))}


@pytest.mark.parametrize("kind", MODELS)
def test_output_is_that_of_the_parts(kind, device):
    make, shape, latent_shape = MODELS[kind]
    model = make().to(device)
    x = torch.rand(7, *shape, device=device)
    torch.manual_seed(1)
    output = model(x)
    moments = model.encoder(x)
    torch.manual_seed(1)
    z, kl = F.gaussian_sample_kl_packed(moments)
    assert output.z.shape == (7, *latent_shape)
    assert torch.equal(output.z, z)
    assert torch.equal(output.kl, kl)
    assert torch.equal(output.logits, model.decoder(z))
    assert output.logits.shape == x.shape
    mean = model.reconstruct(x, deterministic=True)
    assert torch.allclose(mean, torch.sigmoid(model.decoder(moments.chunk(2, 1)[0])), atol=1e-6)
    assert model.sample(5).shape == (5, *shape)
    assert model.sample(0).shape == (0, *shape)


@pytest.mark.parametrize("kind", MODELS)
def test_bytes_are_read_as_floats(kind, device):
    make, shape, _ = MODELS[kind]
    model = make().to(device)
    x = torch.randint(0, 256, (3, *shape), dtype=torch.uint8, device=device)
    assert torch.equal(model.encode(x), model.encode(x.float() / 255))
    with pytest.raises(TypeError, match=r"x must be uint8 .* got torch.int64"):
        model.encode(x.long())


@pytest.mark.parametrize("kind", MODELS)
def test_it_trains_and_is_evaluated(kind, device):
    make, shape, _ = MODELS[kind]
    model = make().to(device)
    images = torch.randint(0, 256, (1, *shape), dtype=torch.uint8, device=device).expand(64, *shape).contiguous()
    rows = train(model, images, images[:9], Training(epochs=8, batch_size=8, learning_rate=0.02))
    assert rows[-1].loss < 0.8 * rows[0].loss
    assert evaluate(model, images[:9]).mse == rows[-1].test_mse
    errors = reconstruction_errors(model, images[:9], deterministic=True)
    assert errors.mean().item() == pytest.approx(rows[-1].test_mse, rel=1e-5)


def test_convvae_is_one():
    model = ConvVAE((1, 8, 6), latent_dim=3, channels=(4, 6))
    assert isinstance(model, VAE)
    assert model.latent_shape == (3,)
    assert {name.split(".")[0] for name in model.state_dict()} == {"encoder", "decoder"}


@pytest.mark.parametrize("latent_shape", [0, -1, 2.0, True, (), (3, 0), "3"])
def test_latent_shape_must_be_positive(latent_shape):
    with pytest.raises(ValueError, match="latent_shape must be a positive integer or a tuple of them, got"):
        VAE(nn.Identity(), nn.Identity(), latent_shape)


@pytest.mark.parametrize("shape", [(2, 3), (2,), (2, 4, 1), ()])
def test_decode_names_the_shape(shape):
    with pytest.raises(ValueError, match=r"z must have shape \[B, 4\], got"):
        with_vector_latents().decode(torch.zeros(shape))


@pytest.mark.slow
@pytest.mark.skipif(not EXAMPLE.exists(), reason="needs the examples of the source tree")
def test_the_example(tmp_path):
    done = subprocess.run(
        [sys.executable, EXAMPLE, "--epochs", "2"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "epoch 2: loss" in done.stdout
    assert (tmp_path / "runs" / "own_vae.png").stat().st_size > 5_000
