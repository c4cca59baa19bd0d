"""Figures of a run, as PNG files written atomically, without a display. They need matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastvae.files import replacing
from fastvae.training import EpochMetrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

_DOTS_PER_INCH = 150


def require_matplotlib() -> None:
    """Raise ``ImportError`` where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError('figures need matplotlib: pip install "fastvae[examples]"') from error


def plot_losses(path: Path, rows: Sequence[EpochMetrics]) -> None:
    """The losses over the epochs, in nats per image."""
    figure, axes = _figure(6.4, 4.0)
    epochs = [row.epoch for row in rows]
    # A single epoch has no line, and many have no room for markers.
    marker = "o" if len(rows) <= 30 else ""
    axes.plot(epochs, [row.loss for row in rows], label="training loss", marker=marker, color="C0")
    axes.plot(epochs, [row.test_loss for row in rows], label="test loss", marker=marker, color="C1")
    axes.plot(epochs, [row.reconstruction for row in rows], label="reconstruction", marker=marker, color="C2")
    axes.plot(epochs, [row.kl for row in rows], label="KL divergence", marker=marker, color="C3")
    axes.set_xlabel("epoch")
    axes.set_ylabel("nats per image")
    axes.set_ylim(bottom=0.0)
    _tick_integers(axes.xaxis)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def plot_reconstructions(path: Path, images: Tensor, reconstructions: Tensor, *, deterministic: bool) -> None:
    """Images above their reconstructions, both [N, C, H, W] in [0, 1], with C = 1 or 3; ``deterministic``: z = mu."""
    columns = min(len(images), 10)
    rows = len(images) // columns
    pairs = torch.stack([images[: rows * columns], reconstructions[: rows * columns]])
    # [pair, row, column, ...] to rows that alternate
    pairs = pairs.reshape(2, rows, columns, *images.shape[1:]).transpose(0, 1).flatten(0, 2)
    height = images.shape[2]
    figure, axes = _figure(0.75 * columns + 1.3, 0.75 * 2 * rows * height / images.shape[3] + 0.4)
    axes.imshow(tile(pairs, columns), cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([height * (row + 0.5) - 0.5 for row in range(2 * rows)], ["original", "reconstruction"] * rows)
    axes.tick_params(length=0)
    for boundary in range(1, rows):
        axes.axhline(2 * boundary * height - 0.5, color="C0")
    axes.set_title("Test images, reconstructed with " + _latents(deterministic), fontsize="medium")
    _save(figure, path)


def plot_errors(path: Path, errors: Tensor, *, deterministic: bool) -> None:
    """A histogram of the mean squared error of each test image, errors [N]; ``deterministic``: z = mu."""
    values = errors.cpu().double().numpy()
    edges = automatic_bins(values)
    figure, axes = _figure(6.4, 4.0)
    counts, _ = np.histogram(values, edges)
    axes.bar(edges[:-1], counts, np.diff(edges), align="edge", edgecolor="white", linewidth=0.5)
    axes.axvline(values.mean(), color="C1", label=f"mean {values.mean():.4f}")
    axes.set_xlim(edges[0], edges[-1])
    axes.set_xlabel("mean squared error of an image's pixels, which lie in [0, 1]")
    axes.set_ylabel(f"test images (of {len(values):,})")
    _tick_integers(axes.yaxis)
    axes.set_title("Reconstruction error with " + _latents(deterministic), fontsize="medium")
    axes.legend()
    _save(figure, path)


def write_image_grid(path: Path, images: Tensor, *, columns: int = 8, scale: int = 3) -> None:
    """Images [N, C, H, W] in [0, 1], C = 1 or 3, side by side without borders, each pixel ``scale`` pixels wide."""
    require_matplotlib()
    from matplotlib.image import imsave

    grid = (tile(images, columns) * 255).round().astype(np.uint8)
    if grid.ndim == 2:
        # As colour: through a grey colour map, matplotlib puts some values one level off.
        grid = np.stack([grid] * 3, axis=2)
    with replacing(path) as file:
        imsave(file, grid.repeat(scale, axis=0).repeat(scale, axis=1), format="png")


def tile(images: Tensor, columns: int) -> NDArray[np.float32]:
    """Images [N, C, H, W] row by row in one: [N / columns * H, columns * W], with a last axis of C = 3 for colour."""
    count, channels, height, width = images.shape
    if channels not in (1, 3):
        raise ValueError(f"images must have 1 or 3 channels, got shape {list(images.shape)}")
    if count == 0 or count % columns:
        raise ValueError(f"images must fill whole rows of {columns}, got {count}")
    grid = images.detach().float().cpu().reshape(count // columns, columns, channels, height, width)
    # [row, column, channel, height, width] to [row, height, column, width, channel]
    grid = grid.permute(0, 3, 1, 4, 2).reshape(count // columns * height, columns * width, channels)
    return grid.squeeze(2).numpy() if channels == 1 else grid.numpy()


def automatic_bins(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The edges of MATLAB's automatic histogram bins.

    Scott's width, 3.5 * standard deviation / n^(1/3), is snapped to 1, 2, 3, 5 or 10 times a power of ten; the edges
    are multiples of it. Values that are all equal get one bin of width 1.

    Source: MathWorks, histogram (BinMethod "auto"); D. Scott, "On optimal and data-based histograms", 1979.
    """
    width = 1.0
    if len(values) > 1 and np.ptp(values) > 0:
        scott = 3.5 * float(values.std(ddof=1)) / len(values) ** (1 / 3)
        power = 10.0 ** math.floor(math.log10(scott))
        width = power * next(step for step, limit in _STEPS if scott / power < limit)
    first = math.floor(values.min() / width)
    last = max(first + 1, math.ceil(values.max() / width))
    return np.arange(first, last + 1) * width


# The width of a bin in units of a power of ten, and the relative size below which it is taken.
_STEPS = ((1, 1.5), (2, 2.5), (3, 4.0), (5, 7.5), (10, math.inf))


def _latents(deterministic: bool) -> str:
    return "z = mu" if deterministic else "sampled z"


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of a size in inches. pyplot's would keep global state and pick a backend that may want a display."""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DOTS_PER_INCH, layout="constrained")
    return figure, figure.add_subplot()


def _tick_integers(axis: Axis) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as file:
        figure.savefig(file, format="png")
