"""Figures of the progress of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastvae.plots.figure import new_figure, save, tick_integers
from fastvae.training import EpochMetrics


def plot_losses(path: Path, rows: Sequence[EpochMetrics]) -> None:
    """The losses over the epochs, in nats per image."""
    figure, axes = new_figure(6.4, 4.0)
    epochs = [row.epoch for row in rows]
    # A single epoch has no line, and many have no room for markers.
    marker = "o" if len(rows) <= 30 else ""
    axes.plot(epochs, [row.loss for row in rows], label="training loss", marker=marker, color="C0")
    axes.plot(epochs, [row.test_loss for row in rows], label="test loss", marker=marker, color="C1")
    axes.plot(epochs, [row.reconstruction for row in rows], label="reconstruction", marker=marker, color="C2")
    axes.plot(epochs, [row.kl for row in rows], label="KL divergence", marker=marker, color="C3")
    axes.set_xlabel("epoch")
    axes.set_ylabel("nats per image")
    # A density may exceed 1, whose negative logarithm lies below 0.
    if all(min(row.loss, row.test_loss, row.reconstruction) >= 0 for row in rows):
        axes.set_ylim(bottom=0.0)
    if len(rows) == 1:
        axes.set_xlim(epochs[0] - 0.5, epochs[0] + 0.5)
    tick_integers(axes.xaxis)
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)
