"""examples/train.py from end to end, on a few of the bundled digits."""

from __future__ import annotations

import contextlib
import csv
import errno
import importlib.util
import json
import os
import platform
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastvae import program
from fastvae.data import DownloadError, load_digits
from fastvae.models import ConvVAE
from fastvae.models.named import OF_PICTURES
from fastvae.program import UserError
from fastvae.training import GraphError, TrainingState
from fastvae.training import run as training_run
from fastvae.training.folder import locked, prepare_run

SCRIPT = Path(__file__).parents[1] / "examples" / "train.py"
FILES = {
    "metrics.csv",
    "summary.json",
    "checkpoint.pt",
    "loss.png",
    "reconstructions.png",
    "error_histogram.png",
    "generated.png",
}
# fp32: some tests compute a run's numbers again.
SMALL = ("--dataset", "digits", "--device", "cpu", "--limit", "64", "--batch-size", "16", "--precision", "fp32")


@pytest.fixture(scope="module")
def example():
    """The script as a module, so that most tests need no process of their own."""
    spec = importlib.util.spec_from_file_location("train_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass is looked up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(example, monkeypatch):
    """Run main() with these arguments; returns the exit code."""

    def call(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        return example.main()

    return call


@pytest.fixture
def no_training(monkeypatch):
    """An error must come before training."""

    def fail(*_, **__):
        raise AssertionError("training began")

    monkeypatch.setattr(training_run, "train", fail)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{name: float(value) for name, value in row.items()} for row in rows]


def check_folder(folder: Path, *, interrupted: bool, epochs: int | None = None) -> tuple[list[dict[str, float]], dict]:
    """Every file is there, is what it should be, and agrees with the others; nothing else is."""
    assert {path.name for path in folder.iterdir()} - {"checkpoint.previous.pt", ".lock"} == {*FILES, "tensorboard"}
    rows = read_metrics(folder)
    header = "epoch,step,loss,reconstruction,kl,test_loss,test_mse,seconds,skipped,learning_rate"
    assert ",".join(rows[0]) == header
    assert [row["epoch"] for row in rows] == list(range(1, len(rows) + 1))
    if epochs is not None:
        assert len(rows) == epochs
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["interrupted"] is interrupted
    assert summary["ended"] == ("interrupted" if interrupted else "epochs")
    assert summary["best"]["test_loss"] == pytest.approx(min(row["test_loss"] for row in rows), rel=1e-6)
    assert summary["final"] == pytest.approx(rows[-1], rel=1e-6)
    assert (summary["final"]["step"] < summary["planned_steps"]) is interrupted
    assert set(summary["versions"]) == {"python", "torch", "triton", "fastvae"}
    assert summary["backend"]["name"] in ("reference", "triton")
    assert summary["parameters"] == 228_193
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert saved["epoch"] == len(rows)
    model = ConvVAE(**saved["settings"])
    model.load_state_dict(saved["model"])
    # The checkpoint is the model whose numbers stand in the last row.
    images = load_digits().test_images
    mse = (model.reconstruct(images, deterministic=True) - images / 255).square().mean().item()
    assert mse == pytest.approx(rows[-1]["test_mse"], rel=1e-4)
    for name in FILES:
        if name.endswith(".png"):
            assert (folder / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", (folder / "generated.png").read_bytes()[16:24]) == (672, 45 + 672)
    return rows, summary


@pytest.mark.slow
def test_end_to_end(tmp_path):
    """In a process of its own, as it is used; standard output is no terminal there."""
    result = subprocess.run(
        [sys.executable, SCRIPT, *SMALL, "--epochs", "3", "--out", tmp_path / "run"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        # Some versions of torch warn of their own older settings.
        env={**os.environ, "PYTHONWARNINGS": "ignore:Please use the new API settings"},
    )
    rows, summary = check_folder(tmp_path / "run", interrupted=False, epochs=3)
    assert [row["step"] for row in rows] == [4, 8, 12]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert summary["settings"]["epochs"] == 3
    assert summary["settings"]["batch_size"] == 16
    assert summary["settings"]["out"] == str(tmp_path / "run")
    assert summary["dataset"] == {"name": "digits", "training": 64, "test": 297, "skipped": []}
    lines = result.stdout.splitlines()
    (line,) = [line for line in lines if line.startswith("dataset")]
    assert "digits" in line
    assert "--dataset mnist" in line
    assert [line.split()[0] for line in lines[:5]] == ["device", "backend", "dataset", "model", "training"]
    assert summary["backend"]["reason"] in lines[1]
    assert "228,193" in lines[3]
    assert sum(line.startswith("epoch ") for line in lines) == 3
    assert result.stderr == ""


def test_a_second_run_leaves_nothing_of_the_first(tmp_path, run, capsys):
    """Fewer epochs, another seed and --quiet over the output of a longer run."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "loss.png").write_text("of an earlier run")
    assert run(*SMALL, "--epochs", 2, "--seed", 1, "--out", folder) == 0
    first, summary = check_folder(folder, interrupted=False, epochs=2)
    pixels = (folder / "generated.png").read_bytes()
    capsys.readouterr()
    assert run(*SMALL, "--epochs", 1, "--deterministic", "--quiet", "--out", folder) == 0
    assert capsys.readouterr() == ("", "")
    second, summary = check_folder(folder, interrupted=False, epochs=1)
    assert summary["settings"]["deterministic"] is True
    assert second[0]["loss"] != first[0]["loss"]
    assert (folder / "generated.png").read_bytes() != pixels


def test_an_aborted_run_leaves_nothing_of_the_one_before(tmp_path, run, monkeypatch, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (*FILES, "notes.txt"):
        (folder / name).write_text("old")

    def abort(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(training_run, "train", abort)
    assert run(*SMALL, "--out", folder) == 130
    assert capsys.readouterr().err == "train.py: aborted\n"
    assert {path.name for path in folder.iterdir()} == {"metrics.csv", "notes.txt", "tensorboard", ".lock"}
    assert read_metrics(folder) == []


def test_a_capture_that_fails_is_one_line(tmp_path, run, capsys, monkeypatch):
    def fail(*_, **__):
        raise GraphError("the capture of a CUDA graph failed: ValueError: x")

    monkeypatch.setattr(training_run, "train", fail)
    assert run(*SMALL, "--out", tmp_path) == 1
    words = "train.py: the capture of a CUDA graph failed: ValueError: x (--graph auto goes on without)\n"
    assert capsys.readouterr().err == words


def test_a_seed_repeats_a_run(tmp_path, run):
    for name in ("a", "b"):
        assert run(*SMALL, "--epochs", 1, "--seed", 7, "--quiet", "--out", tmp_path / name) == 0
    a, b = (read_metrics(tmp_path / name)[0] for name in ("a", "b"))
    assert a.pop("seconds") != b.pop("seconds")
    assert a == b
    assert (tmp_path / "a" / "generated.png").read_bytes() == (tmp_path / "b" / "generated.png").read_bytes()


@pytest.mark.slow
def test_interrupt_ends_training_and_writes_everything(tmp_path):
    """Ctrl-C in the middle of a long run, in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *SMALL, "--epochs", "100000", "--out", tmp_path / "run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for line in process.stdout:
            if line.startswith("epoch 2/"):
                break
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert "stopping" in errors
    rows, _ = check_folder(tmp_path / "run", interrupted=True)
    assert 2 <= len(rows) < 1000
    assert "stopped early" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "cifar"], "argument --dataset: invalid choice: 'cifar'"),
        (["--epochs", "0"], "argument --epochs: must be a positive integer, got '0'"),
        (["--epochs", "2.5"], "argument --epochs: must be a positive integer, got '2.5'"),
        (["--batch-size", "-3"], "argument --batch-size: must be a positive integer, got '-3'"),
        (["--latent-dim", "x"], "argument --latent-dim: must be a positive integer, got 'x'"),
        (["--likelihood", "student-t"], "argument --likelihood: invalid choice: 'student-t'"),
        (["--lr", "0"], "argument --lr: must be a positive number, got '0'"),
        (["--lr", "inf"], "argument --lr: must be a positive number, got 'inf'"),
        (["--lr", "fast"], "argument --lr: must be a positive number, got 'fast'"),
        (["--beta", "nan"], "argument --beta: must be a number that is not negative, got 'nan'"),
        (["--beta=-1"], "argument --beta: must be a number that is not negative, got '-1'"),
        (["--ema", "1"], "argument --ema: must be a number between 0 and 1, got '1'"),
        (["--clip-norm", "0"], "argument --clip-norm: must be a positive number, got '0'"),
        (["--patience", "0"], "argument --patience: must be a positive integer, got '0'"),
        (["--schedule", "step"], "argument --schedule: invalid choice: 'step'"),
        (["--seed=-1"], "argument --seed: must be an integer from 0 to 2^63 - 1, got '-1'"),
        (["--limit", "0"], "argument --limit: must be a positive integer, got '0'"),
        (["--epoch", "1"], "unrecognized arguments: --epoch 1"),
        (["--samples", "4"], "samples must be left out for the objective elbo, which has one, got 4"),
        (
            [*SMALL, "--prior", "vamp", "--objective", "mmd"],
            'objective must be "elbo", "iwae" or "dreg" where the model',
        ),
        ([*SMALL, "--limit", "10"], "--batch-size must be at most 10, the number of images, got 16"),
    ],
)
def test_a_bad_flag_is_one_line_and_code_2(tmp_path, run, no_training, capsys, arguments, message):
    assert run("--out", tmp_path / "run", *arguments) == 2
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith(f"train.py: error: {message}")
    assert errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="--device cuda is right where there is one")
def test_no_cuda_device(tmp_path, run, no_training, capsys):
    assert run("--device", "cuda", "--out", tmp_path / "run") == 2
    assert capsys.readouterr().err.startswith("train.py: error: --device cuda: there is no CUDA device")


def test_out_is_a_file(tmp_path, run, no_training, capsys):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        assert run(*SMALL, "--out", out) == 2
        errors = capsys.readouterr().err
        assert errors.startswith("train.py: error: --out")
        assert str(out) in errors
        assert errors.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_out_cannot_be_written(tmp_path, run, no_training, capsys, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(tmp_path / "run"))

    monkeypatch.setattr("fastvae.files.replacing", refuse)
    assert run(*SMALL, "--out", tmp_path / "run") == 2
    assert "--out cannot be written: [Errno 13] Permission denied" in capsys.readouterr().err


def test_missing_data(tmp_path, run, no_training, capsys, monkeypatch):
    def unavailable(name, data_dir):
        assert (name, data_dir) == ("mnist", tmp_path / "data")
        raise DownloadError("cannot download it, every mirror failed:\n  here: no\n  there: no")

    monkeypatch.setattr(program, "load_dataset", unavailable)
    assert run("--dataset", "mnist", "--data-dir", tmp_path / "data", "--out", tmp_path / "run") == 2
    assert capsys.readouterr().err == ("train.py: error: cannot download it, every mirror failed: here: no there: no\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("module", "name"), [("matplotlib", "figures"), ("sklearn", "load_digits")])
def test_missing_packages(tmp_path, run, no_training, capsys, monkeypatch, module, name):
    monkeypatch.setitem(sys.modules, module, None)
    assert run(*SMALL, "--out", tmp_path / "run") == 2
    errors = capsys.readouterr().err
    assert name in errors
    assert 'pip install "fastvae[examples]"' in errors
    assert errors.count("\n") == 1


def test_divergence_is_one_line_and_code_1(tmp_path, run, capsys):
    assert run(*SMALL, "--lr", "1e9", "--epochs", "3", "--quiet", "--out", tmp_path / "run") == 1
    errors = capsys.readouterr().err
    assert errors.startswith("train.py: training diverged: at step 2, in epoch 1, the loss is ")
    assert "not finite by now: encoder.conv1.weight, " in errors
    assert errors.count("\n") == 1


def test_choice_of_the_dataset(monkeypatch):
    """auto: digits on a CPU; MNIST on a CUDA device, or digits where it is not to be had. Each names the other flag."""
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    digits = load_digits()
    mnist = digits._replace(name="mnist")
    monkeypatch.setattr(program, "load_dataset", lambda name, data_dir=None: mnist if name == "mnist" else digits)
    for name, device, expected, other in (
        ("auto", cpu, "digits", "--dataset mnist"),
        ("auto", cuda, "mnist", "--dataset digits"),
        ("mnist", cpu, "mnist", "--dataset digits"),
        ("digits", cuda, "digits", "--dataset mnist"),
    ):
        dataset, reason = program.choose_dataset(name, None, device)
        assert dataset.name == expected
        assert other in reason

    def unavailable(name, data_dir=None):
        if name == "digits":
            return digits
        raise DownloadError("cannot download it, every mirror failed:\n  here: no")

    monkeypatch.setattr(program, "load_dataset", unavailable)
    dataset, reason = program.choose_dataset("auto", None, cuda)
    assert dataset.name == "digits"
    assert "cannot download it, every mirror failed" in reason
    assert "\n" not in reason
    with pytest.raises(DownloadError):
        program.choose_dataset("mnist", None, cuda)


def test_default_folder_and_defaults(tmp_path, example, monkeypatch):
    """Runs that start in the same second get folders of their own."""
    monkeypatch.chdir(tmp_path)
    with contextlib.ExitStack() as held:
        folders = [prepare_run(None, "digits", True, held) for _ in range(3)]
    assert len({folder.resolve() for folder in folders}) == 3
    for folder in folders:
        assert folder.parent == Path("runs")
        assert folder.name.startswith("digits-2")
        assert folder.is_dir()
    monkeypatch.setattr(sys, "argv", ["train.py"])
    options, given = program.parse_settings(program.Parser(None), example.Options)
    assert given == set()
    assert program.flag_values(options) == {
        "dataset": "auto",
        "data_dir": None,
        "image_size": None,
        "strict": False,
        "device": "auto",
        "backend": "auto",
        "graph": "auto",
        "precision": "tf32",
        "epochs": 30,
        "batch_size": None,
        "latent_dim": 16,
        "likelihood": None,
        "prior": "standard",
        "objective": "elbo",
        "samples": None,
        "labels": None,
        "lr": 1e-3,
        "beta": 1.0,
        "kl_warmup": 0.0,
        "free_bits": 0.0,
        "clip_norm": None,
        "schedule": "constant",
        "ema": None,
        "patience": None,
        "skip_nonfinite": False,
        "seed": 0,
        "limit": None,
        "deterministic": False,
        "out": None,
        "resume": None,
        "checkpoint_every": 1,
        "quiet": False,
    }
    monkeypatch.setattr(sys, "argv", ["train.py", "--lr", "1e-3", "--quiet"])
    options, given = program.parse_settings(program.Parser(None), example.Options)
    assert given == {"learning_rate", "quiet"}  # given, though as by default
    assert program.BATCH_SIZES["mnist"] == 128


def test_backend_flag(tmp_path, run, monkeypatch, capsys):
    """--backend chooses, and without it the environment's choice stays in force."""
    import fastvae

    seen = []

    def look(model, images, *_, **__):
        seen.append(fastvae.backend_for(images.float()).reason)
        raise KeyboardInterrupt

    monkeypatch.setattr(training_run, "train", look)
    assert run(*SMALL, "--backend", "reference", "--out", tmp_path / "run") == 130
    with fastvae.use_backend("reference"):
        assert run(*SMALL, "--out", tmp_path / "run") == 130
        assert run(*SMALL, "--backend", "triton", "--out", tmp_path / "run") in (2, 130)
    assert seen[:2] == ["asked for", "asked for"]
    capsys.readouterr()


def test_options_of_training(tmp_path, run, monkeypatch, capsys):
    """They reach the loop; what is shown and loaded is the average; the best epoch is kept."""
    import fastvae
    from fastvae.training import loop, read_checkpoint

    losses = iter([90.0, 80.0, 81.0, 82.0, 83.0])
    real = loop.evaluate
    monkeypatch.setattr(loop, "evaluate", lambda *a, **k: real(*a, **k)._replace(loss=next(losses)))
    options = ("--ema", 0.5, "--patience", 2, "--schedule", "cosine", "--clip-norm", 1, "--skip-nonfinite")
    assert run(*SMALL, *options, "--epochs", 5, "--out", tmp_path) == 0
    assert "stopped early: epoch 2 has the smallest test loss, and is in checkpoint.best.pt" in capsys.readouterr().out
    rows = read_metrics(tmp_path)
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-3, 9.0451e-4, 6.5451e-4, 3.4549e-4], rel=1e-4)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["ended"], summary["interrupted"], summary["best"]["epoch"]) == ("patience", False, 2)
    assert read_checkpoint(tmp_path / "checkpoint.best.pt").epoch == 2
    assert not (tmp_path / "checkpoint.best.previous.pt").exists()
    images = load_digits().test_images
    mse = (fastvae.load(tmp_path).reconstruct(images, deterministic=True) - images / 255).square().mean().item()
    assert mse == pytest.approx(rows[-1]["test_mse"], rel=1e-4)
    # What it was called with is refused where it would be another, and taken over where it is not given.
    monkeypatch.setattr(training_run, "train", lambda *_, **__: pytest.fail("training began"))
    for arguments, words in (
        (("--ema", 0.9), "--ema was 0.5 in"),
        (("--epochs", 7), "--epochs was 5 in"),
        (("--clip-norm", 2), "--clip-norm was 1.0 in"),
        (("--schedule", "constant"), "--schedule was cosine in"),
    ):
        assert run("--resume", tmp_path, *arguments) == 2
        assert words in capsys.readouterr().err


def test_the_names_of_likelihoods():
    assert list(OF_PICTURES) == [
        "sigmoid-mse",
        "bernoulli",
        "continuous-bernoulli",
        "gaussian",
        "laplace",
        "discretized-logistic",
    ]


@pytest.mark.parametrize("name", ["gaussian", "discretized-logistic"])
def test_a_likelihood(tmp_path, run, name, capsys):
    """It trains, is kept in the checkpoint, makes the pictures, and goes on."""
    import fastvae

    likelihood = OF_PICTURES[name]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(*SMALL, "--likelihood", name, "--epochs", 2, "--out", whole) == 0
    assert f"likelihood {', '.join(likelihood.parameters)}\n" in capsys.readouterr().out
    rows = read_metrics(whole)
    assert rows[-1]["loss"] < rows[0]["loss"]
    model = fastvae.load(whole)
    assert model.likelihood == likelihood
    images = load_digits().test_images
    mse = (model.reconstruct(images, deterministic=True) - images / 255).square().mean().item()
    assert mse == pytest.approx(rows[-1]["test_mse"], rel=1e-4)
    assert run(*SMALL, "--likelihood", name, "--epochs", 1, "--quiet", "--out", parts) == 0
    assert run("--resume", parts, "--epochs", 2, "--quiet") == 0
    assert [{**row, "seconds": 0} for row in read_metrics(parts)] == [{**row, "seconds": 0} for row in rows]
    assert fastvae.load(parts).likelihood == likelihood


def test_a_prior_and_an_objective(tmp_path, run, capsys):
    """They are kept in the checkpoint, shown, and a run that goes on has them."""
    import fastvae
    from fastvae.priors import VampPrior

    flags = ("--prior", "vamp", "--objective", "dreg", "--samples", 2)
    assert run(*SMALL, *flags, "--epochs", 1, "--out", tmp_path) == 0
    output = capsys.readouterr().out
    assert "; prior vamp\n" in output and ", objective dreg\n" in output
    began = fastvae.load(tmp_path)
    assert isinstance(began.prior, VampPrior) and began.prior.bounds == (0.0, 1.0)
    assert run("--resume", tmp_path, "--objective", "iwae") == 2
    assert "--resume: --objective was dreg" in capsys.readouterr().err
    assert run("--resume", tmp_path, "--epochs", 2, "--quiet") == 0
    assert [row["epoch"] for row in read_metrics(tmp_path)] == [1, 2]
    went_on = fastvae.load(tmp_path).prior
    assert not torch.equal(went_on.pseudo_inputs, began.prior.pseudo_inputs)


def test_a_full_disk_is_one_line(tmp_path, run, monkeypatch, capsys):
    """/dev/full takes nothing: what was there stays, and the run ends."""
    import builtins

    from fastvae import files

    def full(path, mode):
        return builtins.open("/dev/full" if "checkpoint.pt" in str(path) else path, mode.replace("x", "w"))

    assert run(*SMALL, "--epochs", 1, "--quiet", "--out", tmp_path) == 0
    before = (tmp_path / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(files, "open", full, raising=False)
    assert run("--resume", tmp_path, "--epochs", 2) == 1
    errors = capsys.readouterr().err
    assert errors == f"train.py: error: [Errno 28] No space left on device: '{tmp_path / 'checkpoint.pt'}'\n"
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


# ---------------------------------------------------------------------------------------------------------- going on


def test_resume(tmp_path, run, capsys):
    """The settings are those of the run that stopped; the end is that of one that did not."""
    small = (*SMALL, "--latent-dim", 5, "--seed", 3, "--lr", 2e-3)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(*small, "--epochs", 3, "--out", whole) == 0
    assert run(*small, "--epochs", 1, "--out", parts) == 0
    left = parts / ".checkpoint.pt.0123.part"
    left.write_text("of a run that was killed")
    capsys.readouterr()
    assert run("--resume", parts, "--epochs", 3) == 0
    assert "resumed   after step 4\n" in capsys.readouterr().out
    assert not left.exists()
    first, second = (read_metrics(folder) for folder in (whole, parts))
    assert [{**row, "seconds": 0} for row in first] == [{**row, "seconds": 0} for row in second]
    for name in ("generated.png", "reconstructions.png"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes()
    summary = json.loads((parts / "summary.json").read_text())
    assert summary["settings"]["lr"] == 2e-3 and summary["settings"]["epochs"] == 3
    assert (parts / "checkpoint.previous.pt").exists()


def test_checkpoints_every_so_many_epochs(tmp_path, run):
    for epochs, kept in ((4, [2, 4]), (3, [2, 3])):
        folder = tmp_path / str(epochs)
        assert run(*SMALL, "--epochs", epochs, "--checkpoint-every", 2, "--quiet", "--out", folder) == 0
        found = [
            torch.load(folder / name, weights_only=True)["epoch"]
            for name in ("checkpoint.previous.pt", "checkpoint.pt")
        ]
        assert found == kept


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--lr", "0.1"), "--lr was 0.001 in"),
        (("--batch-size", "8"), "--batch-size was 16 in"),
        (("--likelihood", "bernoulli"), "--likelihood was sigmoid-mse in"),
        (("--seed", "1", "--epochs", "2"), "--seed was 0 in"),
        (("--out", "elsewhere"), "leave out --out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_run_of_other_settings_is_refused(arguments, words, tmp_path, run, capsys, monkeypatch):
    assert run(*SMALL, "--epochs", 1, "--quiet", "--out", tmp_path) == 0
    monkeypatch.setattr(training_run, "train", lambda *_, **__: pytest.fail("training began"))
    assert run("--resume", tmp_path, *arguments) == 2
    assert words in capsys.readouterr().err


def test_a_run_on_other_images_is_refused(tmp_path, run, capsys, monkeypatch):
    """The same settings, but the data set has changed."""
    assert run("--device", "cpu", "--batch-size", 500, "--epochs", 1, "--quiet", "--out", tmp_path) == 0
    digits = load_digits()
    fewer = digits._replace(train_images=digits.train_images[:900])
    monkeypatch.setattr(program, "load_dataset", lambda name, data_dir: fewer)
    monkeypatch.setattr(training_run, "train", lambda *_, **__: pytest.fail("training began"))
    assert run("--resume", tmp_path) == 2
    assert "there were 1500 training images, there are 900" in capsys.readouterr().err


def test_a_run_that_ends_before_its_epochs_has_a_checkpoint(tmp_path, run, capsys, monkeypatch):
    """Of its last epoch, also where none was due; and it does not go on to fewer epochs than it had."""
    from fastvae.training import loop, read_checkpoint

    losses, real = iter([90.0, 80.0, 81.0]), loop.evaluate
    monkeypatch.setattr(loop, "evaluate", lambda *a, **k: real(*a, **k)._replace(loss=next(losses)))
    options = ("--limit", 16, "--epochs", 9, "--patience", 1, "--checkpoint-every", 9)
    assert run(*SMALL, *options, "--out", tmp_path / "run") == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["ended"] == "patience"
    last, best = (read_checkpoint(tmp_path / "run" / f"checkpoint{which}.pt") for which in ("", ".best"))
    assert last.epoch == summary["final"]["epoch"] and best.epoch == summary["best"]["epoch"] == 2
    assert best.run == last.run and best.run["dataset"] == "digits"
    capsys.readouterr()
    assert run("--resume", tmp_path / "run", "--epochs", 1) == 2
    assert "steps were done, --epochs 1 is 1" in capsys.readouterr().err


def test_a_run_of_other_processes_is_refused(tmp_path, run, capsys, no_training, example):
    """And settings that no run has."""
    from fastvae.training import write_checkpoint

    options = example.Options(dataset="digits", device="cpu", epochs=1, batch_size=16, limit=64)
    settings = {**program.flag_values(options, of_the_run=True), "images": 64, "processes": 2}
    state = TrainingState([], 0.0, torch.empty(0), torch.empty(0), {}, [])
    write_checkpoint(tmp_path / "checkpoint.pt", ConvVAE(), 1, state, settings)
    assert run("--resume", tmp_path) == 2
    assert "--resume: torchrun had 2 processes, it has no" in capsys.readouterr().err
    write_checkpoint(tmp_path / "checkpoint.pt", ConvVAE(), 1, state, {**settings, "lr": None})
    assert run("--resume", tmp_path) == 2
    assert "checkpoint.pt: learning_rate must be a positive number, got None" in capsys.readouterr().err


def test_a_second_run_in_the_same_folder_stops(tmp_path, run, capsys, no_training):
    """Also one that would go on with the first, before it reads the checkpoint that the first will replace."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "metrics.csv").write_text("of the first run")
    with locked(out):
        for arguments in (["--out", out], ["--resume", out]):
            assert run(*SMALL, *arguments) == 2
            errors = capsys.readouterr().err
            expected = f"train.py: error: {out} is in use by another run, process {os.getpid()} on {platform.node()}: "
            assert errors == f"{expected}wait for its end, or name another folder\n"
    assert (out / "metrics.csv").read_text() == "of the first run"
    assert run("--resume", out) == 2
    assert "is in use" not in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_lock_ends_with_its_process(tmp_path):
    """Also where it is killed and cleans nothing up."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(tmp_path):
            os.write(writing, b"locked")
            time.sleep(60)
        os._exit(0)
    try:
        assert os.read(reading, 6) == b"locked"
        with pytest.raises(UserError, match=rf"is in use by another run, process {child} on "), locked(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)
    with locked(tmp_path):
        pass


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path):
        pass


def test_nothing_to_resume(tmp_path, run, capsys, no_training):
    from fastvae.training import write_checkpoint

    assert run("--resume", tmp_path / "absent") == 2
    assert "No such file" in capsys.readouterr().err
    (tmp_path / "checkpoint.pt").write_text("nothing")
    assert run("--resume", tmp_path) == 2
    assert "is not a checkpoint of fastvae" in capsys.readouterr().err
    write_checkpoint(tmp_path / "checkpoint.pt", ConvVAE(), 1)
    assert run("--resume", tmp_path) == 2
    assert "no state of its training" in capsys.readouterr().err


def test_the_threads_of_a_run_are_said_and_kept(run, tmp_path, monkeypatch, capsys):
    """A run that goes on has those that it had, whatever is the fastest now."""
    from fastvae.training import threads

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr(threads, "fastest", lambda numbers, step: 1)
        folder = str(tmp_path / "run")
        assert run(*SMALL, "--epochs", "1", "--out", folder) == 0
        assert "threads   1, of 2, the fastest now (the variable OMP_NUM_THREADS" in capsys.readouterr().out
        monkeypatch.setattr(threads, "fastest", lambda numbers, step: 2)
        assert run("--resume", folder, "--epochs", "2") == 0
        assert "threads   1, as before" in capsys.readouterr().out
        assert torch.get_num_threads() == 2
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        assert run(*SMALL, "--epochs", "1", "--out", folder) == 0
        output = capsys.readouterr().out
        assert "device    cpu, 2 threads" in output and "the variable" not in output
    finally:
        torch.set_num_threads(before)
