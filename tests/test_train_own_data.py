"""examples/train.py on one's own images, from end to end."""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest

from fastvae.data import find_dataset
from fastvae.program import default_batch_size
from fastvae.training import read_checkpoint

Image = pytest.importorskip("PIL.Image")

SCRIPT = Path(__file__).parents[1] / "examples" / "train.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("train_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass is looked up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(example, monkeypatch, tmp_path):
    """Run main() with these arguments; returns the exit code."""
    monkeypatch.setenv("FASTVAE_DATA", str(tmp_path / "cache"))

    def call(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["train.py", "--device", "cpu", *map(str, arguments)])
        return example.main()

    return call


@pytest.fixture
def own(tmp_path) -> Path:
    """Forty colour pictures of many sizes in two folders, and four files that are none."""
    root = tmp_path / "own"
    generator = np.random.default_rng(0)
    for number in range(40):
        width, height = generator.integers(10, 40, 2)
        values = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        path = root / ("a", "b")[number % 2] / f"{number}.{('png', 'jpg')[number % 3 == 0]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(path)
    (root / "a" / "empty.png").write_bytes(b"")
    (root / "a" / "cut.png").write_bytes((root / "b" / "1.png").read_bytes()[:99])
    (root / "b" / "te\nxt\x1b[31m.jpg").write_text("not an image")
    (root / "b" / "noise.jpg").write_bytes(bytes(range(256)))
    return root


def refused(run, capsys, *arguments: object) -> str:
    """The one line on standard error of a run that ends with code 2."""
    capsys.readouterr()
    assert run(*arguments) == 2
    output, errors = capsys.readouterr()
    assert all(line.startswith("reading ") for line in output.splitlines())
    assert errors.startswith("train.py: error: ") and errors.count("\n") == 1
    return errors.removeprefix("train.py: error: ").rstrip("\n")


def test_a_folder(tmp_path, run, own, capsys, monkeypatch):
    folder = tmp_path / "run"
    assert run("--dataset", "folder", "--data-dir", own, "--image-size", 12, "--epochs", 1, "--out", folder) == 0
    lines = {line[:10].strip(): line[10:] for line in capsys.readouterr().out.splitlines()}
    summary = json.loads((folder / "summary.json").read_text())
    training, test = summary["dataset"]["training"], summary["dataset"]["test"]
    assert training + test == 40 and test >= 1
    expected = f"folder, {training} training and {test} test images; 12 x 12 pixels, RGB, from {own}"
    assert lines["dataset"] == expected
    assert lines["pictures"].startswith("reconstructions and their errors with sampled z, mse 0.")
    assert lines["skipped"].startswith("4 files not read (--strict: stop): ")
    assert lines["skipped"].endswith(", ...") and "\x1b" not in lines["skipped"]
    assert {item["path"] for item in summary["dataset"]["skipped"]} == {
        "a/empty.png", "a/cut.png", "b/te\nxt\x1b[31m.jpg", "b/noise.jpg",
    }  # fmt: skip
    assert summary["settings"]["image_size"] == 12
    assert summary["settings"]["batch_size"] == 16
    assert read_checkpoint(folder / "checkpoint.pt").model.image_shape == (3, 12, 12)
    size = struct.unpack(">II", (folder / "generated.png").read_bytes()[16:24])
    assert size == (8 * 12 * 3, 45 + 8 * 12 * 3)  # below its title
    for name in ("reconstructions.png", "error_histogram.png", "loss.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"

    # It goes on from there: with its own size, and with no other.
    assert run("--resume", folder, "--epochs", 2, "--quiet") == 0
    assert read_checkpoint(folder / "checkpoint.pt").epoch == 2
    message = refused(run, capsys, "--resume", folder, "--epochs", 3, "--image-size", 16)
    assert message == f"--resume: --image-size was 12 in {folder}, got 16"
    message = refused(run, capsys, "--resume", folder, "--epochs", 3, "--strict")
    assert "is not read" in message and message.endswith("(strict)")
    for path in own.glob("*/*.*"):
        if path.name[0].isdigit():
            with Image.open(path) as image:
                grey = image.convert("L")
            grey.save(path)
    message = refused(run, capsys, "--resume", folder, "--epochs", 3)
    assert message == "--resume: the images were 12 x 12 pixels, RGB, they are 12 x 12 pixels, grayscale"


def test_one_file_is_no_files(tmp_path, run, own, capsys):
    for name in ("a/cut.png", "b/te\nxt\x1b[31m.jpg", "b/noise.jpg"):
        (own / name).unlink()
    arguments = ("--dataset", "folder", "--data-dir", own, "--image-size", 4, "--epochs", 1, "--limit", 4)
    assert run(*arguments, "--out", tmp_path / "run") == 0
    expected = "skipped   1 file not read (--strict: stop): a/empty.png: the file is empty\n"
    assert expected in capsys.readouterr().out
    message = refused(run, capsys, *arguments, "--strict")
    assert message == f"{own / 'a' / 'empty.png'} is not read: the file is empty (strict)"


def test_arrays(tmp_path, run, capsys):
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 6), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images)
    np.save(tmp_path / "a.npy", images)
    for name in ("npz", "npy"):
        arguments = ("--dataset", name, "--data-dir", tmp_path / f"a.{name}", "--epochs", 1)
        assert run(*arguments, "--out", tmp_path / "run") == 0
        assert f"{name}, 18 training and 2 test images; 6 x 8 pixels, grayscale" in capsys.readouterr().out
        (tmp_path / f"a.{name}").write_bytes(b"damaged")
        assert f"a.{name} cannot be read as .{name}: " in refused(run, capsys, *arguments)


@pytest.mark.parametrize("name", ["folder", "npy", "npz", "idx"])
def test_no_data_dir(name, run, capsys):
    assert refused(run, capsys, "--dataset", name) == f"--dataset {name} needs --data-dir, where its files are"


def test_the_kind_is_found_by_what_data_dir_holds(tmp_path, run, capsys):
    """Without --dataset: nobody who names a folder means the bundled digits."""
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 6), dtype=np.uint8)
    (tmp_path / "folder" / "deeper").mkdir(parents=True)
    for number in range(20):
        Image.fromarray(images[number]).save(tmp_path / "folder" / "deeper" / f"{number}.bmp")
    (tmp_path / "folder" / "labels.csv").write_text("0,1")
    for kind in ("npy", "npz", "idx"):
        (tmp_path / kind).mkdir()
    np.save(tmp_path / "npy" / "images.npy", images)
    np.savez(tmp_path / "npz" / "images.npz", images=images)
    header = b"\0\0\x08\3" + struct.pack(">III", *images.shape)
    (tmp_path / "idx" / "train-images-idx3-ubyte").write_bytes(header + images.tobytes())
    out = tmp_path / "run"
    for place, kind in {
        "folder": "folder", "npy": "npy", "npz": "npz", "idx": "idx",
        "npy/images.npy": "npy", "npz/images.npz": "npz", "idx/train-images-idx3-ubyte": "idx",
    }.items():  # fmt: skip
        assert find_dataset(tmp_path / place) == kind
    assert run("--data-dir", tmp_path / "folder", "--epochs", 1, "--out", out) == 0
    output = capsys.readouterr().out
    assert "folder, 18 training and 2 test images" in output or "folder, 19 training and 1 test images" in output
    assert "skipped   1 file not read (--strict: stop): labels.csv: .csv is no ending of a picture" in output
    assert read_checkpoint(out / "checkpoint.pt").run["dataset"] == "folder"
    assert run("--resume", out, "--epochs", 2, "--quiet") == 0
    assert "labels.csv is not read" in refused(run, capsys, "--data-dir", tmp_path / "folder", "--strict")


def test_what_data_dir_does_not_say_is_asked(tmp_path, run, capsys):
    def reason(place: Path) -> str:
        return refused(run, capsys, "--data-dir", place).removeprefix("--data-dir without --dataset: ")

    assert "No such file or directory" in reason(tmp_path / "absent")
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "notes.txt").write_text("nothing")
    expected = "some has no images: expected pictures, or arrays in .npy, .npz, IDX or .csv files"
    assert reason(tmp_path / "some").endswith(expected)
    assert "notes.txt begins with b'nothin', expected a .npy, .npz, IDX or .csv" in reason(tmp_path / "some/notes.txt")
    (tmp_path / "some" / "preview.png").write_bytes(b"")
    np.save(tmp_path / "some" / "images.npy", np.zeros((2, 4, 5), np.uint8))
    assert reason(tmp_path / "some").endswith("some has data of several kinds, npy, folder: name the one that is meant")
    message = refused(run, capsys, "--dataset", "digits", "--data-dir", tmp_path)
    assert message == f'the dataset "digits" comes with scikit-learn, without files in data_dir, got {tmp_path}'


def test_other_mistakes(tmp_path, run, capsys):
    for arguments in ([], ["--dataset", "digits"], ["--dataset", "npy", "--data-dir", tmp_path]):
        message = refused(run, capsys, *arguments, "--image-size", 32)
        assert message == "--image-size is for --dataset folder alone"
    message = refused(run, capsys, "--dataset", "folder", "--data-dir", tmp_path / "absent")
    assert "No such file or directory" in message and "absent" in message
    assert "has no picture: none of its 0 files is named like one" in refused(
        run, capsys, "--dataset", "folder", "--data-dir", tmp_path
    )


def test_default_batch_sizes():
    sizes = [default_batch_size("folder", images) for images in (1, 99, 2500, 12_799, 12_800, 10**6)]
    assert sizes == [1, 16, 25, 127, 128, 128]
    assert default_batch_size("kmnist", 60_000) == 128
    assert default_batch_size("digits", 1500) == 32
