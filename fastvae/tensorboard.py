"""Write a run's numbers, images and latents for TensorBoard. This needs the package tensorboard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import fastvae.functional as F
from fastvae.evaluation.batches import device_of, evaluation_mode
from fastvae.models import VAE
from fastvae.plots import tile
from fastvae.training import EpochMetrics, Listener

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# Of the first test images.
_RECONSTRUCTED, _ENCODED = 8, 512
_SAMPLED = 32


class TensorBoard(Listener):
    """Writes each epoch to files in a folder. The files are complete when the call returns, even if the run is killed
    then.

    model: the one that is tested. images: test images [N, C, H, W].
    """

    def __init__(self, writer: SummaryWriter, model: VAE, images: Tensor) -> None:
        self.writer, self.model, self.images = writer, model, images

    @torch.no_grad()
    def epoch(self, metrics: EpochMetrics) -> None:
        """Write the metrics; test images above their reconstructions with z = mu; samples; a histogram of mu; and a
        histogram of the divergence of each latent dimension in nats, which is near 0 for a dimension that the model
        does not use. This draws nothing from the default generators.
        """
        row, writer, model = metrics, self.writer, self.model
        for name, value in row._asdict().items():
            if name not in ("epoch", "step"):
                writer.add_scalar(name, value, row.epoch)  # type: ignore[no-untyped-call]
        device = device_of(model)
        images = self.images[:_ENCODED].to(device)
        with evaluation_mode(model):
            mu, logvar = model.posterior(images)
            reconstructions = model.decode_mean(mu[:_RECONSTRUCTED])
            samples = model.sample(_SAMPLED, torch.Generator(device).manual_seed(0))
        kl = F.gaussian_kl(mu, logvar, reduction="per_dimension")
        for name, values in (("latents/mu", mu), ("latents/kl_per_dimension", kl)):
            if values.isfinite().any():  # a histogram of nothing is an error there
                writer.add_histogram(name, values, row.epoch)  # type: ignore[no-untyped-call]
        if images.ndim != 4 or images.shape[1] not in (1, 3):  # no pictures
            writer.flush()  # type: ignore[no-untyped-call]
            return
        shown = images[:_RECONSTRUCTED]
        originals = shown / 255 if shown.dtype is torch.uint8 else shown
        pairs = torch.cat([originals, reconstructions])
        for name, grid in (("reconstructions", tile(pairs, len(shown))), ("samples", tile(samples, 8))):
            layout = "HW" if grid.ndim == 2 else "HWC"
            writer.add_image(name, grid, row.epoch, dataformats=layout)  # type: ignore[no-untyped-call]
        writer.flush()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self.writer.close()  # type: ignore[no-untyped-call]


def open_tensorboard(folder: Path, model: VAE, images: Tensor, epochs: int = 0) -> TensorBoard | None:
    """A `TensorBoard` that writes into ``folder``, or None if tensorboard is not installed.

    epochs: the number of epochs of the earlier run in the folder from which this run continues. Later epochs in the
    folder are no longer shown.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    writer = SummaryWriter(str(folder), purge_step=epochs + 1)  # type: ignore[no-untyped-call]
    return TensorBoard(writer, model, images)
