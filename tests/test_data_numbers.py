"""Tables and signals of one's own, and the choice of classes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import fastvae.functional as F
from fastvae.data import ImageDataset, Standardisation, find_dataset, load_dataset, load_signals, load_table
from fastvae.likelihoods import Bernoulli, Gaussian
from fastvae.models import ConvVAE, TabularVAE

RNG = np.random.default_rng(0)
VALUES = RNG.normal([0.0, 50.0, -3.0], [1.0, 20.0, 0.01], (30, 3))
LABELS = np.arange(30) % 3


def write_csv(path: Path, values=VALUES, names=("height", "weight", "depth"), labels=None, separator=",") -> Path:
    lines = [] if names is None else [separator.join(names if labels is None else ("label", *names))]
    for number, row in enumerate(values):
        cells = [f"{value!r}" for value in row.tolist()]
        lines.append(separator.join(cells if labels is None else [str(labels[number]), *cells]))
    path.write_text("\n".join(lines) + "\n")
    return path


def check(dataset: ImageDataset, train=VALUES[:27], test=VALUES[27:]) -> None:
    """Standardised by the training set's means and deviations, which give the numbers back."""
    mean, scale = train.mean(0), train.std(0)
    assert dataset.name == "table"
    assert dataset.train_images.dtype == torch.float32
    np.testing.assert_allclose(dataset.train_images, (train - mean) / scale, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dataset.test_images, (test - mean) / scale, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dataset.standardisation.undo(dataset.test_images), test, rtol=1e-6, atol=1e-5)
    assert not dataset.has_pictures


@pytest.mark.parametrize("separator", [",", ";", "\t"], ids=repr)
@pytest.mark.parametrize("names", [("height", "weight", "depth"), None], ids=["names", "no names"])
def test_a_csv_file(tmp_path, separator, names):
    path = write_csv(tmp_path / "t.csv", names=names, separator=separator)
    dataset = load_table(path)
    check(dataset)
    assert dataset.columns == (names or ())
    assert dataset.train_labels is None
    assert find_dataset(path) == find_dataset(tmp_path) == "table"
    check(load_dataset("table", tmp_path))


@pytest.mark.parametrize("kind", ["numbers", "texts"])
def test_labels_of_a_csv_file(tmp_path, kind):
    texts = ["setosa", "versi, color", "virginica"]
    labels = LABELS + 4 if kind == "numbers" else [f'"{texts[number]}"' for number in LABELS]
    dataset = load_table(write_csv(tmp_path / "t.csv", labels=labels))
    check(dataset)
    expected = LABELS + 4 if kind == "numbers" else LABELS
    assert torch.cat([dataset.train_labels, dataset.test_labels]).tolist() == expected.tolist()
    assert dataset.class_names == (() if kind == "numbers" else tuple(texts))
    assert dataset.columns == ("height", "weight", "depth")


def test_a_folder_with_a_test_set(tmp_path):
    """Labels of both are numbered together; a spreadsheet's mark at the start of a file is no part of a name."""
    write_csv(tmp_path / "train.csv", VALUES[:20], labels=["b"] * 20)
    write_csv(tmp_path / "test.csv", VALUES[20:], labels=["a", "b"] * 5)
    text = (tmp_path / "train.csv").read_text()
    (tmp_path / "train.csv").write_text(text, encoding="utf-8-sig")
    dataset = load_table(tmp_path)
    check(dataset, VALUES[:20], VALUES[20:])
    assert dataset.class_names == ("a", "b")
    assert dataset.train_labels.unique().tolist() == [1]
    assert dataset.test_labels.tolist() == [0, 1] * 5


@pytest.mark.parametrize("dtype", [np.float64, np.int16, np.uint8])
def test_arrays(tmp_path, dtype):
    """Bytes are numbers too."""
    values = np.rint(np.abs(VALUES) * 3).astype(dtype)
    values[:, 2] = RNG.integers(0, 9, 30)
    path = tmp_path / "t.npy"
    np.save(path, values)
    check(load_table(path), values[:27].astype(float), values[27:].astype(float))
    assert find_dataset(path) == "table"
    np.savez(tmp_path / "t.npz", x_train=values[:20], y_train=LABELS[:20], x_test=values[20:], y_test=LABELS[20:])
    dataset = load_dataset("table", tmp_path / "t.npz", labels=[0, 2])
    assert dataset.train_labels.unique().tolist() == [0, 2]
    assert len(dataset.train_images) == (LABELS[:20] != 1).sum()


def test_a_column_of_one_number_stays_finite(tmp_path):
    values = VALUES.copy()
    values[:, 1] = 0.1  # whose mean is rounded
    np.save(tmp_path / "t.npy", values)
    dataset = load_table(tmp_path / "t.npy")
    assert dataset.standardisation.scale[1] == 1
    assert dataset.train_images[:, 1].abs().max() < 1e-6


def test_the_standardisation_of_a_model_is_kept(tmp_path):
    """Through what a checkpoint and summary.json hold."""
    np.save(tmp_path / "a.npy", VALUES)
    np.save(tmp_path / "b.npy", 2 * VALUES[:10])
    own = load_table(tmp_path / "a.npy").standardisation
    kept = Standardisation(**json.loads(json.dumps(own._asdict())))
    torch.save(own._asdict(), tmp_path / "run.pt")
    assert Standardisation(**torch.load(tmp_path / "run.pt", weights_only=True)) == own
    dataset = load_dataset("table", tmp_path / "b.npy", standardisation=kept)
    assert dataset.standardisation == kept
    expected = (2 * VALUES[:9] - VALUES[:27].mean(0)) / VALUES[:27].std(0)
    np.testing.assert_allclose(dataset.train_images, expected, rtol=1e-5, atol=1e-5)
    np.save(tmp_path / "c.npy", VALUES[:, :2])
    with pytest.raises(ValueError, match=r"c.npy has 2 columns or channels, expected 3, those that the "):
        load_table(tmp_path / "c.npy", standardisation=own)
    with pytest.raises(ValueError, match='standardisation is for the datasets table, signal alone, got one for "npy"'):
        load_dataset("npy", tmp_path / "a.npy", standardisation=own)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "t.csv is empty, expected a row for each sample"),
        ("a,b\n", "t.csv has names of columns and no rows"),
        ("label\nx\n", "t.csv has no column of numbers"),
        ("a,b\n1,2\n3\n", "t.csv, line 3, has 1 cells, expected 2, as in its first line"),
        ("a,b\n1,2\n3,x\n", "t.csv, line 3, b: expected a finite number, got 'x'"),
        ("a,b\n1,2\n3,\n", "t.csv, line 3, b: expected a finite number, got ''"),
        ("a,b\n1,nan\n", "t.csv, line 2, b: expected a finite number, got 'nan'"),
        ("1,\n3,4\n", "t.csv, line 1, column 2: expected a finite number, got ''"),  # not a line of names
        ("1,2\n3,1e999\n", "t.csv, line 2, column 2: expected a finite number, got '1e999'"),
        ("1,2\n", "t.csv has 1 image, expected two or more"),
        ("1,2\n3,\xe9\n", "t.csv cannot be read as .csv: "),
    ],
)
def test_what_is_wrong_with_a_csv_file_is_named(tmp_path, text, message):
    path = tmp_path / "t.csv"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ValueError) as error:
        load_table(path)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros(5), r"a.npy has shape \[5\], expected \[N, F\], a row for each sample"),
        (np.zeros((5, 0)), r"a.npy has shape \[5, 0\], expected at least one sample with at least one number"),
        (np.array([["a"], ["b"]]), "a.npy has dtype <U1, expected numbers"),
        (np.array([[1.0], [np.inf]]), r"a.npy has inf at \[1, 0\], expected finite numbers"),
    ],
)
def test_arrays_that_are_no_table(tmp_path, values, message):
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(ValueError, match=message):
        load_table(tmp_path / "a.npy")


def test_folders_that_are_no_table(tmp_path):
    for name in ("a", "b"):
        write_csv(tmp_path / f"{name}.csv")
    with pytest.raises(ValueError, match=r"has a.csv, b.csv, expected one .csv file, or train.csv and test.csv"):
        load_table(tmp_path)
    write_csv(tmp_path / "train.csv")
    write_csv(tmp_path / "test.csv", names=("x", "y", "z"))
    with pytest.raises(ValueError, match=r"test.csv has other columns than .*train.csv, expected the same"):
        load_table(tmp_path)


def test_a_list_of_labels_beside_pictures_is_no_table(tmp_path):
    from PIL import Image

    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    write_csv(tmp_path / "labels.csv")
    assert find_dataset(tmp_path) == "folder"


# Signals


@pytest.mark.parametrize(
    ("shape", "channels_last"), [((20, 12), False), ((20, 12, 2), True), ((20, 2, 12), False)], ids=str
)
def test_signals(tmp_path, shape, channels_last):
    values = RNG.normal(5, 3, shape)
    np.save(tmp_path / "images.npy", values)
    dataset = load_dataset("signal", tmp_path)
    assert dataset.name == "signal" and not dataset.has_pictures
    expected = values[:, None] if values.ndim == 2 else values.swapaxes(1, 2) if channels_last else values
    mean, scale = (getattr(expected[:18], name)((0, 2)) for name in ("mean", "std"))
    expected = (expected - mean[:, None]) / scale[:, None]
    found = torch.cat([dataset.train_images, dataset.test_images])
    assert found.shape == (20, expected.shape[1], 1, 12)
    np.testing.assert_allclose(found[:, :, 0], expected, rtol=1e-5, atol=1e-6)
    undone = dataset.standardisation.undo(dataset.train_images)
    assert undone.mean().item() == pytest.approx(values[:18].mean(), rel=1e-6)
    model = ConvVAE(tuple(found.shape[1:]), 3, (4,), Gaussian(std=1.0))
    assert model.sample(2).shape == found[:2].shape


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((9, 4, 4), r"has shape \[9, 4, 4\], which is ambiguous: both \[N, L, C\] and \[N, C, L\] fit"),
        ((9, 1, 4, 4), r"has shape \[9, 1, 4, 4\], expected \[N, L\], \[N, L, C\] or \[N, C, L\]"),
    ],
)
def test_arrays_that_are_no_signals(tmp_path, shape, message):
    np.save(tmp_path / "a.npy", np.zeros(shape))
    with pytest.raises(ValueError, match=message):
        load_signals(tmp_path / "a.npy")


# Classes


def test_chosen_classes():
    labels = torch.arange(12) % 4
    images = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1)
    dataset = ImageDataset("n", images, labels, images[:8], labels[:8]).of_classes([1, 3])
    assert dataset.train_images.flatten().tolist() == [1, 3, 5, 7, 9, 11]
    assert dataset.train_labels.tolist() == [1, 3] * 3
    assert dataset.test_images.flatten().tolist() == [1, 3, 5, 7]
    with pytest.raises(ValueError, match=r"labels must be some of the train set's, 1, 3, got 0, 2"):
        dataset.of_classes([0, 2])
    with pytest.raises(ValueError, match="labels were chosen, and n has none"):
        dataset._replace(train_labels=None).of_classes([1])
    assert len(load_dataset("digits", labels=[0]).train_labels.unique()) == 1


# The model of a table


@pytest.mark.parametrize("likelihood", [Gaussian(std=1.0), Gaussian(min_logvar=-7.0)], ids=str)
def test_a_table_is_learned(likelihood, device, tmp_path):
    """Three columns of one number: the model explains them by it."""
    common = RNG.normal(size=(200, 1))
    np.save(tmp_path / "t.npy", 10 * common + RNG.normal(0, 1, (200, 3)))
    data = load_table(tmp_path / "t.npy").train_images.to(device)
    torch.manual_seed(0)
    model = TabularVAE(3, 2, (16, 8), likelihood).to(device)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for _ in range(150):
        output = model(data)
        values, (slopes, kl_grad) = F.elbo_value_and_grad(output.logits, data, output.kl, likelihood=likelihood)
        optimizer.zero_grad()
        parameters = output.logits if isinstance(output.logits, tuple) else (output.logits,)
        slopes = slopes if isinstance(slopes, tuple) else (slopes,)
        torch.autograd.backward([*parameters, output.kl], [*slopes, kl_grad])
        optimizer.step()
        losses.append(values.loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert model.sample(4).shape == (4, 3)


def test_a_tabular_vae_comes_back_from_its_file(tmp_path):
    import fastvae
    from fastvae.export import Decoder, Encoder, write_safetensors
    from fastvae.training import write_checkpoint

    model = TabularVAE(5, 3, (7, 6), Bernoulli())
    write_checkpoint(tmp_path / "checkpoint.pt", model, 1)
    write_safetensors(tmp_path / "model.safetensors", model)
    for name in ("checkpoint.pt", "model.safetensors"):
        loaded = fastvae.load(tmp_path / name)
        assert type(loaded) is TabularVAE and loaded.settings == model.settings
        assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    assert Encoder(model).examples[0].shape == (3, 5)
    assert Decoder(model).output_names == ("data",)
    assert [layer.out_features for layer in model.encoder if hasattr(layer, "out_features")] == [7, 6, 6]
    assert [layer.out_features for layer in model.decoder if hasattr(layer, "out_features")] == [6, 7, 5]
    for arguments in ((0, 3), (5, 0), (5, 3, (4, -1))):
        with pytest.raises(ValueError, match="must be made of positive integers, got"):
            TabularVAE(*arguments)
