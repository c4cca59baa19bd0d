"""Training on fused operations: the loss of 50 steps stays as close to a float64 run as float32 PyTorch's does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fastvae
import fastvae.functional as F

STEPS, BATCH, SIDE, LATENT = 50, 16, 12, 8


class SmallVAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        pixels = SIDE * SIDE
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(pixels, 32), nn.ReLU(), nn.Linear(32, 2 * LATENT))
        self.decoder = nn.Sequential(
            nn.Linear(LATENT, 32), nn.ReLU(), nn.Linear(32, pixels), nn.Unflatten(1, (1, SIDE, SIDE))
        )

    def forward(self, images: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        z, kl = F.gaussian_sample_kl_packed(self.encoder(images), eps=eps)
        return self.decoder(z), kl


def strokes(generator: torch.Generator) -> Tensor:
    """A batch of images like digits: smooth bright curves on black."""
    t = torch.linspace(0, 1, 24, dtype=torch.float64)
    a = 2 * torch.rand(BATCH, 4, 1, generator=generator, dtype=torch.float64) - 1
    x, y = a[:, 0] * t + a[:, 1] * t.square(), a[:, 2] * (1 - t) + a[:, 3] * torch.sin(3 * t)
    grid = torch.linspace(-1, 1, SIDE, dtype=torch.float64)
    distance = (grid[:, None, None] - y[:, None, None]).square() + (grid[None, :, None] - x[:, None, None]).square()
    return torch.exp(-30 * distance.amin(-1))[:, None]


def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(images, eps) of each step, float32 numbers in float64, so that every run sees the same."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        eps = torch.randn(BATCH, LATENT, generator=generator, dtype=torch.float64)
        yield strokes(generator).float().double(), eps.float().double()


def train(seed: int, dtype: torch.dtype, device: torch.device, value_and_grad: bool) -> Tensor:
    """The loss of each step, float64."""
    torch.manual_seed(seed)
    model = SmallVAE().to(device, dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for images, eps in batches(seed):
        images, eps = images.to(device, dtype), eps.to(device, dtype)
        logits, kl = model(images, eps)
        optimizer.zero_grad()
        if value_and_grad:
            values, gradients = F.elbo_value_and_grad(logits, images, kl)
            torch.autograd.backward((logits, kl), gradients)
        else:
            values = F.elbo_loss(logits, images, kl)
            values.loss.backward()
        optimizer.step()
        losses.append(values.loss.detach().double().cpu())
    return torch.stack(losses)


@pytest.mark.parametrize("value_and_grad", [False, True], ids=["autograd", "value_and_grad"])
def test_training_is_as_close_to_float64_as_the_float32_reference(triton_backend, device, value_and_grad) -> None:
    """The largest relative deviation of the loss over the steps, from the same parameters, images and noise."""
    seed, before = 0, triton_backend.count
    fused = train(seed, torch.float32, device, value_and_grad)
    assert triton_backend.count == before + (3 if value_and_grad else 4) * STEPS
    with fastvae.use_backend("reference"):
        plain = train(seed, torch.float32, device, value_and_grad)
        exact = train(seed, torch.float64, torch.device("cpu"), value_and_grad)

    def deviation(losses: Tensor) -> float:
        return ((losses - exact).abs() / exact.abs()).max().item()

    assert exact[-5:].mean() < 0.8 * exact[:5].mean(), "nothing was learnt"
    assert deviation(fused) <= 2 * deviation(plain)
