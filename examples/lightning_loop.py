"""A VAE with fastvae's operations in Lightning's loop.

    python examples/lightning_loop.py [--epochs 5]

Needs `pip install lightning`. Lightning chooses the device, the precision and the number of processes.
"""

from __future__ import annotations

import argparse

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastvae.functional as F
from fastvae.data import load_digits
from fastvae.nn import ELBOLoss

LATENT = 16


class VAE(lightning.LightningModule):  # type: ignore[misc]  # where mypy does not find Lightning
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 2 * LATENT))
        self.decoder = nn.Sequential(nn.Linear(LATENT, 256), nn.ReLU(), nn.Linear(256, 784))
        self.loss = ELBOLoss()

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        images = batch[0].flatten(1)
        z, kl = F.gaussian_sample_kl_packed(self.encoder(images))
        values = self.loss(self.decoder(z), images, kl)
        # The numbers stay on the device until Lightning logs them.
        self.log_dict({"loss": values.loss, "kl": values.kl}, prog_bar=True, on_step=False, on_epoch=True)
        loss: torch.Tensor = values.loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    settings = parser.parse_args()
    lightning.seed_everything(0)
    images = load_digits().train_images / 255
    trainer = lightning.Trainer(max_epochs=settings.epochs, logger=False, enable_checkpointing=False)
    trainer.fit(VAE(), DataLoader(TensorDataset(images), batch_size=32, shuffle=True))
    print(f"loss {trainer.callback_metrics['loss']:.2f} nats per image")


if __name__ == "__main__":
    main()
