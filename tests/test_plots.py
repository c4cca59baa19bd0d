"""The figures: what they show, their size, and that they are written whole or not at all."""

from __future__ import annotations

import math
import os
import struct
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastvae import plots
from fastvae.evaluation import ROC
from fastvae.files import replacing, write_csv
from fastvae.training import EpochMetrics

ROWS = [EpochMetrics(epoch, 10 * epoch, 30 / epoch, 20 / epoch, 10 / epoch, 31 / epoch, 0.1, 1.0) for epoch in (1, 2)]


@pytest.fixture
def figures(monkeypatch):
    """The figures as they are saved."""
    from matplotlib.figure import Figure

    saved = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *args, **more: (saved.append(figure), save(figure, *args, **more))
    )
    return saved


def png_size(path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data.endswith(b"IEND\xae\x42\x60\x82")
    return struct.unpack(">II", data[16:24])


def read_png(path) -> np.ndarray:
    """uint8 [height, width, 3]."""
    from PIL import Image

    return np.asarray(Image.open(path).convert("RGB"))


def ink_fills_the_figure(path) -> bool:
    """Whether nothing but white is less than a tenth of the figure on every side."""
    rows, columns = np.nonzero(read_png(path).min(2) < 128)
    height, width = read_png(path).shape[:2]
    margins = (rows.min() / height, 1 - rows.max() / height, columns.min() / width, 1 - columns.max() / width)
    return max(margins) < 0.1


def test_losses(tmp_path, figures):
    plots.plot_losses(tmp_path / "loss.png", ROWS)
    assert png_size(tmp_path / "loss.png") == (960, 600)
    assert ink_fills_the_figure(tmp_path / "loss.png")
    (axes,) = figures[0].axes
    assert axes.get_xlabel() == "epoch"
    assert axes.get_ylabel() == "nats per image"
    curves = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert curves == {
        "training loss": [[1, 30], [2, 15]],
        "test loss": [[1, 31], [2, 15.5]],
        "reconstruction": [[1, 20], [2, 10]],
        "KL divergence": [[1, 10], [2, 5]],
    }
    assert {text.get_text() for text in axes.get_legend().get_texts()} == set(curves)


@pytest.mark.parametrize("count", [1, 2, 3, 30])
def test_epochs_are_whole_numbers(tmp_path, figures, count):
    plots.plot_losses(tmp_path / "loss.png", [ROWS[0]._replace(epoch=epoch) for epoch in range(1, count + 1)])
    axes = figures[0].axes[0]
    low, high = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert ticks and all(tick == round(tick) for tick in ticks)


@pytest.mark.parametrize(
    ("count", "columns", "rows", "deterministic", "latents"),
    [(20, 10, 2, True, "z = mu"), (13, 10, 1, False, "sampled z"), (1, 1, 1, True, "z = mu")],
)
def test_reconstructions(tmp_path, figures, count, columns, rows, deterministic, latents):
    originals = torch.rand(count, 1, 6, 4) / 2
    path = tmp_path / "reconstructions.png"
    plots.plot_reconstructions(path, originals, originals + 0.5, deterministic=deterministic)
    png_size(path)
    assert ink_fills_the_figure(path)
    (axes,) = figures[0].axes
    assert latents in axes.get_title()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["original", "reconstruction"] * rows
    shown = axes.images[0].get_array()
    assert shown.shape == (2 * rows * 6, columns * 4)
    for index in range(rows * columns):
        row, column = divmod(index, columns)
        for pair, image in enumerate((originals[index, 0], originals[index, 0] + 0.5)):
            top = 6 * (2 * row + pair)
            np.testing.assert_array_equal(shown[top : top + 6, 4 * column : 4 * column + 4], image.numpy())
            # The label stands in the middle of its row.
            assert axes.get_yticks()[2 * row + pair] == top + 2.5


def test_colour_reconstructions(tmp_path, figures):
    images = torch.rand(2, 3, 6, 4)
    plots.plot_reconstructions(tmp_path / "r.png", images, images, deterministic=True)
    assert figures[0].axes[0].images[0].get_array().shape == (12, 8, 3)


@pytest.mark.parametrize(("deterministic", "latents"), [(True, "z = mu"), (False, "sampled z")])
def test_errors(tmp_path, figures, deterministic, latents):
    errors = torch.rand(300) ** 2 / 20
    plots.plot_errors(tmp_path / "errors.png", errors, deterministic=deterministic)
    assert png_size(tmp_path / "errors.png") == (960, 600)
    assert ink_fills_the_figure(tmp_path / "errors.png")
    (axes,) = figures[0].axes
    assert latents in axes.get_title()
    assert "squared error" in axes.get_xlabel()
    assert "300" in axes.get_ylabel()
    bars = [(bar.get_x(), bar.get_width(), bar.get_height()) for bar in axes.patches]
    assert sum(height for *_, height in bars) == 300
    for left, width, height in bars:
        inside = (errors >= left) & (errors < left + width)
        assert abs(inside.sum().item() - height) <= 1  # float32 against float64 at an edge
    assert f"mean {errors.mean():.4f}" in axes.get_legend().get_texts()[0].get_text()


def test_a_title_of_ones_own(tmp_path, figures):
    images = torch.rand(2, 1, 6, 4)
    plots.plot_reconstructions(tmp_path / "r.png", images, images, deterministic=True, title="The worst")
    assert figures[0].axes[0].get_title() == "The worst, reconstructed with z = mu"


@pytest.mark.parametrize(("rows", "columns", "channels"), [(2, 11, 1), (16, 9, 1), (1, 1, 3)])
def test_image_rows(tmp_path, figures, rows, columns, channels):
    """Each label stands in the middle of its row or column, and none is cut off."""
    images = torch.rand(rows, columns, channels, 6, 4)
    row_labels = [f"z[{row}], KL 0.00" for row in range(rows)]
    column_labels = [str(column) for column in range(columns)]
    plots.plot_image_rows(tmp_path / "rows.png", images, row_labels, column_labels, title="A title")
    (axes,) = figures[0].axes
    shown = axes.images[0].get_array().reshape(6 * rows, 4 * columns, channels)
    for row, column in ((0, 0), (rows - 1, columns - 1)):
        part = shown[6 * row : 6 * row + 6, 4 * column : 4 * column + 4]
        np.testing.assert_array_equal(part, images[row, column].permute(1, 2, 0).numpy())
    assert [label.get_text() for label in axes.get_yticklabels()] == row_labels
    assert [label.get_text() for label in axes.get_xticklabels()] == column_labels
    assert list(axes.get_yticks()) == [6 * row + 2.5 for row in range(rows)]
    assert list(axes.get_xticks()) == [4 * column + 1.5 for column in range(columns)]
    assert axes.get_title() == "A title"
    pixels = read_png(tmp_path / "rows.png").min(2)
    assert (pixels[:, 0] == 255).all() and (pixels[:, -1] == 255).all() and (pixels[0] == 255).all()


def test_kl_per_dimension(tmp_path, figures):
    kl, active = torch.tensor([0.5, 2.0, 0.0, 1.0]), torch.tensor([True, True, False, False])
    plots.plot_kl_per_dimension(tmp_path / "kl.png", kl, active)
    assert ink_fills_the_figure(tmp_path / "kl.png")
    (axes,) = figures[0].axes
    assert [bar.get_height() for bar in axes.patches] == [2.0, 1.0, 0.5, 0.0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "3", "0", "2"]
    colours = [bar.get_facecolor() for bar in axes.patches]
    assert colours[0] == colours[2] and colours[1] == colours[3] != colours[0]
    assert axes.get_title() == "3.50 nats in 4 dimensions; 2 are active: the variance of their mu is above 0.01"
    plots.plot_kl_per_dimension(tmp_path / "kl.png", kl, active, threshold=0.5)
    assert figures[1].axes[0].get_title().endswith("above 0.5")
    assert "nats" in axes.get_ylabel()


@pytest.mark.parametrize("classes", [1, 10, 11, 47])
def test_latent_map(tmp_path, figures, classes):
    """Every point is drawn, in one colour for each label, and no two labels share one."""
    points, labels = torch.randn(300, 2), torch.arange(300) % classes * 2
    plots.plot_latent_map(tmp_path / "map.png", points, labels, axis_labels=("across", "up"))
    (axes,) = figures[0].axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("across", "up")
    assert [group.get_label() for group in axes.collections] == [str(2 * label) for label in range(classes)]
    assert len({tuple(group.get_facecolor()[0]) for group in axes.collections}) == classes
    for label, group in enumerate(axes.collections):
        np.testing.assert_allclose(group.get_offsets(), points[labels == 2 * label], rtol=1e-6)
    (legend,) = figures[0].legends
    assert len(legend.get_texts()) == classes
    assert legend.get_window_extent().y0 >= 0  # all of it is in the figure
    assert ink_fills_the_figure(tmp_path / "map.png")


def test_latent_map_without_labels(tmp_path, figures):
    plots.plot_latent_map(tmp_path / "map.png", torch.randn(9, 2), None, axis_labels=("across", "up"))
    assert len(figures[0].axes[0].collections[0].get_offsets()) == 9
    assert figures[0].legends == []


def test_scores(tmp_path, figures):
    """Sets of different sizes are comparable: shares, which add up to 1."""
    torch.manual_seed(0)
    sets = {"normal": torch.rand(400), "anomalies": 0.5 + torch.rand(30)}
    plots.plot_scores(tmp_path / "scores.png", sets, 0.9, score_label="a score")
    assert ink_fills_the_figure(tmp_path / "scores.png")
    (axes,) = figures[0].axes
    for stairs, (name, scores) in zip(axes.patches, sets.items(), strict=True):
        values, edges, _ = stairs.get_data()
        assert values.sum() == pytest.approx(1.0)
        inside = (scores >= edges[3]) & (scores < edges[4])
        assert values[3] == pytest.approx(inside.float().mean().item(), abs=1e-6)
        above = (scores > 0.9).float().mean().item()
        assert stairs.get_label() == f"{name}: {above:.1%} of {len(scores)} above"
    assert list(axes.lines[0].get_xdata()) == [0.9, 0.9]
    (legend,) = figures[0].legends
    assert len(legend.get_texts()) == 3
    assert legend.get_window_extent().y0 >= axes.get_window_extent().y1  # it covers nothing
    assert axes.get_xlabel() == "a score"


def test_roc(tmp_path, figures):
    curve = ROC(np.array([0.0, 0.2, 1.0]), np.array([0.0, 0.9, 1.0]), 0.85)
    plots.plot_roc(tmp_path / "roc.png", curve, (0.1, 0.7))
    assert ink_fills_the_figure(tmp_path / "roc.png")
    (axes,) = figures[0].axes
    assert axes.lines[0].get_xydata().tolist() == [[0, 0], [0.2, 0.9], [1, 1]]
    assert axes.lines[2].get_xydata().tolist() == [[0.1, 0.7]]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "area under the curve 0.8500",
        "chance",
        "threshold: 10.0% and 70.0%",
    ]
    assert axes.get_xlabel().startswith("false positive rate")


@pytest.mark.parametrize("channels", [1, 3])
def test_image_grid(tmp_path, channels):
    """64 images of 28x28 make 224x224 pixels, shown threefold, without borders."""
    images = torch.rand(64, channels, 28, 28)
    plots.write_image_grid(tmp_path / "generated.png", images)
    assert png_size(tmp_path / "generated.png") == (672, 672)
    pixels = read_png(tmp_path / "generated.png")
    for index in (0, 7, 8, 63):
        row, column = divmod(index, 8)
        tile = pixels[84 * row : 84 * (row + 1), 84 * column : 84 * (column + 1)]
        expected = (images[index] * 255).round().byte().permute(1, 2, 0).expand(-1, -1, 3).numpy()
        for shift in range(3):
            np.testing.assert_array_equal(tile[shift::3, shift::3], expected)


@pytest.mark.parametrize("width", [4, 28])
def test_image_grid_with_a_title(tmp_path, width):
    """In a band above the images, which stay as they are; all of it is in the picture, also where that is narrow."""
    images = torch.rand(64, 1, 8, width)
    plots.write_image_grid(tmp_path / "plain.png", images)
    plots.write_image_grid(tmp_path / "titled.png", images, title="64 images from z ~ N(0, I)")
    plain, titled = read_png(tmp_path / "plain.png"), read_png(tmp_path / "titled.png")
    band = len(titled) - len(plain)
    np.testing.assert_array_equal(titled[band:], plain)
    ink = np.nonzero(titled[:band].min(2) < 128)
    assert ink[0].min() > 0 and ink[0].max() < band - 1
    assert ink[1].min() > 0 and ink[1].max() < titled.shape[1] - 1
    assert titled.shape[1] / 3 < ink[1].max() - ink[1].min()
    assert abs(ink[1].min() + ink[1].max() - titled.shape[1]) < 0.1 * titled.shape[1]


def test_image_grid_of_values_outside(tmp_path):
    """Means of some likelihoods lie there; as a byte, -0.01 would be white."""
    images = torch.tensor([-0.01, 1.01]).view(2, 1, 1, 1)
    plots.write_image_grid(tmp_path / "outside.png", images, columns=2)
    plots.write_image_grid(tmp_path / "inside.png", images.clamp(0, 1), columns=2)
    assert (tmp_path / "outside.png").read_bytes() == (tmp_path / "inside.png").read_bytes()


def test_image_grid_keeps_dark_images_dark(tmp_path):
    """No stretching of the contrast: 0 is black and 1 is white, whatever the images hold."""
    plots.write_image_grid(tmp_path / "generated.png", torch.full((64, 1, 4, 4), 0.2))
    assert (read_png(tmp_path / "generated.png") == 51).all()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((64, 2, 4, 4), r"images must have 1 or 3 channels, got shape \[64, 2, 4, 4\]"),
        ((63, 1, 4, 4), "images must fill whole rows of 8, got 63"),
        ((0, 1, 4, 4), "images must fill whole rows of 8, got 0"),
    ],
)
def test_image_grid_errors(tmp_path, shape, message):
    with pytest.raises(ValueError, match=message):
        plots.write_image_grid(tmp_path / "generated.png", torch.zeros(shape))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("power", [1.0, 1e-4, 1e3])
@pytest.mark.parametrize(
    ("scott", "width"),
    [
        (1.0001, 1),
        (1.499, 1),
        (1.501, 2),
        (2.499, 2),
        (2.501, 3),
        (3.999, 3),
        (4.001, 5),
        (7.499, 5),
        (7.501, 10),
        (9.999, 10),
    ],
)
def test_bins_of_matlab(scott, width, power):
    """Eight values at +-a around 40 have Scott's width 3.5 * a * sqrt(8 / 7) / 2."""
    a = scott * power / (1.75 * math.sqrt(8 / 7))
    values = 40 * power + np.tile([a, -a], 4)
    edges = plots.automatic_bins(values)
    np.testing.assert_allclose(np.diff(edges), width * power, rtol=1e-9)
    np.testing.assert_allclose(edges / (width * power), np.round(edges / (width * power)), atol=1e-9)
    assert edges[0] <= values.min() < edges[1]
    assert edges[-2] < values.max() <= edges[-1]


def test_bins_narrow_as_values_grow_in_number():
    values = np.random.default_rng(0).normal(size=1_000_000)
    for count, width in ((1_000, 0.3), (30_000, 0.1), (1_000_000, 0.03)):  # Scott: 0.35, 0.113, 0.035
        np.testing.assert_allclose(np.diff(plots.automatic_bins(values[:count])), width, rtol=1e-9)


@pytest.mark.parametrize("values", [[0.25], [0.25, 0.25, 0.25]])
def test_bins_of_equal_values(values):
    np.testing.assert_array_equal(plots.automatic_bins(np.array(values)), [0.0, 1.0])


def test_tables(tmp_path):
    write_csv(tmp_path / "t.csv", ("a", "b"), [(1, 0.123456789), ("x, y", None)])
    assert (tmp_path / "t.csv").read_text() == 'a,b\n1,0.1234568\n"x, y",\n'
    assert [entry.name for entry in tmp_path.iterdir()] == ["t.csv"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    with replacing(path) as file:
        file.write(b"old")
        assert not path.exists()
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write(b"ne")
        file.flush()
        raise RuntimeError
    assert path.read_bytes() == b"old"
    with replacing(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "write",
    [
        lambda path: plots.plot_losses(path, ROWS),
        lambda path: plots.plot_errors(path, torch.rand(9), deterministic=True),
        lambda path: plots.plot_reconstructions(path, *torch.rand(2, 4, 1, 5, 5), deterministic=True),
        lambda path: plots.write_image_grid(path, torch.rand(8, 1, 5, 5)),
        lambda path: plots.plot_image_rows(path, torch.rand(1, 2, 1, 5, 5), ["a"], ["b", "c"], title="d"),
        lambda path: plots.plot_kl_per_dimension(path, torch.rand(3), torch.ones(3, dtype=torch.bool)),
        lambda path: plots.plot_latent_map(path, torch.rand(3, 2), None, axis_labels=("a", "b")),
        lambda path: plots.plot_scores(path, {"a": torch.rand(3)}, 0.5, score_label="b"),
        lambda path: plots.plot_roc(path, ROC(np.arange(2.0), np.arange(2.0), 0.5), (0.5, 0.5)),
    ],
)
def test_figures_are_written_atomically(tmp_path, monkeypatch, write):
    """A figure that fails in the middle of writing leaves what was there before."""
    path = tmp_path / "figure.png"
    path.write_bytes(b"old")

    def fail(target, *_, **__):
        target.write(b"half of it")
        raise RuntimeError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("matplotlib.image.imsave", fail)
        patch.setattr("matplotlib.figure.Figure.savefig", lambda self, target, **_: fail(target))
        with pytest.raises(RuntimeError, match="the disk is full"):
            write(path)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["figure.png"]
    write(path)
    png_size(path)


def test_matplotlib_is_asked_for_by_name(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for call in (
        plots.require_matplotlib,
        lambda: plots.plot_losses(tmp_path / "loss.png", ROWS),
        lambda: plots.write_image_grid(tmp_path / "grid.png", torch.zeros(8, 1, 2, 2)),
    ):
        with pytest.raises(ImportError, match=r'pip install "fastvae\[examples\]"'):
            call()


def test_no_display_and_no_global_state(tmp_path):
    """The first figure imports matplotlib, and none imports pyplot, which would pick a backend, here one that fails."""
    program = f"""
import sys, os, pathlib
from fastvae import plots
from fastvae.evaluation import ROC
assert "matplotlib" not in sys.modules
import torch
folder = pathlib.Path({str(tmp_path)!r})
plots.plot_errors(folder / "errors.png", torch.rand(9), deterministic=True)
plots.write_image_grid(folder / "grid.png", torch.rand(8, 1, 4, 4))
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    environment = {**os.environ, "MPLBACKEND": "TkAgg"}
    environment.pop("DISPLAY", None)
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
    png_size(tmp_path / "errors.png")
