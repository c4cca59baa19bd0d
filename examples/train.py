"""Train a convolutional VAE, on handwritten digits or images of one's own, and show what it learned.

    python examples/train.py                    scikit-learn's bundled digits on a CPU, MNIST on a CUDA device
    python examples/train.py --dataset mnist    MathWorks' example: 30 epochs in batches of 128
    python examples/train.py --data-dir DIR     pictures of your own, of any format and size
    python examples/train.py --likelihood gaussian     pixels with a mean and a variance of their own
    python examples/train.py --resume DIR       go on with the run in DIR, as if it had not stopped
    torchrun --nproc-per-node=N examples/train.py     in N processes, each with its GPU and its part of every batch

Ctrl-C ends training after the current step; the model is still evaluated, everything is written, and the exit code is 0
("interrupted" in summary.json is true). A second Ctrl-C aborts, with exit code 130. What the user can put right ends in
one line and exit code 2, a loss that diverges in exit code 1.

Files in --out, each written atomically; those of an earlier run are removed first. A run that finds another at work in
its folder ends without touching it:
    metrics.csv            a row for each epoch: losses in nats per image, seconds since training began
    checkpoint.pt          the model and the state of its training, written every --checkpoint-every epochs and at the
                           end; checkpoint.previous.pt is the one before
    checkpoint.best.pt     with --patience: that of the epoch with the smallest test loss
    tensorboard/           losses, images and latents of each epoch, where tensorboard is installed
    loss.png               the losses over the epochs
    reconstructions.png    test images and their reconstructions
    error_histogram.png    the reconstruction error of each test image
    generated.png          64 images decoded from z ~ N(0, I)
    summary.json           settings, versions, device, backend, final numbers; written last
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, ReduceLROnPlateau

import fastvae
from fastvae import plots
from fastvae.data import DATASETS, OWN_DATASETS, DownloadError, ImageDataset, find_dataset, load_dataset
from fastvae.evaluation import reconstruction_errors
from fastvae.likelihoods import (
    Bernoulli,
    ContinuousBernoulli,
    DiscretizedLogistic,
    Gaussian,
    Laplace,
    Likelihood,
    SigmoidMSE,
)
from fastvae.models import VAE, ConvVAE
from fastvae.program import (
    Parser,
    UserError,
    choose_device,
    fraction,
    locked,
    make_folder,
    non_negative_number,
    positive_integer,
    positive_number,
    prepare_folder,
    seed,
)
from fastvae.tensorboard import open_tensorboard
from fastvae.training import (
    PRECISIONS,
    Checkpoint,
    EpochMetrics,
    GraphError,
    MovingAverage,
    Processes,
    ProcessLost,
    TrainingState,
    best_epoch,
    choose_threads,
    make_display,
    process_group,
    read_checkpoint,
    stop_on_interrupt,
    train,
    versions,
    with_threads,
    write_checkpoint,
    write_metrics,
    write_summary,
)

FILES = (
    "metrics.csv",
    "checkpoint.pt",
    "checkpoint.previous.pt",
    "checkpoint.best.pt",
    "loss.png",
    "reconstructions.png",
    "error_histogram.png",
    "generated.png",
    "summary.json",
)

# What a run that goes on must have as it was, and what it takes over unless it is told otherwise.
EXACT = (
    "dataset",
    "image_size",
    "device",
    "backend",
    "precision",
    "batch_size",
    "latent_dim",
    "likelihood",
    "lr",
    "beta",
    "kl_warmup",
    "free_bits",
    "clip_norm",
    "schedule",
    "ema",
    "skip_nonfinite",
    "seed",
    "limit",
)
TAKEN_OVER = (*EXACT, "epochs", "graph", "data_dir", "strict", "deterministic", "checkpoint_every", "patience")


def flag_name(likelihood: Likelihood) -> str:
    """sigmoid-mse for `SigmoidMSE`."""
    return re.sub("(?<=[a-z])(?=[A-Z])", "-", type(likelihood).__name__).lower()


# Of bytes read as [0, 1]. Least widths of 0.05, and of about a quarter of a byte: on the bundled digits the losses fall
# from epoch to epoch with these. Without one, pixels that are always black would let their width, and the loss, fall
# without end.
LIKELIHOODS = {
    flag_name(likelihood): likelihood
    for likelihood in (
        SigmoidMSE(),
        Bernoulli(),
        ContinuousBernoulli(),
        Gaussian(sigmoid=True, min_logvar=-6.0),
        Laplace(min_log_scale=-3.0),
        DiscretizedLogistic(min_log_scale=-7.0),
    )
}
EPOCHS = 30
BATCH_SIZES = {"mnist": 128, "fashion-mnist": 128, "kmnist": 128, "digits": 32}
BATCH_SIZE_RANGE = (16, 128)  # of one's own images


def main() -> int:
    """Run the program; returns its exit code."""
    try:
        arguments, given = parse_arguments()
        with contextlib.ExitStack() as held:
            if arguments.resume and arguments.resume.is_dir() and os.environ.get("RANK", "0") == "0":
                held.enter_context(locked(arguments.resume))  # before its checkpoint is read
            checkpoint = take_over(arguments, given) if arguments.resume else None
            if arguments.backend != "auto":  # with "auto" the environment variable FASTVAE_BACKEND stays in force
                held.enter_context(fastvae.use_backend(arguments.backend))
            device = own_device(arguments.device)
            held.enter_context(process_group(device))
            run(arguments, device, checkpoint, held)
    except UserError as error:
        print(f"train.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:  # the disk is full, for one
        print(f"train.py: error: {error}", file=sys.stderr)
        return 1
    except ProcessLost as error:
        print(f"train.py: {error} (--resume goes on from the last checkpoint)", file=sys.stderr)
        return 1
    except GraphError as error:
        print(f"train.py: {error} (--graph auto goes on without)", file=sys.stderr)
        return 1
    except FloatingPointError as error:
        print(f"train.py: {error} (a smaller --lr may help)", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("train.py: aborted", file=sys.stderr)
        return 130
    return 0


def run(
    arguments: argparse.Namespace, device: torch.device, checkpoint: Checkpoint | None, held: contextlib.ExitStack
) -> None:
    """held: what ends with the program; the lock of the run's folder goes there."""
    processes = Processes(device)
    arguments.quiet = arguments.quiet or processes.rank > 0
    say: Callable[[str], None] = (lambda line: None) if arguments.quiet else print
    if arguments.dataset == "auto" and arguments.data_dir is not None:
        try:
            arguments.dataset = find_dataset(arguments.data_dir)
        except (ImportError, OSError, ValueError) as error:
            raise UserError(f"--data-dir without --dataset: {error}") from error
    if arguments.dataset == "folder" and arguments.data_dir is not None:
        say(f"reading   {printable(str(arguments.data_dir))} (may take minutes the first time)")
    try:
        plots.require_matplotlib()
        backend = fastvae.backend_for(torch.empty(0, device=device))
        with processes.first_alone():  # it downloads, or decodes, for all
            dataset, reason = choose_dataset(
                arguments.dataset, arguments.data_dir, device, arguments.image_size, arguments.strict
            )
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise UserError(str(error)) from error
    train_images = placed(dataset.train_images[: arguments.limit], device)
    test_images = placed(dataset.test_images, device)
    epochs = arguments.epochs or EPOCHS
    batch_size = arguments.batch_size or default_batch_size(dataset.name, len(train_images))
    if batch_size > len(train_images):
        raise UserError(f"--batch-size must be at most {len(train_images)}, the number of images, got {batch_size}")
    if checkpoint is not None and checkpoint.run is not None and checkpoint.run["images"] != len(train_images):
        raise UserError(
            f"--resume: there were {checkpoint.run['images']} training images, there are {len(train_images)}"
        )
    # A group of one process has other noise on a CPU than none.
    together = processes.size if processes.together else None
    if checkpoint is not None and checkpoint.run is not None and checkpoint.run["processes"] != together:
        raise UserError(
            f"--resume: torchrun had {checkpoint.run['processes'] or 'no'} processes, it has {together or 'no'}"
        )
    if batch_size % processes.size:
        raise UserError(f"--batch-size must be a multiple of {processes.size}, the processes, got {batch_size}")
    if arguments.graph == "on" and (device.type != "cuda" or processes.together):
        raise UserError("--graph on needs a CUDA device, without torchrun (--graph auto)")
    total_steps = epochs * (len(train_images) // batch_size)

    torch.manual_seed(arguments.seed)
    channels, height, width = train_images.shape[1:]
    if checkpoint is not None and checkpoint.model.image_shape != (channels, height, width):
        raise UserError(
            f"--resume: the images were {shape_in_words(checkpoint.model.image_shape)}, "  # type: ignore[arg-type]
            f"they are {shape_in_words((channels, height, width))}"
        )
    # Made on the CPU, so that a seed means the same initial weights on every device.
    if checkpoint is None:
        likelihood = LIKELIHOODS[arguments.likelihood]
        model = ConvVAE((channels, height, width), arguments.latent_dim, likelihood=likelihood)
    else:
        model = checkpoint.model  # type: ignore[assignment]
    model.to(device)
    parameters = sum(parameter.numel() for parameter in model.parameters())

    available = torch.get_num_threads()
    before = None if checkpoint is None or checkpoint.state is None else checkpoint.state.threads
    if device.type == "cpu" and not processes.together:
        number = choose_threads(model, train_images, batch_size, precision=arguments.precision, before=before)
        held.enter_context(with_threads(number))
    # Of several processes only the first writes.
    folder = prepare_run(arguments.out, dataset.name, checkpoint is None, held) if processes.rank == 0 else Path()
    say(f"device    {device_name(device)}")
    if device.type == "cpu" and available > 1 and not os.environ.get("OMP_NUM_THREADS"):
        why = "as before" if torch.get_num_threads() == before else f"of {available}, the fastest now"
        say(f"threads   {torch.get_num_threads()}, {why} (the variable OMP_NUM_THREADS sets another number)")
    if processes.together:
        say(f"processes {processes.size}, with {batch_size // processes.size} images of every batch each")
    say(f"backend   {backend}")
    say(f"dataset   {dataset.name}, {len(train_images):,} training and {len(test_images):,} test images; {reason}")
    if dataset.skipped:
        say(f"skipped   {skipped_in_words(dataset)}")
    if train_images.device != device:
        say(f"streamed  {train_images.nbytes / 1e9:.1f} GB of images stay on the CPU, batches go to the GPU")
    say(f"model     {parameters:,} parameters, of a pixel's likelihood {', '.join(model.likelihood.parameters)}")
    say(f"training  {epochs} epochs, {total_steps:,} steps of {batch_size} images")
    first_step = 0 if checkpoint is None else resumed_step(checkpoint, len(train_images) // batch_size)
    if first_step > total_steps:
        raise UserError(f"--resume: {first_step:,} steps were done, --epochs {epochs} is {total_steps:,}")
    if checkpoint is not None:
        say(f"resumed   after step {first_step:,}")
    resolved = {
        **settings(arguments, epochs, batch_size),
        "dataset": dataset.name,
        "device": device.type,
        "images": len(train_images),
        "processes": together,
    }
    average = MovingAverage(model, arguments.ema) if arguments.ema else None
    rows = fit(model, average, train_images, test_images, folder, arguments, resolved, checkpoint, first_step)
    if processes.rank > 0:
        return
    last = rows[-1]
    if last.step == total_steps:
        ended = "epochs"
    elif (
        arguments.patience
        and last.step % (len(train_images) // batch_size) == 0
        and len(rows) - best_epoch(rows) >= arguments.patience
    ):
        ended = "patience"
        say(f"stopped early: epoch {best_epoch(rows)} has the smallest test loss, and is in checkpoint.best.pt")
    else:
        ended = "interrupted"
        say("stopped early; evaluating")
    sampled = "z = mu" if arguments.deterministic else "sampled z"
    shown_mse = write_figures(folder, model if average is None else average.model, test_images, rows, arguments)
    write_summary(
        folder / "summary.json",
        {
            "interrupted": ended == "interrupted",
            "ended": ended,
            "final": last._asdict(),
            "best": rows[best_epoch(rows) - 1]._asdict(),
            "planned_steps": total_steps,
            "settings": settings(arguments, epochs, batch_size),
            "dataset": {
                "name": dataset.name,
                "training": len(train_images),
                "test": len(test_images),
                "skipped": [item._asdict() for item in dataset.skipped],
            },
            "parameters": parameters,
            "processes": processes.size,
            "device": device_name(device),
            "backend": backend._asdict(),
            "versions": versions(),
        },
    )
    say(
        f"result    loss {last.loss:.2f} and test loss {last.test_loss:.2f} nats per image, "
        f"test mse {last.test_mse:.4f} with z = mu, {last.seconds:.0f} s"
    )
    say(f"pictures  reconstructions and their errors with {sampled}, mse {shown_mse:.4f}")
    say(f"written   {folder}: {', '.join(name for name in FILES if (folder / name).exists())}")


def resumed_step(checkpoint: Checkpoint, steps_per_epoch: int) -> int:
    assert checkpoint.state is not None
    return len(checkpoint.state.rows) * steps_per_epoch + len(checkpoint.state.history)


def fit(
    model: ConvVAE,
    average: MovingAverage | None,
    train_images: torch.Tensor,
    test_images: torch.Tensor,
    folder: Path,
    arguments: argparse.Namespace,
    resolved: dict[str, Any],
    checkpoint: Checkpoint | None,
    first_step: int,
) -> list[EpochMetrics]:
    """Train, show the progress, and keep metrics.csv, TensorBoard's files and checkpoint.pt up to date."""
    epochs = resolved["epochs"]
    state = None if checkpoint is None else checkpoint.state
    rows = [] if state is None else list(state.rows)
    first = Processes(torch.device(resolved["device"])).rank == 0
    board = open_tensorboard(folder / "tensorboard", len(rows)) if first else None

    def schedule(optimizer: Optimizer) -> LRScheduler:
        cosine = arguments.schedule == "cosine"
        return CosineAnnealingLR(optimizer, epochs) if cosine else ReduceLROnPlateau(optimizer)

    def record(row: EpochMetrics) -> None:
        rows.append(row)
        write_metrics(folder / "metrics.csv", rows)
        if board is not None:
            board.epoch(row, model if average is None else average.model, test_images)
        display.epoch(row)

    run = {name: resolved[name] for name in ("images", "processes", *TAKEN_OVER)}
    unwritten: list[TrainingState] = []  # the last state, while it is in no file

    def keep(state: TrainingState) -> None:
        epoch = rows[-1].epoch
        unwritten[:] = [state]
        if epoch % arguments.checkpoint_every == 0:
            write_checkpoint(folder / "checkpoint.pt", model, epoch, state, run)
            unwritten.clear()
        finished = len(state.history) == 0
        if arguments.patience and finished and best_epoch(rows) == epoch:
            write_checkpoint(folder / "checkpoint.best.pt", model, epoch, state, run, keep_previous=False)

    with (
        contextlib.closing(make_display(epochs, arguments.quiet, first_step)) as display,
        contextlib.closing(board) if board is not None else contextlib.nullcontext(),
        stop_on_interrupt() as should_stop,
    ):
        train(
            model,
            train_images,
            test_images,
            epochs=epochs,
            batch_size=resolved["batch_size"],
            learning_rate=arguments.lr,
            beta=arguments.beta,
            kl_warmup=arguments.kl_warmup,
            free_bits=arguments.free_bits,
            clip_norm=arguments.clip_norm,
            schedule=None if arguments.schedule == "constant" else schedule,
            average=average,
            patience=arguments.patience,
            skip_nonfinite=arguments.skip_nonfinite,
            graph=arguments.graph,
            precision=arguments.precision,
            threads=torch.get_num_threads(),
            should_stop=should_stop,
            on_progress=display.progress,
            on_epoch=record,
            on_state=keep,
            resume=state,
        )
    for last in unwritten:
        write_checkpoint(folder / "checkpoint.pt", model, rows[-1].epoch, last, run)
    return rows


def write_figures(
    folder: Path,
    model: VAE,
    test_images: torch.Tensor,
    rows: list[EpochMetrics],
    arguments: argparse.Namespace,
) -> float:
    """Returns the mean squared error of the reconstructions as they are shown."""
    deterministic = arguments.deterministic
    plots.plot_losses(folder / "loss.png", rows)
    device = next(model.parameters()).device
    shown = test_images[:20].to(device)
    reconstructions = model.reconstruct(shown, deterministic)
    plots.plot_reconstructions(
        folder / "reconstructions.png", shown.float() / 255, reconstructions, deterministic=deterministic
    )
    errors = reconstruction_errors(model, test_images, deterministic=deterministic)
    plots.plot_errors(folder / "error_histogram.png", errors, deterministic=deterministic)
    # A generator of its own, so that a seed means the same latents however long training was.
    generator = torch.Generator(device).manual_seed(arguments.seed)
    plots.write_image_grid(folder / "generated.png", model.sample(64, generator), title="64 images from z ~ N(0, I)")
    return errors.mean().item()


def settings(arguments: argparse.Namespace, epochs: int, batch_size: int) -> dict[str, Any]:
    """The flags, with the defaults that depend on the dataset filled in."""
    values = {**vars(arguments), "epochs": epochs, "batch_size": batch_size}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def own_device(name: str) -> torch.device:
    """The device of this process."""
    device = choose_device(name)
    if device.type == "cpu":
        return device
    number = int(os.environ.get("LOCAL_RANK", 0))  # torchrun's, of its processes on this machine
    if number >= torch.cuda.device_count():
        raise UserError(f"torchrun has more processes than there are CUDA devices, {torch.cuda.device_count()}")
    return torch.device("cuda", number)


def placed(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The images on the device, if they take at most a quarter of its free memory: activations need the rest."""
    if device.type == "cuda" and images.nbytes > torch.cuda.mem_get_info(device)[0] / 4:
        return images
    return images.to(device)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda, {torch.cuda.get_device_name(device)}"
    number = torch.get_num_threads()
    return f"cpu, {number} thread{'' if number == 1 else 's'}"


def choose_dataset(
    name: str,
    data_dir: Path | None,
    device: torch.device,
    image_size: int | None = None,
    strict: bool = False,
) -> tuple[ImageDataset, str]:
    """The dataset, and in words why it was chosen and how to get another, or what its images are."""
    if name in OWN_DATASETS and data_dir is None:
        raise UserError(f"--dataset {name} needs --data-dir, where its files are")
    if image_size is not None and name != "folder":
        raise UserError("--image-size is for --dataset folder alone")
    if name in OWN_DATASETS:
        dataset = load_dataset(name, data_dir, image_size=image_size, strict=strict)
        return dataset, f"{shape_in_words(dataset.train_images.shape[1:])}, from {printable(str(data_dir))}"
    if name == "digits":
        return load_dataset(name, data_dir), "asked for (MNIST: --dataset mnist)"
    if name != "auto":
        return load_dataset(name, data_dir), "asked for (the bundled digits: --dataset digits)"
    if device.type == "cpu":
        return load_dataset("digits"), "the choice for a CPU, where MNIST takes long (MNIST: --dataset mnist)"
    try:
        mnist = load_dataset("mnist")
        return mnist, "the choice for a CUDA device (the bundled digits: --dataset digits)"
    except (DownloadError, OSError) as error:
        cause = str(error).splitlines()[0].rstrip(":")
        return load_dataset("digits"), f"as MNIST is not available: {cause} (why: --dataset mnist)"


def default_batch_size(dataset: str, images: int) -> int:
    """Of one's own images a hundredth, in a range: enough steps for a small set, large batches for a large one."""
    smallest, largest = BATCH_SIZE_RANGE
    return BATCH_SIZES.get(dataset, min(max(images // 100, smallest), largest, images))


def shape_in_words(shape: Sequence[int]) -> str:
    """Of images (C, H, W)."""
    channels, height, width = shape
    return f"{width} x {height} pixels, {'grayscale' if channels == 1 else 'RGB'}"


def skipped_in_words(dataset: ImageDataset) -> str:
    """How many files, and the first of them; all of them are in summary.json."""
    first = "; ".join(f"{printable(item.path)}: {item.reason}" for item in dataset.skipped[:3])
    rest = ", ..." if len(dataset.skipped) > 3 else ""
    files = "file" if len(dataset.skipped) == 1 else "files"
    return f"{len(dataset.skipped):,} {files} not read (--strict: stop): {first}{rest}"


def printable(text: str) -> str:
    """On one line, and without what a terminal cannot be sent: names of files may hold any bytes."""
    return "".join(sign if sign.isprintable() else "?" for sign in text)


def take_over(arguments: argparse.Namespace, given: set[str]) -> Checkpoint:
    """The checkpoint in --resume, whose settings those of `arguments` become that were not given."""
    folder = arguments.resume
    if "out" in given:
        raise UserError("--resume writes into its own folder: leave out --out")
    try:
        checkpoint = read_checkpoint(folder / "checkpoint.pt")
    except (OSError, ValueError) as error:
        raise UserError(f"--resume: {error}") from error
    if checkpoint.state is None or checkpoint.run is None:
        raise UserError(f"--resume: {folder / 'checkpoint.pt'} holds a model but no state of its training")
    for name in TAKEN_OVER:
        if name not in checkpoint.run:  # an option that is younger than the run
            raise UserError(
                f"--resume: {folder / 'checkpoint.pt'} is of an older fastvae, without --{name.replace('_', '-')}"
            )
        value = checkpoint.run[name]
        if name not in given:
            setattr(arguments, name, Path(value) if name == "data_dir" and value is not None else value)
        elif name in EXACT and getattr(arguments, name) != value:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"--resume: {flag} was {value} in {folder}, got {getattr(arguments, name)}")
    if arguments.schedule == "cosine" and arguments.epochs != checkpoint.run["epochs"]:
        raise UserError(
            f"--resume: --epochs was {checkpoint.run['epochs']} in {folder}, and --schedule cosine ends there, "
            f"got {arguments.epochs}"
        )
    arguments.out = folder
    return checkpoint


def prepare_run(out: Path | None, dataset: str, new: bool, held: contextlib.ExitStack) -> Path:
    """The run's folder, locked; that of a run that goes on is already."""
    try:
        folder = new_folder(dataset) if out is None else out
        if new:
            make_folder(folder)
            held.enter_context(locked(folder))
        prepare_folder(folder, FILES, new=new)
        if new:
            shutil.rmtree(folder / "tensorboard", ignore_errors=True)
            write_metrics(folder / "metrics.csv", [])  # shows now, not after training, that files can be written
    except OSError as error:
        raise UserError(f"--out cannot be written: {error}") from error
    return folder


def new_folder(dataset: str) -> Path:
    """A folder named after the dataset and the time, made here, so that runs that start together do not share one."""
    name = f"{dataset}-{datetime.now():%Y%m%d-%H%M%S}"
    for number in itertools.count(1):
        folder = Path("runs", name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
    return folder


def parse_arguments() -> tuple[argparse.Namespace, set[str]]:
    """The arguments, and the names of those that were given."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--dataset",
        choices=("auto", *DATASETS),
        default="auto",
        help="default: what --data-dir holds; without it digits on a CPU, mnist on a CUDA device",
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="of the dataset's files, or for arrays the file; what is absent of a published dataset is downloaded",
    )
    parser.add_argument(
        "--image-size",
        type=positive_integer,
        metavar="N",
        help="resize a folder's images to N x N pixels, default: the size they share, if not above 128, else 64",
    )
    parser.add_argument("--strict", action="store_true", help="stop at a file that is not read, default: name it")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--backend", choices=("auto", "triton", "reference"), default="auto")
    parser.add_argument(
        "--graph",
        choices=("auto", "on", "off"),
        default="auto",
        help="run the steps as CUDA graphs, default: where possible",
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="tf32", help="of convolutions and matrix products, default: tf32"
    )
    parser.add_argument("--epochs", type=positive_integer, help=f"default: {EPOCHS}")
    parser.add_argument(
        "--batch-size",
        type=positive_integer,
        help="default: {}; of one's own images a hundredth, {} to {}".format(
            by_dataset(BATCH_SIZES), *BATCH_SIZE_RANGE
        ),
    )
    parser.add_argument("--latent-dim", type=positive_integer, default=16, help="default: 16")
    parser.add_argument(
        "--likelihood",
        choices=LIKELIHOODS,
        default=flag_name(SigmoidMSE()),
        help="of the pixels given the decoder's output, default: sigmoid-mse",
    )
    parser.add_argument("--lr", type=positive_number, default=1e-3, help="Adam's learning rate, default: 1e-3")
    parser.add_argument("--beta", type=non_negative_number, default=1.0, help="weight of the divergence, default: 1.0")
    parser.add_argument(
        "--kl-warmup",
        type=non_negative_number,
        default=0.0,
        metavar="EPOCHS",
        help="in which that weight grows from 0, default: 0",
    )
    parser.add_argument(
        "--free-bits",
        type=non_negative_number,
        default=0.0,
        metavar="NATS",
        help="that each latent dimension may hold before its divergence counts, default: 0",
    )
    parser.add_argument(
        "--schedule",
        choices=("constant", "cosine", "plateau"),
        default="constant",
        help="of the learning rate, in steps of an epoch: constant (default); cosine: to 0 over --epochs; plateau: a "
        "tenth of it after 10 epochs without a better test loss",
    )
    parser.add_argument("--clip-norm", type=positive_number, metavar="NORM", help="the largest norm of the gradient")
    parser.add_argument(
        "--ema",
        type=fraction,
        metavar="DECAY",
        help="test, show and save an exponential moving average of the weights, 0.999 for example",
    )
    parser.add_argument(
        "--patience",
        type=positive_integer,
        metavar="EPOCHS",
        help="end after so many epochs without a smaller test loss; the best epoch is kept",
    )
    parser.add_argument(
        "--skip-nonfinite",
        action="store_true",
        help="leave out and count steps whose gradient is not finite, instead of ending",
    )
    parser.add_argument("--seed", type=seed, default=0, help="default: 0")
    parser.add_argument("--limit", type=positive_integer, metavar="N", help="train on the first N images")
    parser.add_argument("--deterministic", action="store_true", help="reconstruct with z = mu instead of sampled z")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/<dataset>-<date-time>")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="go on with the run in DIR, with its settings")
    parser.add_argument(
        "--checkpoint-every", type=positive_integer, default=1, metavar="N", help="epochs, default: 1; also at the end"
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    arguments = parser.parse_args()
    if arguments.data_dir is not None:
        arguments.data_dir = arguments.data_dir.expanduser().absolute()  # for those who use the run from elsewhere
    missing = object()
    names = vars(arguments)
    # What has a value already is not set to its default.
    asked = parser.parse_args(namespace=argparse.Namespace(**dict.fromkeys(names, missing)))
    return arguments, {name for name in names if getattr(asked, name) is not missing}


def by_dataset(defaults: dict[str, int]) -> str:
    return ", ".join(f"{value} ({dataset})" for dataset, value in defaults.items())


if __name__ == "__main__":
    sys.exit(main())
