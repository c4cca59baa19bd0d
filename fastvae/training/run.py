"""A run of a program that trains: its flags, its images, what it goes on from, and what it leaves in its folder."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastvae import plots
from fastvae.data import DATASETS, ImageDataset, Standardisation, find_dataset
from fastvae.evaluation import reconstruction_errors
from fastvae.evaluation.batches import device_of
from fastvae.kinds import FRACTION, POSITIVE_INTEGER, SEED
from fastvae.models import VAE
from fastvae.program import (
    BATCH_SIZE_RANGE,
    BATCH_SIZES,
    UserError,
    absolute_path,
    choose_dataset,
    flag_values,
    printable,
    prior_in_words,
    shape_in_words,
)
from fastvae.tensorboard import open_tensorboard
from fastvae.training.average import MovingAverage
from fastvae.training.checkpoint import read_checkpoint, write_checkpoint
from fastvae.training.display import make_display
from fastvae.training.distributed import Processes
from fastvae.training.interrupt import stop_on_interrupt
from fastvae.training.listener import Listener
from fastvae.training.loop import train
from fastvae.training.metrics import EpochMetrics, best_epoch
from fastvae.training.records import write_metrics
from fastvae.training.settings import Training, setting, settings_of
from fastvae.training.state import TrainingState

_DATASET = "default: what --data-dir holds; without it digits on a CPU, mnist on a CUDA device"
_DATA_DIR = "of the dataset's files, or for arrays the file; what is absent of a published dataset is downloaded"
_IMAGE_SIZE = "resize a folder's images to N x N pixels, default: the size they share, if not above 128, else 64"
_BATCH_SIZE = "default: {}; of one's own images a hundredth, {} to {}".format(
    ", ".join(f"{size} ({name})" for name, size in BATCH_SIZES.items()), *BATCH_SIZE_RANGE
)
_LABELS = "train on samples with these labels alone"
_EMA = "test, show and save an exponential moving average of the weights, 0.999 for example"


@dataclass(frozen=True, kw_only=True)
class RunSettings(Training):
    """The settings of a training, and of its data, device and files. Each is a flag, whose help is below."""

    batch_size: int | None = setting(None, _BATCH_SIZE, kind=POSITIVE_INTEGER, exact=True)
    dataset: str = setting("auto", _DATASET, choices=("auto", *DATASETS), exact=True)
    data_dir: Path | None = setting(None, _DATA_DIR, read=absolute_path, metavar="DIR", exact=False)
    image_size: int | None = setting(None, _IMAGE_SIZE, kind=POSITIVE_INTEGER, metavar="N", exact=True)
    strict: bool = setting(False, "stop at a file that is not read, default: name it", exact=False)
    labels: list[int] | None = setting(None, _LABELS, read=int, metavar="LABEL", several=True, exact=True)
    limit: int | None = setting(None, "train on the first N images", kind=POSITIVE_INTEGER, metavar="N", exact=True)
    device: str = setting("auto", "", choices=("auto", "cpu", "cuda"), exact=True)
    backend: str = setting("auto", "", choices=("auto", "triton", "reference"), exact=True)
    ema: float | None = setting(None, _EMA, kind=FRACTION, metavar="DECAY", exact=True)
    seed: int = setting(0, "default: 0", kind=SEED, exact=True)
    deterministic: bool = setting(False, "reconstruct with z = mu instead of sampled z", exact=False)
    checkpoint_every: int = setting(
        1, "epochs, default: 1; also at the end", kind=POSITIVE_INTEGER, metavar="N", exact=False
    )
    out: Path | None = setting(None, "default: runs/<dataset>-<date-time>", read=Path, metavar="DIR")
    resume: Path | None = setting(None, "go on with the run in DIR, with its settings", read=Path, metavar="DIR")
    quiet: bool = setting(False, "print nothing but errors")


AnySettings = TypeVar("AnySettings", bound=RunSettings)


class Records(Listener):
    """Keeps metrics.csv: a row for each epoch, and those of the run that this one goes on from."""

    def __init__(self, path: Path, rows: list[EpochMetrics]) -> None:
        self.path, self.rows = path, list(rows)

    def epoch(self, metrics: EpochMetrics) -> None:
        self.rows.append(metrics)
        write_metrics(self.path, self.rows)


class Checkpoints(Listener):
    """Keeps checkpoint.pt, written after every so many epochs, and with a patience checkpoint.best.pt.

    run: what a run that goes on compares its settings with.
    """

    def __init__(
        self, folder: Path, model: VAE, run: Mapping[str, Any], *, every: int = 1, patience: int | None = None
    ) -> None:
        self.folder, self.model, self.run, self.every, self.patience = folder, model, run, every, patience
        self.unwritten: TrainingState | None = None  # the last state, while it is in no file

    def state(self, state: TrainingState) -> None:
        self.unwritten = state
        if state.epoch % self.every == 0:
            self.finish()
        finished = len(state.history) == 0
        if self.patience and finished and best_epoch(state.rows) == state.epoch:
            path = self.folder / "checkpoint.best.pt"
            write_checkpoint(path, self.model, state.epoch, state, self.run, keep_previous=False)

    def finish(self) -> None:
        """Write the last state, where it is in no file."""
        state, self.unwritten = self.unwritten, None
        if state is not None:
            write_checkpoint(self.folder / "checkpoint.pt", self.model, state.epoch, state, self.run)


def fit(
    model: VAE,
    average: MovingAverage | None,
    data: Tensor,
    test_data: Tensor,
    settings: RunSettings,
    folder: Path,
    resumed: Resumed | None = None,
    standardisation: Standardisation | None = None,
) -> list[EpochMetrics]:
    """Train, show the progress, and keep metrics.csv, TensorBoard's files and checkpoint.pt up to date. Ctrl-C ends it
    after the current step.

    settings: as they are after what "auto" stands for was found. standardisation: of the data, kept in checkpoint.pt,
    for the programs that use the run. Returns the metrics of all epochs.
    """
    rows, first_step = ([], 0) if resumed is None else (resumed.state.rows, resumed.step(len(data), settings))
    processes = Processes(device_of(model))
    first, together = processes.rank == 0, processes.size if processes.together else None
    run = {**flag_values(settings, of_the_run=True), "images": len(data), "processes": together}
    if standardisation is not None:
        run["standardisation"] = standardisation._asdict()
    checkpoints = Checkpoints(folder, model, run, every=settings.checkpoint_every, patience=settings.patience)
    with contextlib.ExitStack() as held:
        display = make_display(settings.epochs, settings.quiet or not first, first_step)
        listeners: list[Listener] = [Records(folder / "metrics.csv", rows)]
        if first:
            tested = model if average is None else average.model
            board = open_tensorboard(folder / "tensorboard", tested, test_data, len(rows))
            if board is not None:
                listeners.append(held.enter_context(contextlib.closing(board)))
        listeners += [held.enter_context(contextlib.closing(display)), checkpoints]
        listeners.append(held.enter_context(stop_on_interrupt()))
        state = None if resumed is None else resumed.state
        found = train(model, data, test_data, settings, average=average, listeners=listeners, resume=state)
    checkpoints.finish()
    return found


def how_it_ended(rows: Sequence[EpochMetrics], settings: Training, steps_per_epoch: int) -> str:
    """By its "epochs", its "patience", or "interrupted"."""
    step = rows[-1].step
    if step >= settings.epochs * steps_per_epoch:
        return "epochs"
    waited = settings.patience is not None and len(rows) - best_epoch(rows) >= settings.patience
    return "patience" if waited and step % steps_per_epoch == 0 else "interrupted"


def write_figures(
    folder: Path,
    model: VAE,
    images: Tensor,
    rows: list[EpochMetrics],
    *,
    deterministic: bool = False,
    seed: int = 0,
    pictures: bool = True,
) -> float:
    """Pictures of the losses, and of a model on test images, of which ``pictures`` says whether they can be shown;
    returns the mean squared error of the reconstructions, as they are shown.
    """
    plots.plot_losses(folder / "loss.png", rows)
    errors = reconstruction_errors(model, images, deterministic=deterministic)
    plots.plot_errors(folder / "error_histogram.png", errors, deterministic=deterministic)
    if not pictures:
        return errors.mean().item()
    device = device_of(model)
    shown = images[:20].to(device)
    reconstructions = model.reconstruct(shown, deterministic)
    plots.plot_reconstructions(
        folder / "reconstructions.png", shown.float() / 255, reconstructions, deterministic=deterministic
    )
    # A generator of its own, so that a seed means the same latents however long training was.
    generator = torch.Generator(device).manual_seed(seed)
    title = f"64 images from {prior_in_words(model)}"
    plots.write_image_grid(folder / "generated.png", model.sample(64, generator), title=title)
    return errors.mean().item()


class Resumed(NamedTuple):
    """What a run goes on from. run: the settings that it had, by the names of their flags."""

    model: VAE
    state: TrainingState
    run: dict[str, Any]

    def step(self, images: int, settings: Training) -> int:
        """How many steps were done, on so many images."""
        assert settings.batch_size is not None
        return len(self.state.rows) * (images // settings.batch_size) + len(self.state.history)


def take_over(settings: AnySettings, given: set[str], folder: Path) -> tuple[AnySettings, Resumed]:
    """The settings, of which those that were not given are those of the run in `folder`; and that run.

    Raises `UserError` where there is none, or where one was given that must be as it was.
    """
    if "out" in given:
        raise UserError("--resume writes into its own folder: leave out --out")
    try:
        checkpoint = read_checkpoint(folder / "checkpoint.pt")
    except (OSError, ValueError) as error:
        raise UserError(f"--resume: {error}") from error
    state, run = checkpoint.state, checkpoint.run
    if state is None or run is None:
        raise UserError(f"--resume: {folder / 'checkpoint.pt'} holds a model but no state of its training")
    taken = {}
    for name, known in settings_of(settings):
        if known.exact is None:
            continue
        word = known.flag or name
        flag = f"--{word.replace('_', '-')}"
        if word not in run:  # an option that is younger than the run
            raise UserError(f"--resume: {folder / 'checkpoint.pt'} is of an older fastvae, without {flag}")
        value = run[word]
        if name not in given:
            read = None if value is None or known.several else known.read
            taken[name] = value if read is None else read(value)
        elif known.exact and getattr(settings, name) != value:
            raise UserError(f"--resume: {flag} was {value} in {folder}, got {getattr(settings, name)}")
    try:
        settings = dataclasses.replace(settings, **taken, out=folder)
    except (TypeError, ValueError) as error:
        raise UserError(f"--resume: {folder / 'checkpoint.pt'}: {error}") from error
    if settings.schedule == "cosine" and settings.epochs != run["epochs"]:
        raise UserError(
            f"--resume: --epochs was {run['epochs']} in {folder}, and --schedule cosine ends there, "
            f"got {settings.epochs}"
        )
    return settings, Resumed(checkpoint.model, state, run)


def read_images(
    settings: AnySettings, processes: Processes, say: Callable[[str], None]
) -> tuple[AnySettings, ImageDataset, str]:
    """The images that the settings ask for, the settings with the dataset that was found, and in words why it was.

    Raises `UserError`.
    """
    name, data_dir = settings.dataset, settings.data_dir
    if name == "auto" and data_dir is not None:
        try:
            name = find_dataset(data_dir)
        except (ImportError, OSError, ValueError) as error:
            raise UserError(f"--data-dir without --dataset: {error}") from error
    if name == "folder" and data_dir is not None:
        say(f"reading   {printable(str(data_dir))} (may take minutes the first time)")
    try:
        plots.require_matplotlib()
        with processes.first_alone():  # it downloads, or decodes, for all
            dataset, reason = choose_dataset(
                name, data_dir, processes.device, settings.image_size, settings.strict, settings.labels
            )
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise UserError(str(error)) from error
    return dataclasses.replace(settings, dataset=name), dataset, reason


def check_run(settings: RunSettings, images: Tensor, processes: Processes, resumed: Resumed | None) -> None:
    """Raises `UserError` where these training images, these processes, this device or the run that is gone on with do
    not go with the settings.
    """
    batch_size, count, shape = settings.batch_size, len(images), tuple(images.shape[1:])
    assert batch_size is not None
    if batch_size > count:
        raise UserError(f"--batch-size must be at most {count}, the number of images, got {batch_size}")
    if batch_size % processes.size:
        raise UserError(f"--batch-size must be a multiple of {processes.size}, the processes, got {batch_size}")
    if settings.graph == "on" and (processes.device.type != "cuda" or processes.together):
        raise UserError("--graph on needs a CUDA device, without torchrun (--graph auto)")
    if resumed is None:
        return
    if resumed.run["images"] != count:
        raise UserError(f"--resume: there were {resumed.run['images']} training images, there are {count}")
    together = processes.size if processes.together else None
    if resumed.run["processes"] != together:
        raise UserError(
            f"--resume: torchrun had {resumed.run['processes'] or 'no'} processes, it has {together or 'no'}"
        )
    before = getattr(resumed.model, "data_shape", shape)
    if before != shape:
        raise UserError(f"--resume: the images were {shape_in_words(before)}, they are {shape_in_words(shape)}")
    step, total = resumed.step(count, settings), settings.epochs * (count // batch_size)
    if step > total:
        raise UserError(f"--resume: {step:,} steps were done, --epochs {settings.epochs} is {total:,}")
