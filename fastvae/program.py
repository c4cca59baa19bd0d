"""What the example programs share: flags, the run that they use, and errors that end in one line."""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from fastvae import plots
from fastvae.data import ImageDataset, Standardisation, load_dataset
from fastvae.models import VAE
from fastvae.training import read_checkpoint


class UserError(Exception):
    """What the user can put right; the message is printed on one line."""


def run_program(name: str, body: Callable[[], None]) -> int:
    """Run a program; returns its exit code: 2, and one line on standard error, for what the user can put right (also a
    missing package, or a file that cannot be read or written), 130 after Ctrl-C, else 0.
    """
    try:
        body()
    except (UserError, ImportError, OSError) as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: aborted", file=sys.stderr)
        return 130
    return 0


class Parser(argparse.ArgumentParser):
    """A parser whose help is a module's docstring, and which raises `UserError`."""

    def __init__(self, documentation: str | None) -> None:
        description, _, epilog = (documentation or "").partition("\n\n")
        super().__init__(
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def add_run_flags(parser: Parser, folder: str) -> None:
    """The flags of every program that uses a run; ``folder`` is where in the run it writes."""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, or a checkpoint file")
    parser.add_argument("--dataset", metavar="NAME", help="default: the run's")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="of the dataset's files, default: the run's")
    parser.add_argument("--limit", type=positive_integer, metavar="N", help="use the first N images of a set")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seed", type=seed, default=0, help="of every random number, default: 0")
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"default: {folder} in the run's folder")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


class Run(NamedTuple):
    """A run that `open_run` opened.

    checkpoint: its file. epoch: how many epochs it was trained. model: on the device, in evaluation mode. dataset: on
    the CPU. trained_images: how many of the dataset's training images the model has seen, the first ones; None where
    the checkpoint does not say, or names another dataset. trained_labels: the only labels that it has seen, if they
    were chosen (``--labels``). images, uint8, and labels (None where the dataset has none): the test images, on the
    device.
    """

    checkpoint: Path
    epoch: int
    model: VAE
    dataset: ImageDataset
    trained_images: int | None
    images: Tensor
    labels: Tensor | None
    trained_labels: list[int] | None = None


def open_run(arguments: argparse.Namespace, *, of_all_labels: bool = False) -> Run:
    """The run that the flags of `add_run_flags` name; of a run with ``--labels`` its dataset has these labels alone,
    unless ``of_all_labels``. Raises `UserError`, ``ImportError``, ``OSError``.
    """
    plots.require_matplotlib()
    device = choose_device(arguments.device)
    path = arguments.run / "checkpoint.pt" if arguments.run.is_dir() else arguments.run
    try:
        checkpoint = read_checkpoint(path)
    except ValueError as error:
        raise UserError(str(error)) from error
    # In channels_last the decoder takes half the time on a CPU.
    model = checkpoint.in_use.eval().to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    settings = checkpoint.run or {}
    name = arguments.dataset or settings.get("dataset")
    if name is None:
        raise UserError(f"--dataset must be given: {path} does not say what it was trained on")
    same = name == settings.get("dataset")
    data_dir = arguments.data_dir or (settings.get("data_dir") if same else None)
    trained_labels = settings.get("labels") if same else None
    dataset = open_dataset("--dataset", name, data_dir, model, settings, trained=same)
    if trained_labels:
        try:
            chosen = dataset.of_classes(trained_labels)
        except ValueError as error:
            raise UserError(f"--dataset {name}: {error}") from error
        dataset = dataset if of_all_labels else chosen
    labels = dataset.test_labels
    return Run(
        path,
        checkpoint.epoch,
        model,
        dataset,
        settings.get("images") if same else None,
        dataset.test_images[: arguments.limit].to(device),
        None if labels is None else labels[: arguments.limit],
        trained_labels,
    )


def images_in_words(run: Run) -> str:
    skipped = f"; files that are not read: {len(run.dataset.skipped):,}" if run.dataset.skipped else ""
    return f"{run.dataset.name}, {len(run.images):,} test images on {run.images.device.type}{skipped}"


def open_dataset(
    flag: str,
    name: str,
    data_dir: Path | None,
    model: VAE,
    settings: Mapping[str, Any] = MappingProxyType({}),
    *,
    trained: bool = False,
) -> ImageDataset:
    """The dataset that a flag names, with test images that the model, and figures, can take. Raises `UserError`.

    settings: of the model's run; trained: whether it was trained on this dataset.
    """
    shape = tuple(getattr(model, "data_shape", ()))
    options: dict[str, Any] = {}
    if name == "folder" and trained:  # as training asked for them, so that what it decoded is found
        options["image_size"] = settings.get("image_size")
    elif name == "folder" and len(shape) == 3:  # pictures of any size are brought to the model's
        options.update(image_size=shape[1:], channels=shape[0])
    elif name in ("table", "signal") and settings.get("standardisation") is not None:
        options["standardisation"] = Standardisation(**settings["standardisation"])
    try:
        dataset = load_dataset(name, data_dir, **options)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{flag} {name}: {error}") from error
    found = tuple(dataset.test_images.shape[1:])
    if found != shape:
        raise UserError(f"{flag} {name}: its images have shape {list(found)}, the model's {list(shape)}")
    if dataset.has_pictures and shape[0] not in (1, 3):
        raise UserError(f"{flag} {name}: figures are of images with 1 or 3 channels, got {shape[0]}")
    if len(dataset.test_images) == 0:
        raise UserError(f"{flag} {name}: it has no test images")
    return dataset


def choose_device(name: str) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("--device cuda: there is no CUDA device, or this torch cannot use it (--device cpu)")
    if name == "auto":
        name = "cuda" if available else "cpu"
    return torch.device(name)


def prepare_folder(folder: Path, names: Sequence[str], *, new: bool = True) -> Path:
    """Make the folder, and remove files of these names that are left of an earlier run, so that what it holds is all of
    one run; of a run that goes on (not new) only what it left unfinished when it was killed. Raises `UserError`.
    """
    make_folder(folder)
    try:
        for name in names:
            for path in (*([folder / name] if new else []), *folder.glob(f".{name}.*.part")):
                path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"--out cannot be written: {error}") from error
    return folder


def make_folder(folder: Path) -> None:
    """Raises `UserError`."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out must be a folder, got the file {folder}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out cannot be written: {error}") from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder, because each would overwrite the other's files. Of a run with several processes
    only the first locks.

    The operating system ends the lock when the process ends, also when it is killed; the file .lock remains. Raises
    `UserError` while another process holds the lock, and ``OSError``.
    """
    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not _try_to_lock(file):
            holder = os.read(file, 200).decode(errors="replace") or "another process"
            raise UserError(f"{folder} is in use by another run, {holder}: wait for its end, or name another folder")
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {platform.node()}".encode())
        yield
    finally:
        _unlock(file)
        os.close(file)


def _try_to_lock(file: int) -> bool:
    """Whether no other process holds the lock; true too where the file system has no locks."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(file, 1 << 30, os.SEEK_SET)  # behind the text, because Windows lets nobody read what is locked
        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            os.lseek(file, 0, os.SEEK_SET)
    else:
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return True
    return True


def _unlock(file: int) -> None:
    """Closing the file alone does not unlock it while a process that was forked holds it open."""
    if sys.platform != "win32":
        import fcntl

        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)


def positive_integer(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def seed(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"must be an integer from 0 to 2^63 - 1, got {text!r}")
    return int(text)


def positive_number(text: str) -> float:
    if not finite(text) or float(text) <= 0:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return float(text)


def non_negative_number(text: str) -> float:
    if not finite(text) or float(text) < 0:
        raise argparse.ArgumentTypeError(f"must be a number that is not negative, got {text!r}")
    return float(text)


def fraction(text: str) -> float:
    if not finite(text) or not 0 < float(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number between 0 and 1, got {text!r}")
    return float(text)


def finite(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
