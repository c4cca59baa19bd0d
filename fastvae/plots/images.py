"""Grids of images."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastvae.files import replacing
from fastvae.plots.figure import DOTS_PER_INCH, new_figure, require_matplotlib, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot_reconstructions(
    path: Path, images: Tensor, reconstructions: Tensor, *, deterministic: bool, title: str | None = None
) -> None:
    """Images above their reconstructions, both [N, C, H, W] in [0, 1], C = 1 or 3. ``deterministic``: with z = mu."""
    columns = min(len(images), 10)
    rows = len(images) // columns
    pairs = torch.stack([images[: rows * columns], reconstructions[: rows * columns]])
    # [pair, row, column, ...] to rows that alternate
    pairs = pairs.reshape(2, rows, columns, *images.shape[1:]).transpose(0, 1).flatten(0, 1)
    figure, axes = _rows(pairs, ["original", "reconstruction"] * rows)
    for boundary in range(1, rows):
        axes.axhline(2 * boundary * images.shape[2] - 0.5, color="C0")
    latents = "z = mu" if deterministic else "sampled z"
    axes.set_title(f"{title or 'Test images'}, reconstructed with {latents}", fontsize="medium")
    save(figure, path)


def plot_image_rows(
    path: Path, images: Tensor, row_labels: Sequence[str], column_labels: Sequence[str], *, title: str
) -> None:
    """Images [R, K, C, H, W] in [0, 1], C = 1 or 3, as R rows of K, with a label for each row and each column."""
    figure, axes = _rows(images, row_labels)
    width = images.shape[4]
    axes.set_xticks([width * (column + 0.5) - 0.5 for column in range(images.shape[1])], column_labels)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_title(title, fontsize="medium")
    save(figure, path)


def _rows(images: Tensor, labels: Sequence[str]) -> tuple[Figure, Axes]:
    rows, columns, _, height, width = images.shape
    figure, axes = new_figure(0.75 * columns + 1.3, 0.75 * rows * height / width + 0.4, "compressed")
    grid = tile(images.flatten(0, 1), columns).clip(0.0, 1.0)  # matplotlib warns of colours outside [0, 1]
    axes.imshow(grid, cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([height * (row + 0.5) - 0.5 for row in range(rows)], labels)
    axes.tick_params(length=0)
    return figure, axes


def write_image_grid(path: Path, images: Tensor, *, columns: int = 8, scale: int = 3, title: str | None = None) -> None:
    """Images [N, C, H, W] in [0, 1], C = 1 or 3, side by side without borders. Each pixel is ``scale`` pixels wide. The
    title is in a band above them, in letters that are small enough for the width. Values below 0 are shown as 0, and
    values above 1 as 1.
    """
    require_matplotlib()
    from matplotlib.image import imsave

    # The mean of some likelihoods may lie outside [0, 1], where a byte would start again at the other end.
    grid = (tile(images, columns).clip(0.0, 1.0) * 255).round().astype(np.uint8)
    if grid.ndim == 2:
        # As colour: through a grey colour map, matplotlib puts some values one level off.
        grid = np.stack([grid] * 3, axis=2)
    grid = grid.repeat(scale, axis=0).repeat(scale, axis=1)
    if title is not None:
        grid = np.concatenate([_title_band(title, grid.shape[1]), grid])
    with replacing(path) as file:
        imsave(file, grid, format="png")


def _title_band(title: str, width: int) -> NDArray[np.uint8]:
    """Black on white, [rows, width, 3]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / DOTS_PER_INCH, 0.3), dpi=DOTS_PER_INCH)
    text = figure.text(0.5, 0.5, title, ha="center", va="center_baseline", fontsize="medium")
    text.set_fontsize(float(text.get_fontsize()) * min(1.0, 0.95 * width / text.get_window_extent().width))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="rgba")
    return np.frombuffer(buffer.getvalue(), np.uint8).reshape(-1, width, 4)[..., :3]


def tile(images: Tensor, columns: int) -> NDArray[np.float32]:
    """Images [N, C, H, W] as one image, row by row: [N / columns * H, columns * W], with a last axis of C = 3 for
    colour.
    """
    count, channels, height, width = images.shape
    if channels not in (1, 3):
        raise ValueError(f"images must have 1 or 3 channels, got shape {list(images.shape)}")
    if count == 0 or count % columns:
        raise ValueError(f"images must fill whole rows of {columns}, got {count}")
    grid = images.detach().float().cpu().reshape(count // columns, columns, channels, height, width)
    # [row, column, channel, height, width] to [row, height, column, width, channel]
    grid = grid.permute(0, 3, 1, 4, 2).reshape(count // columns * height, columns * width, channels)
    return grid.squeeze(2).numpy() if channels == 1 else grid.numpy()
