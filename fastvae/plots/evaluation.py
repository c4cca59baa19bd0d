"""Figures of measurements of a trained model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastvae.evaluation import ROC
from fastvae.plots.figure import new_figure, save, tick_integers

# The colours that matplotlib tells apart best, for up to as many labels.
_FEW, _MANY = 10, 20


def plot_errors(path: Path, errors: Tensor, *, deterministic: bool) -> None:
    """A histogram of the mean squared errors [N] of test images. ``deterministic``: they were computed with z = mu."""
    values = errors.cpu().double().numpy()
    edges = automatic_bins(values)
    figure, axes = new_figure(6.4, 4.0)
    counts, _ = np.histogram(values, edges)
    axes.bar(edges[:-1], counts, np.diff(edges), align="edge", edgecolor="white", linewidth=0.5)
    axes.axvline(values.mean(), color="C1", label=f"mean {values.mean():.4f}")
    axes.set_xlim(edges[0], edges[-1])
    axes.set_xlabel("mean squared error of an image's pixels, which lie in [0, 1]")
    axes.set_ylabel(f"test images (of {len(values):,})")
    tick_integers(axes.yaxis)
    latents = "z = mu" if deterministic else "sampled z"
    axes.set_title(f"Reconstruction error with {latents}", fontsize="medium")
    axes.legend()
    save(figure, path)


def plot_kl_per_dimension(path: Path, kl: Tensor, active: Tensor, *, threshold: float = 0.01) -> None:
    """Bars of each latent dimension's divergence from the prior in nats, largest first. kl and active, both [K], come
    from `posteriors` and from `active_units` with this threshold.
    """
    order = kl.flatten().argsort(descending=True).cpu()
    values = kl.flatten().cpu()[order].numpy()
    colours = np.where(active.flatten().cpu()[order].numpy(), "C0", "C7")
    figure, axes = new_figure(max(6.4, 0.22 * len(values) + 1.0), 4.0)
    axes.bar(range(len(values)), values, color=colours)
    axes.set_xticks(range(len(values)), [str(index) for index in order.tolist()], fontsize="small")
    axes.set_xlim(-0.7, len(values) - 0.3)
    axes.set_xlabel("latent dimension, largest divergence first; grey: not active")
    axes.set_ylabel("KL divergence from N(0, 1), nats")
    count = f"{int(active.sum())} are active: the variance of their mu is above {threshold:g}"
    axes.set_title(f"{values.sum():.2f} nats in {len(values)} dimensions; {count}", fontsize="small")
    axes.grid(axis="y", alpha=0.3)
    save(figure, path)


def plot_latent_map(
    path: Path, points: Tensor, labels: Tensor | None, *, axis_labels: tuple[str, str], title: str | None = None
) -> None:
    """Points [N, 2], coloured by labels, integers [N], if there are any."""
    values = points.cpu().double().numpy()
    figure, axes = new_figure(7.2, 5.6)
    size = min(14.0, max(5.0, 20_000 / len(values)))  # fewer points are drawn larger
    if labels is None:
        axes.scatter(values[:, 0], values[:, 1], size, alpha=0.6, linewidths=0)
    else:
        from matplotlib import colormaps

        found = sorted(set(labels.tolist()))
        name = "tab10" if len(found) <= _FEW else "tab20" if len(found) <= _MANY else "turbo"
        colour_map = colormaps[name]
        for place, label in enumerate(found):
            colour = colour_map(place if len(found) <= _MANY else place / (len(found) - 1))
            members = values[(labels == label).cpu().numpy()]
            axes.scatter(members[:, 0], members[:, 1], size, alpha=0.6, linewidths=0, color=colour, label=str(label))
        columns = math.ceil(len(found) / _MANY)
        scale = math.sqrt(30.0 / size)  # the legend's points are of one size
        figure.legend(loc="outside right upper", title="label", ncols=columns, fontsize="small", markerscale=scale)
    axes.set_xlabel(axis_labels[0])
    axes.set_ylabel(axis_labels[1])
    axes.set_title(title or f"Posterior means of {len(values):,} test images", fontsize="medium")
    axes.grid(alpha=0.3)
    save(figure, path)


def plot_scores(path: Path, scores: Mapping[str, Tensor], threshold: float, *, score_label: str) -> None:
    """Histograms of the anomaly scores [N] of each set, as shares of the set, with the threshold."""
    values = {name: set_scores.cpu().double().numpy() for name, set_scores in scores.items()}
    edges = automatic_bins(np.concatenate(list(values.values())))
    figure, axes = new_figure(6.4, 4.6)
    for place, (name, found) in enumerate(values.items()):
        shares = np.histogram(found, edges)[0] / len(found)
        label = f"{name}: {(found > threshold).mean():.1%} of {len(found):,} above"
        axes.stairs(shares, edges, fill=True, alpha=0.5, color=f"C{place}", label=label)
    axes.axvline(threshold, color="black", linestyle="--", label=f"threshold {threshold:.4g}")
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(bottom=0.0)
    axes.set_xlabel(score_label)
    axes.set_ylabel("share of the images")
    figure.legend(loc="outside upper center")  # within, it would cover the threshold, which may lie anywhere
    save(figure, path)


def plot_roc(path: Path, curve: ROC, point: tuple[float, float]) -> None:
    """The receiver operating characteristic of `roc`, with the (false, true) positive rates at the used threshold."""
    figure, axes = new_figure(4.8, 4.8)
    axes.plot(curve.false_positive_rate, curve.true_positive_rate, label=f"area under the curve {curve.auc:.4f}")
    axes.plot([0, 1], [0, 1], color="C7", linestyle=":", label="chance")
    axes.plot(*point, "o", color="black", label=f"threshold: {point[0]:.1%} and {point[1]:.1%}")
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_aspect("equal")
    axes.set_xlabel("false positive rate: normal images above")
    axes.set_ylabel("true positive rate: anomalies above")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    save(figure, path)


def automatic_bins(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The edges of MATLAB's automatic histogram bins.

    Scott's width, 3.5 * standard deviation / n^(1/3), is rounded to 1, 2, 3, 5 or 10 times a power of ten. The edges
    are multiples of this width. If all values are equal, there is one bin of width 1.

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
