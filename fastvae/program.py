"""Code that the example programs share: flags, opening a run, and errors that end in one line."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor

from fastvae import plots
from fastvae.data import OWN_DATASETS, DownloadError, ImageDataset, Standardisation, load_dataset
from fastvae.kinds import POSITIVE_INTEGER, SEED
from fastvae.models import VAE
from fastvae.training import Training, read_checkpoint
from fastvae.training.settings import settings_of

BATCH_SIZES = {"mnist": 128, "fashion-mnist": 128, "kmnist": 128, "digits": 32}
BATCH_SIZE_RANGE = (16, 128)  # of one's own images


class UserError(Exception):
    """An error that the user can fix. The message is printed on one line."""


def run_program(name: str, body: Callable[[], None]) -> int:
    """Run a program and return its exit code. An error that the user can fix (such as a missing package, or a file that
    cannot be read or written) prints one line on standard error and returns 2. Ctrl-C returns 130. Otherwise the code
    is 0.
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


positive_integer, seed = POSITIVE_INTEGER.read, SEED.read


def absolute_path(text: str) -> Path:
    """For those who use it from elsewhere."""
    return Path(text).expanduser().absolute()


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


def add_flags(parser: Parser, settings: type[Training]) -> None:
    """Add a flag for each field of a dataclass of settings that has a help text."""
    for field, (name, known) in zip(dataclasses.fields(settings), settings_of(settings), strict=True):
        if known.help is None:
            continue
        word = known.flag or name
        flag = f"--{word.replace('_', '-')}"
        if isinstance(field.default, bool):
            parser.add_argument(flag, dest=name, action="store_true", help=known.help)
            continue
        parser.add_argument(
            flag,
            dest=name,
            type=known.kind.read if known.kind is not None else known.read or str,
            choices=known.choices,
            default=field.default,
            metavar=known.metavar or (None if known.choices else word.upper()),
            nargs="+" if known.several else None,
            help=known.help,
        )


Settings = TypeVar("Settings", bound=Training)


def parse_settings(parser: Parser, settings: type[Settings]) -> tuple[Settings, set[str]]:
    """Add the flags of `add_flags` to the parser and parse the command line. Returns the settings, and the names of the
    flags that were given. Raises `UserError`.
    """
    add_flags(parser, settings)
    values = vars(parser.parse_args())
    missing = object()
    # What has a value already is not set to its default.
    asked = vars(parser.parse_args(namespace=argparse.Namespace(**dict.fromkeys(values, missing))))
    try:
        found = settings(**values)
    except ValueError as error:  # of flags that do not go together
        raise UserError(str(error)) from error
    return found, {name for name in values if asked[name] is not missing}


def flag_values(settings: Training, *, of_the_run: bool = False) -> dict[str, Any]:
    """Each flag's value in JSON's types, by its name with _ for -. ``of_the_run``: only the flags of `take_over`."""
    values = {
        known.flag or name: getattr(settings, name)
        for name, known in settings_of(settings)
        if (known.exact if of_the_run else known.help) is not None
    }
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def add_run_flags(parser: Parser, folder: str) -> None:
    """Add the flags of every program that uses a run. ``folder`` is the folder inside the run that it writes to."""
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

    checkpoint: its file. epoch: the number of trained epochs. model: on the device, in evaluation mode. dataset: on the
    CPU. trained_images: the number of the dataset's training images, from the first on, that the model has seen; None
    if the checkpoint does not tell, or names another dataset. trained_labels: the labels that it was trained on, if
    they were chosen (``--labels``). images: the test images, uint8, on the device. labels: their labels, or None if the
    dataset has none.
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
    """Open the run that the flags of `add_run_flags` name. If the run has ``--labels``, the dataset holds only these
    labels, unless ``of_all_labels``. Raises `UserError`, ``ImportError``, ``OSError``.
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
    """Open the dataset that a flag names, and check that the model and the figures accept its test images. Raises
    `UserError`.

    settings: those of the model's run. trained: whether the model was trained on this dataset.
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


def own_device(name: str) -> torch.device:
    """The device of this process."""
    device = choose_device(name)
    if device.type == "cpu":
        return device
    number = int(os.environ.get("LOCAL_RANK", 0))  # torchrun's, of its processes on this machine
    if number >= torch.cuda.device_count():
        raise UserError(f"torchrun has more processes than there are CUDA devices, {torch.cuda.device_count()}")
    return torch.device("cuda", number)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda, {torch.cuda.get_device_name(device)}"
    number = torch.get_num_threads()
    return f"cpu, {number} thread{'' if number == 1 else 's'}"


def placed(images: Tensor, device: torch.device) -> Tensor:
    """The images on the device, if they take at most a quarter of its free memory; activations need the rest."""
    if device.type == "cuda" and images.nbytes > torch.cuda.mem_get_info(device)[0] / 4:
        return images
    return images.to(device)


def choose_dataset(
    name: str,
    data_dir: Path | None,
    device: torch.device,
    image_size: int | None = None,
    strict: bool = False,
    labels: Sequence[int] | None = None,
) -> tuple[ImageDataset, str]:
    """The dataset, and a text: either the reason why it was chosen and how to choose another, or a description of its
    images.
    """
    chosen: dict[str, Any] = {} if labels is None else {"labels": labels}
    if name in OWN_DATASETS and data_dir is None:
        raise UserError(f"--dataset {name} needs --data-dir, where its files are")
    if image_size is not None and name != "folder":
        raise UserError("--image-size is for --dataset folder alone")
    if name in OWN_DATASETS:
        dataset = load_dataset(name, data_dir, image_size=image_size, strict=strict, **chosen)
        return dataset, f"{shape_in_words(dataset.train_images.shape[1:])}, from {printable(str(data_dir))}"
    if name == "digits":
        return load_dataset(name, data_dir, **chosen), "asked for (MNIST: --dataset mnist)"
    if name != "auto":
        return load_dataset(name, data_dir, **chosen), "asked for (the bundled digits: --dataset digits)"
    if device.type == "cpu":
        return load_dataset("digits", **chosen), "the choice for a CPU, where MNIST takes long (MNIST: --dataset mnist)"
    try:
        mnist = load_dataset("mnist", **chosen)
        return mnist, "the choice for a CUDA device (the bundled digits: --dataset digits)"
    except (DownloadError, OSError) as error:
        cause = str(error).splitlines()[0].rstrip(":")
        return load_dataset("digits", **chosen), f"as MNIST is not available: {cause} (why: --dataset mnist)"


def default_batch_size(dataset: str, images: int) -> int:
    """For the user's own images a hundredth of their number, within limits, so that a small set gives enough steps and
    a large one large batches.
    """
    smallest, largest = BATCH_SIZE_RANGE
    return BATCH_SIZES.get(dataset, min(max(images // 100, smallest), largest, images))


def prior_in_words(model: VAE) -> str:
    """What a model samples from."""
    return "z ~ N(0, I)" if model.prior is None else f"z ~ the model's {type(model.prior).__name__}"


def shape_in_words(shape: Sequence[int]) -> str:
    """Describe the shape of images (C, H, W), signals (C, 1, L) or a table's rows (F,)."""
    if len(shape) == 1:
        return f"{shape[0]} columns"
    channels, height, width = shape
    if height == 1:
        return f"signals of {channels} channel{'' if channels == 1 else 's'} of length {width}"
    return f"{width} x {height} pixels, {'grayscale' if channels == 1 else 'RGB'}"


def skipped_in_words(dataset: ImageDataset) -> str:
    """The number of files, and the names of the first ones. summary.json lists all of them."""
    first = "; ".join(f"{printable(item.path)}: {item.reason}" for item in dataset.skipped[:3])
    rest = ", ..." if len(dataset.skipped) > 3 else ""
    files = "file" if len(dataset.skipped) == 1 else "files"
    return f"{len(dataset.skipped):,} {files} not read (--strict: stop): {first}{rest}"


def printable(text: str) -> str:
    """The text on one line, without unprintable characters, because names of files may hold any bytes."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)


def prepare_folder(folder: Path, names: Sequence[str], *, new: bool = True) -> Path:
    """Make the folder. If the run is new, remove files of these names that an earlier run left, so that all files
    belong to one run. If the run continues, remove only the unfinished files that it left when it was killed. Raises
    `UserError`.
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
