"""examples/evaluate.py, generate.py and anomaly.py from end to end, on the checkpoint of a tiny model; counts.py on a
few cells.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastvae.program
from fastvae import evaluation
from fastvae.data import ImageDataset, load_dataset
from fastvae.likelihoods import Bernoulli, DiscretizedLogistic, Gaussian, SigmoidMSE
from fastvae.models import ConvVAE, TabularVAE
from fastvae.training import write_checkpoint

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ("evaluate", "generate", "anomaly")
FILES = {
    "evaluate": {
        "evaluation.json",
        "images.csv",
        "error_histogram.png",
        "kl_per_dimension.png",
        "worst_reconstructions.png",
    },
    "generate": {"generated.png", "interpolations.png", "traversals.png", "latent_map.png"},
    "anomaly": {"anomaly.json", "scores.csv", "score_histogram.png", "most_anomalous.png"},
}
SHAPE = (1, 6, 5)


def data(name: str) -> ImageDataset:
    """Of 40 training images the first 30 are trained on; 25 test images of labels 0 to 4."""
    generator = torch.Generator().manual_seed(len(name))
    shape = (3, 6, 5) if name == "colour" else SHAPE
    train, test = (torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator) for count in (40, 25))
    if name == "binary":
        train, test = ((images > 127).to(torch.uint8) * 255 for images in (train, test))
    labels = None if name == "unlabelled" else torch.arange(40) % 5
    return ImageDataset(
        name, train, labels, test // (2 if name == "dark" else 1), None if labels is None else labels[:25]
    )


@pytest.fixture(autouse=True)
def datasets(monkeypatch):
    """load_dataset of made-up images; what it was asked for."""
    asked = []

    def load(name, data_dir, **options):
        asked.append((name, data_dir))
        if name in ("folder", "table"):
            return load_dataset(name, data_dir, **options)
        if name == "absent":
            raise ValueError(f'name must be "mnist" or "digits", got {name!r}')
        return data(name)

    monkeypatch.setattr(fastvae.program, "load_dataset", load)
    return asked


@pytest.fixture(autouse=True)
def coarse_figures(monkeypatch):
    """Most of the programs' time here would go into pixels."""
    monkeypatch.setattr("fastvae.plots.figure.DOTS_PER_INCH", 30)


@pytest.fixture
def saved(tmp_path) -> Path:
    """A run's folder."""
    write_checkpoint(
        tmp_path / "checkpoint.pt",
        ConvVAE(SHAPE, latent_dim=3, channels=(4,)),
        7,
        run={"images": 30, "dataset": "plain", "data_dir": "there"},
    )
    return tmp_path


@pytest.fixture
def run(monkeypatch):
    """Run main() of a program with these arguments; returns the exit code."""

    def call(name: str, *arguments: object) -> int:
        spec = importlib.util.spec_from_file_location(f"{name}_example", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments), "--device", "cpu"])
        return module.main()

    return call


def read(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def check_files(folder: Path, names: set[str]) -> None:
    assert {path.name for path in folder.iterdir()} == names
    for path in folder.glob("*.png"):
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# ---------------------------------------------------------------------------------------------------------- evaluate


@torch.no_grad()
def test_evaluate(saved, run, datasets, capsys):
    assert run("evaluate", saved, "--samples", 5, "--likelihood-images", 8, "--seed", 3) == 0
    output = capsys.readouterr().out
    assert datasets == [("plain", "there")]
    folder = saved / "evaluation"
    check_files(folder, FILES["evaluate"])
    result = json.loads((folder / "evaluation.json").read_text())
    model, images = fastvae.load(saved), data("plain").test_images
    mu, logvar = model.encode(images).double().chunk(2, 1)
    errors = (torch.sigmoid(model.decode(mu.float())).double() - images.double() / 255).square().mean((1, 2, 3))
    assert result["mse"] == pytest.approx(
        {"mean": errors.mean().item(), "median": errors.median().item(), "largest": errors.max().item()}, rel=1e-5
    )
    assert result["loss"] == pytest.approx(evaluation.evaluate(model, images).loss, rel=1e-5)
    bounds = evaluation.elbo(model, images, seed=3)
    assert result["elbo"]["nats"] == pytest.approx(bounds.mean().item(), rel=1e-6)
    assert result["likelihood"] == SigmoidMSE().key
    assert result["elbo"]["bits_per_dimension"] is None  # of a density
    likelihoods = evaluation.log_likelihood(model, images[:8], samples=5, seed=3)
    assert result["log_likelihood"] == {
        "nats": pytest.approx(likelihoods.mean().item(), rel=1e-6),
        "bits_per_dimension": None,
        "samples": 5,
        "images": 8,
        "elbo_of_these_images": pytest.approx(bounds[:8].mean().item(), rel=1e-6),
    }
    kl = (0.5 * (mu.square() + logvar.exp() - 1 - logvar)).mean(0)
    assert result["kl_per_dimension"] == pytest.approx(kl.tolist(), rel=1e-4)
    active = mu.var(0, correction=0) > 0.01
    assert result["active_units"] == {"count": int(active.sum()), "of": 3, "variance_above": 0.01}
    worst = errors.argsort(descending=True)[:20].tolist()
    assert [row["image"] for row in result["worst"]] == worst
    assert [row["label"] for row in result["worst"]] == [index % 5 for index in worst]
    assert result["dataset"] == {"name": "plain", "images": 25, "dimensions": 30}
    assert (result["epoch"], result["seed"]) == (7, 3)
    rows = read(folder / "images.csv")
    assert [float(row["mse"]) for row in rows] == pytest.approx(errors.tolist(), rel=1e-5)
    assert [float(row["elbo"]) for row in rows] == pytest.approx(bounds.tolist(), rel=1e-6)
    assert [float(row["log_likelihood"]) for row in rows[:8]] == pytest.approx(likelihoods.tolist(), rel=1e-6)
    assert {row["log_likelihood"] for row in rows[8:]} == {""}
    assert [row["label"] for row in rows] == [str(index % 5) for index in range(25)]
    assert f"{result['log_likelihood']['nats']:.2f} nats" in output
    assert "5 samples, 8 images" in output
    assert "bits" not in output


@pytest.mark.parametrize(
    ("likelihood", "dataset", "discrete"),
    [
        (DiscretizedLogistic(min_log_scale=-7.0), "plain", True),
        (Bernoulli(), "binary", True),
        (Bernoulli(), "plain", False),
        (Gaussian(), "binary", False),
    ],
    ids=str,
)
def test_bits_per_dimension(tmp_path, run, likelihood, dataset, discrete, capsys):
    """Where p(x) is a probability, and nowhere else."""
    write_checkpoint(tmp_path / "checkpoint.pt", ConvVAE(SHAPE, 3, (4,), likelihood), 7)
    assert run("evaluate", tmp_path, "--dataset", dataset, "--samples", 2) == 0
    output = capsys.readouterr().out
    result = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    for bound in ("elbo", "log_likelihood"):
        nats, bits = result[bound]["nats"], result[bound]["bits_per_dimension"]
        assert bits == (pytest.approx(-nats / 30 / math.log(2), rel=1e-6) if discrete else None)
        assert (f"{nats:.2f} nats, {bits or 0:.4f} bits per dimension" in output) == discrete


# ---------------------------------------------------------------------------------------------------------- generate


@pytest.fixture
def drawn(monkeypatch):
    """What the figures were given, by their file's name."""
    given = {}
    for function in ("write_image_grid", "plot_image_rows", "plot_latent_map"):
        original = getattr(fastvae.plots, function)

        def record(path, *arguments, _original=original, **named):
            given[path.name] = (arguments, named)
            _original(path, *arguments, **named)

        monkeypatch.setattr(fastvae.plots, function, record)
    return given


@torch.no_grad()
def test_generate(saved, run, drawn, capsys):
    assert run("generate", saved, "--between", 3, 18, "--around", 4, "--seed", 5) == 0
    assert "written" in capsys.readouterr().out
    check_files(saved / "generated", FILES["generate"])
    dataset, model = data("plain"), fastvae.load(saved)
    mu = model.encode(dataset.test_images).chunk(2, 1)[0]

    ((samples,), _) = drawn["generated.png"]
    torch.testing.assert_close(samples, model.sample(64, torch.Generator().manual_seed(5)))

    (images, row_labels, column_labels), _ = drawn["interpolations.png"]
    assert images.shape == (1, 11, *SHAPE) and row_labels == ["3 to 18"] and len(column_labels) == 11
    assert torch.equal(images[0, 0], dataset.test_images[3] / 255)
    assert torch.equal(images[0, -1], dataset.test_images[18] / 255)
    for step in range(9):
        z = mu[3] + step / 8 * (mu[18] - mu[3])
        torch.testing.assert_close(images[0, 1 + step], torch.sigmoid(model.decode(z[None]))[0], rtol=1e-4, atol=1e-5)

    (images, row_labels, column_labels), _ = drawn["traversals.png"]
    assert column_labels == ["-3", "-2.25", "-1.5", "-0.75", "0", "0.75", "1.5", "2.25", "3"]
    kl = evaluation.posteriors(model, dataset.test_images).kl
    order = kl.argsort(descending=True).tolist()
    assert row_labels == [f"z[{dimension}], KL {kl[dimension]:.2f}" for dimension in order]
    for row, dimension in enumerate(order):
        for column, value in ((0, -3.0), (5, 0.75)):
            z = mu[4].clone()
            z[dimension] = value
            expected = torch.sigmoid(model.decode(z[None]))[0]
            torch.testing.assert_close(images[row, column], expected, rtol=1e-4, atol=1e-5)

    (points, labels), named = drawn["latent_map.png"]
    expected, share = evaluation.principal_components(mu)
    torch.testing.assert_close(points, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(labels, dataset.test_labels)
    assert f"{share:.0%} of the variance" in named["axis_labels"][1]


def test_generate_by_default(saved, run, drawn):
    """Pairs are of different images, drawn by the seed; traversals begin at z = 0."""
    assert run("generate", saved, "--quiet") == 0
    (images, first_labels, _), _ = drawn["interpolations.png"]
    pairs = [tuple(map(int, label.split(" to "))) for label in first_labels]
    assert len({*sum(pairs, ())}) == 16
    (images, _, _), _ = drawn["traversals.png"]
    model = fastvae.load(saved)
    torch.testing.assert_close(images[0, 4], torch.sigmoid(model.decode(torch.zeros(1, 3)))[0].detach())
    assert run("generate", saved, "--quiet", "--seed", 1) == 0
    assert drawn["interpolations.png"][0][1] != first_labels


@pytest.mark.parametrize("latent_dim", [1, 2])
@torch.no_grad()
def test_map_of_few_latents(tmp_path, run, drawn, latent_dim):
    """Two latents are shown as they are. One image is enough for every picture, and so are no labels."""
    model = ConvVAE(SHAPE, latent_dim, channels=(4,)).eval()
    write_checkpoint(tmp_path / "checkpoint.pt", model, 1)
    assert run("generate", tmp_path, "--dataset", "unlabelled", "--limit", 1, "--quiet") == 0
    check_files(tmp_path / "generated", FILES["generate"])
    (points, labels), named = drawn["latent_map.png"]
    assert labels is None and named["axis_labels"][0] == "mu[0]"
    mu = model.encode(data("unlabelled").test_images[:1]).chunk(2, 1)[0]
    torch.testing.assert_close(points[:, :latent_dim], mu, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- anomaly


def scores_of(model: ConvVAE, images: torch.Tensor) -> np.ndarray:
    return evaluation.reconstruction_errors(model, images, deterministic=True).double().numpy()


def test_anomaly(saved, run, capsys):
    """Without labels in use: which test images stand out. The threshold is of the images that were trained on."""
    assert run("anomaly", saved, "--percentile", 90) == 0
    output = capsys.readouterr().out
    check_files(saved / "anomaly", FILES["anomaly"])
    result = json.loads((saved / "anomaly" / "anomaly.json").read_text())
    model, dataset = fastvae.load(saved), data("plain")
    threshold = np.percentile(scores_of(model, dataset.train_images[:30]), 90)
    scores = scores_of(model, dataset.test_images)
    assert result["threshold"] == pytest.approx(threshold, rel=1e-5)
    assert result["training"] == {"images": 30, "above": 3}
    above = scores > threshold
    assert 0 < above.sum() < 25
    assert result["test"] == {"images": 25, "above": above.sum()}
    assert result["auc"] is None
    rows = read(saved / "anomaly" / "scores.csv")
    assert [float(row["score"]) for row in rows] == pytest.approx(scores.tolist(), rel=1e-5)
    assert [row["above"] for row in rows] == [str(int(mark)) for mark in above]
    assert {row["anomaly"] for row in rows} == {""}
    assert [row["image"] for row in rows] == [str(index) for index in range(25)]
    assert f"{above.sum()} of 25 images above" in output


def test_anomalies_of_another_dataset(saved, run, datasets, capsys):
    assert run("anomaly", saved, "--against", "dark", "--against-dir", "elsewhere", "--limit", 20) == 0
    assert [(name, str(data_dir)) for name, data_dir in datasets] == [("plain", "there"), ("dark", "elsewhere")]
    check_files(saved / "anomaly", FILES["anomaly"] | {"roc.png"})
    result = json.loads((saved / "anomaly" / "anomaly.json").read_text())
    model = fastvae.load(saved)
    normal, odd = (scores_of(model, data(name).test_images[:20]) for name in ("plain", "dark"))
    assert result["auc"] == pytest.approx((odd[:, None] > normal[None]).mean())
    threshold = np.percentile(scores_of(model, data("plain").train_images[:20]), 99)
    assert result["threshold"] == pytest.approx(threshold, rel=1e-5)
    assert result["normal"] == {"images": 20, "above": (normal > threshold).sum()}
    assert result["anomalies"] == {"images": 20, "above": (odd > threshold).sum()}
    assert f"{result['auc']:.4f}" in capsys.readouterr().out
    rows = read(saved / "anomaly" / "scores.csv")
    assert [row["dataset"] for row in rows] == ["plain"] * 20 + ["dark"] * 20
    assert [row["anomaly"] for row in rows] == ["0"] * 20 + ["1"] * 20
    assert [row["image"] for row in rows] == 2 * [str(index) for index in range(20)]


def test_anomalies_of_other_labels(saved, run):
    assert run("anomaly", saved, "--normal", 1, 4, "--score", "elbo", "--seed", 2, "--quiet") == 0
    result = json.loads((saved / "anomaly" / "anomaly.json").read_text())
    model, dataset = fastvae.load(saved), data("plain")
    normal = torch.arange(25) % 5 % 3 == 1
    scores = -evaluation.elbo(model, dataset.test_images, seed=2)
    auc = (scores[~normal][:, None] > scores[normal][None]).double().mean().item()
    assert result["auc"] == pytest.approx(auc)
    assert result["training_images"] == 12  # of 30
    training = dataset.train_images[:30][torch.arange(30) % 5 % 3 == 1]
    threshold = np.percentile(-evaluation.elbo(model, training, seed=2).numpy(), 99)
    assert result["threshold"] == pytest.approx(threshold, rel=1e-6)
    assert (result["normal"]["images"], result["anomalies"]["images"]) == (10, 15)


def test_anomalies_of_a_run_with_chosen_labels(saved, run):
    """As by --normal, of the first images that were trained on."""
    model = fastvae.load(saved)
    settings = {"images": 9, "dataset": "plain", "data_dir": "there", "labels": [1, 4]}
    write_checkpoint(saved / "checkpoint.pt", model, 7, run=settings)
    assert run("anomaly", saved, "--quiet") == 0
    result = json.loads((saved / "anomaly" / "anomaly.json").read_text())
    dataset, normal = data("plain"), torch.arange(25) % 5 % 3 == 1
    assert result["normal_labels"] == [1, 4]
    assert result["training_images"] == 9
    training = dataset.of_classes([1, 4]).train_images[:9]
    threshold = np.percentile(scores_of(model, training), 99)
    assert result["threshold"] == pytest.approx(threshold, rel=1e-5)
    assert (result["normal"]["images"], result["anomalies"]["images"]) == (normal.sum(), (~normal).sum())
    # Of another dataset's images the normal ones are those of the labels that were trained on.
    assert run("anomaly", saved, "--against", "dark", "--quiet") == 0
    result = json.loads((saved / "anomaly" / "anomaly.json").read_text())
    assert (result["normal"]["images"], result["anomalies"]["images"]) == (10, 25)
    assert run("evaluate", saved, "--samples", 2, "--quiet") == 0
    evaluated = json.loads((saved / "evaluation" / "evaluation.json").read_text())
    assert evaluated["dataset"]["images"] == 10
    write_checkpoint(saved / "checkpoint.pt", model, 7, run={**settings, "labels": [8]})
    assert run("evaluate", saved) == 2


@pytest.fixture
def of_table(tmp_path) -> Path:
    """The run of a table."""
    generator = np.random.default_rng(0)
    values = generator.normal([1.0, -20.0, 300.0], [1.0, 5.0, 10.0], (60, 3))
    rows = [["a", "b", "c", "label"], *([*map(repr, map(float, row)), str(i % 3)] for i, row in enumerate(values))]
    (tmp_path / "t.csv").write_text("\n".join(map(",".join, rows)))
    dataset = load_dataset("table", tmp_path)
    model = TabularVAE(3, 2, (5,), Gaussian(min_logvar=-7.0))
    run = {
        "images": 54,
        "dataset": "table",
        "data_dir": str(tmp_path),
        "standardisation": dataset.standardisation._asdict(),
    }
    write_checkpoint(tmp_path / "checkpoint.pt", model, 2, run=run)
    return tmp_path


@torch.no_grad()
def test_programs_on_a_table(of_table, run, capsys):
    """Standardised as in training, also another table; no pictures."""
    model, dataset = fastvae.load(of_table), load_dataset("table", of_table)
    assert run("evaluate", of_table, "--samples", 2) == 0
    check_files(of_table / "evaluation", FILES["evaluate"] - {"worst_reconstructions.png"})
    assert "worst" not in capsys.readouterr().out
    result = json.loads((of_table / "evaluation" / "evaluation.json").read_text())
    expected = evaluation.evaluate(model, dataset.test_images)
    assert result["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert result["elbo"]["bits_per_dimension"] is None
    other = of_table / "other.npy"
    np.save(other, np.random.default_rng(1).normal(0, 1, (40, 3)))
    assert run("anomaly", of_table, "--against", "table", "--against-dir", other, "--quiet") == 0
    check_files(of_table / "anomaly", FILES["anomaly"] - {"most_anomalous.png"} | {"roc.png"})
    rows = read(of_table / "anomaly" / "scores.csv")
    others = load_dataset("table", other, standardisation=dataset.standardisation).test_images
    scores = scores_of(model, torch.cat([dataset.test_images, others]))
    assert [float(row["score"]) for row in rows] == pytest.approx(scores.tolist(), rel=1e-5)
    assert run("anomaly", of_table, "--normal", 0, "--quiet") == 0
    assert run("generate", of_table) == 2
    assert "table has no pictures" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- all three


@pytest.mark.parametrize("name", NAMES)
def test_a_second_call_replaces_the_first(saved, run, name, capsys):
    """Another seed over the files of the first, with what was left of one that was killed; notes stay. A checkpoint's
    file is as good as its folder.
    """
    out = saved / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    if name == "anomaly":
        (out / "roc.png").write_text("of an earlier call with labels")
    else:
        (out / f".{min(FILES[name])}.0123.part").write_text("half")
    few = {"evaluate": ("--samples", 2), "generate": ("--between", 0, 1), "anomaly": ("--score", "elbo")}[name]
    contents = []
    for seed, path in ((0, saved), (1, saved), (0, saved / "checkpoint.pt")):
        assert run(name, path, *few, "--seed", seed, "--out", out, "--quiet") == 0
        assert capsys.readouterr() == ("", "")
        assert {path.name for path in out.iterdir()} == FILES[name] | {"notes.txt"}
        contents.append({path.name: path.read_bytes() for path in out.iterdir()})
    first, second, third = contents
    assert first == third
    changed = {"evaluate": "images.csv", "generate": "generated.png", "anomaly": "scores.csv"}[name]
    assert first[changed] != second[changed]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}/nothing"], "No such file or directory: '{folder}/nothing'"),
        (["{folder}/empty"], "No such file or directory: '{folder}/empty/checkpoint.pt'"),
        (["{folder}/text"], "{folder}/text is not a checkpoint of fastvae"),
        (["{folder}", "--dataset", "absent"], '--dataset absent: name must be "mnist" or "digits"'),
        (
            ["{folder}", "--dataset", "colour"],
            "--dataset colour: its images have shape [3, 6, 5], the model's [1, 6, 5]",
        ),
        (["{folder}/bare.pt"], "--dataset must be given: {folder}/bare.pt does not say what it was trained on"),
        (["{folder}", "--out", "{folder}/text"], "--out must be a folder, got the file {folder}/text"),
        (["{folder}", "--out", "{folder}/text/deeper"], "--out cannot be written: "),
        (["{folder}", "--limit", "0"], "argument --limit: must be a positive integer, got '0'"),
        (["{folder}", "--seed=-1"], "argument --seed: must be an integer from 0 to 2^63 - 1, got '-1'"),
        ([], "the following arguments are required: RUN"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("name", NAMES)
def test_what_the_user_can_put_right_is_one_line_and_code_2(saved, run, name, arguments, message, capsys):
    (saved / "empty").mkdir()
    (saved / "text").write_text("nothing")
    write_checkpoint(saved / "bare.pt", ConvVAE(SHAPE, 3, (4,)), 1)
    assert run(name, *(argument.format(folder=saved) for argument in arguments)) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith(f"{name}.py: error: ")
    assert message.format(folder=saved) in errors
    assert errors.count("\n") == 1
    assert {path.name for path in saved.iterdir()} == {"checkpoint.pt", "bare.pt", "empty", "text"}


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("generate", ["--between", "3", "25"], "--between must be at most 24, the last test image, got 25"),
        ("generate", ["--around", "9", "--limit", "9"], "--around must be at most 8, the last test image, got 9"),
        ("generate", ["--around", "x"], "argument --around: must be the number of a test image, from 0, got 'x'"),
        ("anomaly", ["--percentile", "101"], "argument --percentile: must be a number from 0 to 100, got '101'"),
        ("anomaly", ["--percentile", "nan"], "argument --percentile: must be a number from 0 to 100, got 'nan'"),
        ("anomaly", ["--normal", "0", "--dataset", "unlabelled"], "--normal needs labels, and unlabelled has none"),
        ("anomaly", ["--normal", "8"], "--normal: none of the 30 training images has such a label"),
        ("anomaly", ["--normal", "0", "1", "2", "3", "4"], "--normal must split the test images in two, but every one"),
        ("anomaly", ["--normal", "1", "--against", "dark"], "not allowed with argument"),
        (
            "anomaly",
            ["--against", "colour"],
            "--against colour: its images have shape [3, 6, 5], the model's [1, 6, 5]",
        ),
        ("anomaly", ["--against-dir", "."], "--against-dir is of --against, which was not given"),
        ("anomaly", ["--score", "mse"], "argument --score: invalid choice: 'mse'"),
        ("evaluate", ["--samples", "0"], "argument --samples: must be a positive integer, got '0'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_of_one_program(saved, run, name, arguments, message, capsys):
    assert run(name, saved, *arguments) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"{name}.py: error: ")
    assert message in errors
    assert errors.count("\n") == 1
    assert {path.name for path in saved.iterdir()} == {"checkpoint.pt"}


@pytest.mark.parametrize("name", ["evaluate", "anomaly"])
def test_without_labels(saved, run, name):
    assert (
        run(name, saved, "--dataset", "unlabelled", "--quiet", *(["--samples", 2] if name == "evaluate" else [])) == 0
    )


@pytest.mark.parametrize("name", NAMES)
def test_pictures_of_any_size(saved, run, name, monkeypatch, capsys):
    """A folder of colour pictures, resized to the model's size and grey; what cannot be read is counted."""
    from PIL import Image

    monkeypatch.setenv("FASTVAE_DATA", str(saved / "cache"))
    for part in ("train", "test"):
        (saved / "pictures" / part / "a").mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (20 + number, 31), (90 * number, 0, 9)).save(
                saved / "pictures" / part / "a" / f"{number}.png"
            )
    (saved / "pictures" / "test" / "a" / "broken.png").write_text("nothing")
    few = ("--samples", 2) if name == "evaluate" else ()
    assert run(name, saved, "--dataset", "folder", "--data-dir", saved / "pictures", *few) == 0
    output, errors = capsys.readouterr()
    assert "3 test images on cpu; files that are not read: 1\n" in output
    assert errors == ""


@pytest.mark.parametrize(
    ("name", "arguments", "module", "message"),
    [
        *((name, [], "matplotlib", "figures need matplotlib") for name in NAMES),
        ("anomaly", ["--against", "dark"], "sklearn", "roc needs scikit-learn"),
    ],
)
def test_missing_packages(saved, run, name, arguments, module, message, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    assert run(name, saved, *arguments, "--quiet") == 2
    errors = capsys.readouterr().err
    assert message in errors and 'pip install "fastvae[examples]"' in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_is_one_line(saved, run, name, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "the file")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    few = ("--samples", 2) if name == "evaluate" else ()
    assert run(name, saved, *few, "--quiet") == 2
    assert capsys.readouterr().err == f"{name}.py: error: [Errno 28] No space left on device: 'the file'\n"
    assert not [path for path in saved.rglob("*.part")]


@pytest.mark.parametrize("name", NAMES)
def test_an_interrupt_leaves_no_half_file(saved, run, name, monkeypatch, capsys):
    """Ctrl-C while a figure is being written."""

    def interrupted(figure, file, **_):
        file.write(b"half of it")
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", interrupted)
    few = ("--samples", 2) if name == "evaluate" else ()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        assert run(name, saved, *few, "--quiet") == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr() == ("", f"{name}.py: aborted\n")
    left = {path.name for path in saved.rglob("*") if path.is_file()}
    assert left - {"checkpoint.pt"} < FILES[name]  # whole ones, written before


# ------------------------------------------------------------------------------------------------------------ counts


def example(monkeypatch, name):
    """Of examples/NAME.py what it is made of, and ``call``, its main()."""
    spec = importlib.util.spec_from_file_location(f"{name}_example", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)

    def call(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments), "--device", "cpu"])
        return module.main()

    module.call = call
    return module


@pytest.fixture
def counts(monkeypatch):
    return example(monkeypatch, "counts")


@pytest.mark.parametrize("likelihood", ["zinb", "nb"])
def test_counts(tmp_path, counts, drawn, likelihood, capsys):
    """It learns, and the likelihood that has a dispersion is better than Poisson's, which here is far off."""
    small = ("--cells", 600, "--genes", 60, "--seed", 2, "--likelihood", likelihood, "--out", tmp_path)
    assert counts.call(*small, "--epochs", 1) == 0
    first = json.loads((tmp_path / "summary.json").read_text())
    assert counts.call(*small, "--epochs", 10) == 0
    check_files(tmp_path, {"latent_map.png", "summary.json"})
    result = json.loads((tmp_path / "summary.json").read_text())
    output = capsys.readouterr().out
    assert list(result["models"]) == [likelihood, "poisson"]
    for name, found in result["models"].items():
        assert found["negative_elbo"] < first["models"][name]["negative_elbo"]
        assert f"{name:<10} -log p(x) at most {found['negative_elbo']:.2f} nats per test cell" in output
    assert result["models"][likelihood]["negative_elbo"] < result["models"]["poisson"]["negative_elbo"] - 10
    assert result["constant_rates"] == first["constant_rates"]
    (points, types), named = drawn["latent_map.png"]
    assert points.shape == (120, 2) and len(types) == 120
    assert named["title"] == f"Posterior means of 120 test cells, coloured by type, {likelihood}"


def test_the_numbers_of_counts(counts):
    """Against torch.distributions, and by hand."""
    torch.manual_seed(0)
    train, test = (counts.simulate(cells, 30).counts for cells in (40, 20))
    shares = (train.sum(0) + 1) / (train.sum() + 30)
    rates = torch.distributions.Poisson(test.sum(1, keepdim=True) * shares)
    assert counts.constant_rates(train, test) == pytest.approx(-rates.log_prob(test).sum(1).mean().item(), rel=1e-5)
    mu = torch.tensor([[0.0, 0.0], [0.1, 0.0], [5.0, 5.0], [5.0, 5.2], [0.0, 0.15]])
    assert counts.same_type_beside(mu, torch.tensor([1, 1, 2, 3, 1])) == pytest.approx(0.6)
    model = counts.CountVAE(30, counts.LIKELIHOODS["zinb"])
    model(test).loss.backward()
    assert model.log_dispersion.grad.shape == (30,) and model.log_dispersion.grad.abs().min() > 0
    assert model(torch.zeros(2, 30)).loss.isfinite()  # cells without a count


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--likelihood", "poisson"], "argument --likelihood: invalid choice: 'poisson'"),
        (["--cells", "9"], "--cells must be at least 10, because a fifth of them is for the test, got 9"),
    ],
)
def test_flags_of_counts(tmp_path, counts, arguments, message, capsys):
    assert counts.call(*arguments, "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err.startswith(f"counts.py: error: {message}")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------ ladder


def test_hierarchical(tmp_path, monkeypatch, drawn, capsys):
    """Two steps; every group has a divergence, every weight a gradient, and a sample is the prior's alone."""
    ladder = example(monkeypatch, "hierarchical")
    digits = ladder.load_digits()
    few = digits._replace(train_images=digits.train_images[:64], test_images=digits.test_images[:12])
    monkeypatch.setattr(ladder, "load_digits", lambda: few)
    assert ladder.call("--epochs", 1, "--out", tmp_path) == 0
    check_files(tmp_path, {"generated.png", "groups.png", "summary.json"})
    result = json.loads((tmp_path / "summary.json").read_text())
    assert len(result["divergences"]) == 3 and min(result["divergences"]) > 0
    assert f"negative ELBO {result['negative_elbo']:.2f} nats" in capsys.readouterr().out
    model = ladder.Ladder()
    found = model(few.train_images[:2])
    (found.kl.sum() + sum(it.sum() for it in found.parameters)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.sample(2).shape == (2, 1, 28, 28)
    # With no group's posterior, it is the decoder's means alone, whatever the images.
    assert torch.equal(*(model(images, 0).parameters[0] for images in few.train_images[:4].split(2)))
