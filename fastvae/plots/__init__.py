"""Figures of a run as PNG files. They are written atomically and need no display. They need matplotlib."""

from fastvae.plots.evaluation import (
    automatic_bins,
    plot_errors,
    plot_kl_per_dimension,
    plot_latent_map,
    plot_roc,
    plot_scores,
)
from fastvae.plots.figure import require_matplotlib
from fastvae.plots.images import plot_image_rows, plot_reconstructions, tile, write_image_grid
from fastvae.plots.training import plot_losses

__all__ = [
    "automatic_bins",
    "plot_errors",
    "plot_image_rows",
    "plot_kl_per_dimension",
    "plot_latent_map",
    "plot_losses",
    "plot_reconstructions",
    "plot_roc",
    "plot_scores",
    "require_matplotlib",
    "tile",
    "write_image_grid",
]
