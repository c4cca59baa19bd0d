"""examples/train.py on a table, on signals and on some of the classes, and the programs that use such runs."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

import fastvae
from fastvae.data import Standardisation, load_table
from fastvae.models import ConvVAE, TabularVAE
from fastvae.training import read_checkpoint

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def run(monkeypatch):
    """Run main() of a program with these arguments; returns the exit code."""

    def call(name: str, *arguments: object) -> int:
        spec = importlib.util.spec_from_file_location(f"{name}_example", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # its dataclass is looked up there
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        return module.main()

    monkeypatch.setattr("fastvae.plots.figure.DOTS_PER_INCH", 30)
    return call


QUICK = ("--device", "cpu", "--epochs", 2, "--latent-dim", 2, "--batch-size", 8, "--quiet")


@pytest.fixture
def table(tmp_path) -> Path:
    generator = np.random.default_rng(0)
    values = generator.normal([1.0, -20.0, 300.0], [1.0, 5.0, 10.0], (60, 3)).tolist()
    path = tmp_path / "t.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["a", "b", "c", "label"], *([*row, i % 3] for i, row in enumerate(values))])
    return path


def test_a_table(table, tmp_path, run, capsys):
    """Its standardisation is in the checkpoint; it goes on, and is used."""
    folder = tmp_path / "run"
    assert run("train", "--data-dir", table, "--out", folder, *QUICK) == 0
    assert capsys.readouterr() == ("", "")
    model = fastvae.load(folder)
    assert type(model) is TabularVAE and model.columns == 3
    dataset = load_table(table)
    checkpoint = read_checkpoint(folder / "checkpoint.pt")
    assert Standardisation(**checkpoint.run["standardisation"]) == dataset.standardisation
    assert json.loads((folder / "summary.json").read_text())["settings"]["likelihood"] == "gaussian"
    names = {path.name for path in folder.iterdir()}
    assert {"loss.png", "error_histogram.png"} <= names and not {"generated.png", "reconstructions.png"} & names
    assert run("train", "--resume", folder, "--epochs", 3, "--quiet") == 0
    assert len(read_checkpoint(folder / "checkpoint.pt").state.rows) == 3
    assert run("evaluate", folder, "--samples", 2, "--quiet") == 0
    assert run("anomaly", folder, "--quiet") == 0
    assert run("train", "--data-dir", table, "--likelihood", "bernoulli", *QUICK) == 2
    assert "--likelihood must be one of gaussian, laplace for --dataset table, got bernoulli" in capsys.readouterr().err


def test_signals(tmp_path, run):
    folder = tmp_path / "run"
    np.save(tmp_path / "s.npy", np.random.default_rng(0).normal(3, 2, (40, 12, 2)))
    assert run("train", "--dataset", "signal", "--data-dir", tmp_path / "s.npy", "--out", folder, *QUICK) == 0
    model = fastvae.load(folder)
    assert type(model) is ConvVAE and model.image_shape == (2, 1, 12)
    assert run("evaluate", folder, "--samples", 2, "--quiet") == 0


def test_chosen_labels(tmp_path, run, capsys):
    """anomaly.py takes them as the normal ones."""
    folder = tmp_path / "run"
    arguments = ("--dataset", "digits", "--labels", 0, 1, "--limit", 40)
    assert run("train", *arguments, "--out", folder, *QUICK) == 0
    assert read_checkpoint(folder / "checkpoint.pt").run["labels"] == [0, 1]
    assert run("anomaly", folder, "--quiet") == 0
    found = json.loads((folder / "anomaly" / "anomaly.json").read_text())
    assert found["normal_labels"] == [0, 1] and found["training_images"] == 40
    assert found["normal"]["images"] + found["anomalies"]["images"] == 297
    assert run("train", "--resume", folder, "--epochs", 3, "--quiet") == 0
    assert run("train", "--resume", folder, "--labels", 3, "--quiet") == 2
    assert "--labels was [0, 1] in" in capsys.readouterr().err
    assert run("train", "--dataset", "digits", "--labels", 77, *QUICK) == 2
    assert "labels must be some of the train set's, 0, 1, 2" in capsys.readouterr().err
