"""A VAE with fastvae's operations in a loop of Hugging Face's accelerate.

    python examples/accelerate_loop.py [--epochs 5]
    accelerate launch examples/accelerate_loop.py

Needs `pip install accelerate`. accelerate chooses the device, the precision and the number of processes.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastvae.functional as F
from fastvae.data import load_digits
from fastvae.models import VAE

LATENT = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    settings = parser.parse_args()
    accelerator = Accelerator()
    set_seed(0, device_specific=True)  # else every process draws the same noise
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 2 * LATENT))
    decoder = nn.Sequential(nn.Linear(LATENT, 256), nn.ReLU(), nn.Linear(256, 784), nn.Unflatten(1, (1, 28, 28)))
    model = VAE(encoder, decoder, LATENT)
    loader = DataLoader(TensorDataset(load_digits().train_images / 255), batch_size=32, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=1e-3), loader)
    for epoch in range(1, settings.epochs + 1):
        losses = []
        for (images,) in loader:
            logits, _, kl = model(images)
            values = F.elbo_loss(logits, images, kl)
            accelerator.backward(values.loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(values.loss.detach())  # read once an epoch: reading waits for the device
        loss = accelerator.reduce(torch.stack(losses).mean(), "mean")
        accelerator.print(f"epoch {epoch}: loss {loss:.2f} nats per image")


if __name__ == "__main__":
    main()
