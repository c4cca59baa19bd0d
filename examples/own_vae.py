"""Train your own encoder and decoder by fastvae's loop. Here both are fully connected.

    python examples/own_vae.py [--epochs 40]

On a CUDA device the loop runs the fused operations inside CUDA graphs, elsewhere plain PyTorch. The
program writes runs/own_vae.png with 64 images decoded from z ~ N(0, I).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from fastvae import plots
from fastvae.data import load_digits
from fastvae.models import VAE
from fastvae.training import EpochMetrics, Listener, Training, train

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=40)
epochs = parser.parse_args().epochs

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
digits = load_digits()  # uint8 [1797, 1, 28, 28], in training and test images
torch.manual_seed(0)

latent_dim, hidden = 16, 256
encoder = nn.Sequential(nn.Flatten(), nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, 2 * latent_dim))
decoder = nn.Sequential(
    nn.Linear(latent_dim, hidden), nn.ReLU(), nn.Linear(hidden, 784), nn.Unflatten(1, (1, 28, 28))
)  # logits: the loss applies the sigmoid
model = VAE(encoder, decoder, latent_dim).to(device)

train_images, test_images = digits.train_images.to(device), digits.test_images.to(device)


class Lines(Listener):
    def epoch(self, metrics: EpochMetrics) -> None:
        print(f"epoch {metrics.epoch}: loss {metrics.loss:.2f}, test loss {metrics.test_loss:.2f} nats per image")


rows = train(model, train_images, test_images, Training(epochs=epochs, batch_size=32), listeners=[Lines()])
path = Path("runs", "own_vae.png")
path.parent.mkdir(exist_ok=True)
plots.write_image_grid(path, model.sample(64), title="64 images from z ~ N(0, I)")
print(f"{rows[-1].seconds:.0f} s on {device}; {path} is written")
