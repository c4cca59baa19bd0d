"""Train a convolutional VAE on handwritten digits or your own data, and write pictures of the results.

    python examples/train.py                    scikit-learn's bundled digits on a CPU, MNIST on a CUDA device
    python examples/train.py --dataset mnist    MathWorks' example: 30 epochs in batches of 128
    python examples/train.py --data-dir DIR     pictures of your own, of any format and size
    python examples/train.py --data-dir F.csv   a table of your own; --dataset signal: signals
    python examples/train.py --labels 0 1 2     only some of the classes, for anomaly.py
    python examples/train.py --likelihood gaussian     a mean and a variance for each pixel
    python examples/train.py --prior vamp              a learned prior instead of N(0, I); or mixture
    python examples/train.py --objective dreg          the bound of 8 samples instead of 1; or beta-tc, mmd, iwae
    python examples/train.py --resume DIR       continue the run in DIR, as if it had not stopped
    torchrun --nproc-per-node=N examples/train.py     in N processes, each with its GPU and its part of every batch

Ctrl-C ends training after the current step. The model is still evaluated, all files are written, and the exit code is 0
("interrupted" in summary.json is true). A second Ctrl-C aborts with exit code 130. Errors that the user can fix end
with one line and exit code 2. The exit code is 1 if the loss diverges.

Files in --out are written atomically. Those of an earlier run are removed first. If another run uses the folder, the
program ends and changes nothing:
    metrics.csv            a row for each epoch: losses in nats per image, seconds since training began
    checkpoint.pt          the model and the state of its training, written every --checkpoint-every epochs and at the
                           end; checkpoint.previous.pt is the checkpoint before it
    checkpoint.best.pt     with --patience: the checkpoint of the epoch with the smallest test loss
    tensorboard/           losses, images and latents of each epoch, if tensorboard is installed
    loss.png               the losses over the epochs
    reconstructions.png    test images and their reconstructions
    error_histogram.png    the reconstruction error of each test image
    generated.png          64 images decoded from z of the prior
    summary.json           settings, versions, device, backend, final numbers; written last
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import fastvae
from fastvae.kinds import POSITIVE_INTEGER
from fastvae.models.named import OF_NUMBERS, OF_PICTURES, PRIORS, model_of, prior_of
from fastvae.program import (
    Parser,
    UserError,
    default_batch_size,
    device_name,
    flag_values,
    own_device,
    parse_settings,
    placed,
    skipped_in_words,
)
from fastvae.training import (
    GraphError,
    MovingAverage,
    Processes,
    ProcessLost,
    best_epoch,
    choose_threads,
    process_group,
    versions,
    with_threads,
    write_summary,
)
from fastvae.training.checks import check_objective
from fastvae.training.folder import FILES, locked, prepare_run
from fastvae.training.run import (
    Resumed,
    RunSettings,
    check_run,
    fit,
    how_it_ended,
    read_images,
    take_over,
    write_figures,
)
from fastvae.training.settings import setting


@dataclass(frozen=True, kw_only=True)
class Options(RunSettings):
    """The flags: those of every run, and those of this model."""

    latent_dim: int = setting(16, "default: 16", kind=POSITIVE_INTEGER, exact=True)
    likelihood: str | None = setting(
        None,
        "of the pixels given the decoder's output, default: sigmoid-mse; of tables and signals gaussian or laplace",
        choices=tuple(OF_PICTURES),
        exact=True,
    )
    prior: str = setting(
        "standard",
        "of the latents: standard (default), N(0, I); mixture, of Gaussians that are learned; vamp, of the posteriors "
        "of learned pseudo-inputs",
        choices=PRIORS,
        exact=True,
    )


# What may help against an error that ends training.
ADVICE = {
    ProcessLost: "--resume goes on from the last checkpoint",
    GraphError: "--graph auto goes on without",
    FloatingPointError: "a smaller --lr may help",
}


def main() -> int:
    """Run the program; returns its exit code."""
    try:
        options, given = parse_settings(Parser(__doc__), Options)
        with contextlib.ExitStack() as held:
            resumed = None
            if options.resume is not None:
                if options.resume.is_dir() and os.environ.get("RANK", "0") == "0":
                    held.enter_context(locked(options.resume))  # before its checkpoint is read
                options, resumed = take_over(options, given, options.resume)
            if options.backend != "auto":  # with "auto" the environment variable FASTVAE_BACKEND stays in force
                held.enter_context(fastvae.use_backend(options.backend))
            device = own_device(options.device)
            held.enter_context(process_group(device))
            run(options, device, resumed, held)
    except UserError as error:
        print(f"train.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:  # the disk is full, for one
        print(f"train.py: error: {error}", file=sys.stderr)
        return 1
    except tuple(ADVICE) as error:
        print(f"train.py: {error} ({ADVICE[type(error)]})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("train.py: aborted", file=sys.stderr)
        return 130
    return 0


def run(options: Options, device: torch.device, resumed: Resumed | None, held: contextlib.ExitStack) -> None:
    """held: what ends with the program; the lock of the run's folder goes there."""
    processes = Processes(device)
    quiet = options.quiet or processes.rank > 0
    say: Callable[[str], None] = (lambda line: None) if quiet else print
    try:
        backend = fastvae.backend_for(torch.empty(0, device=device))
    except (ImportError, RuntimeError) as error:
        raise UserError(str(error)) from error
    options, dataset, reason = read_images(options, processes, say)
    train_images = placed(dataset.train_images[: options.limit], device)
    test_images = placed(dataset.test_images, device)
    images = len(train_images)
    batch_size = options.batch_size or default_batch_size(dataset.name, images)
    likelihoods = OF_PICTURES if dataset.has_pictures else OF_NUMBERS
    name = options.likelihood or next(iter(likelihoods))
    if name not in likelihoods:
        raise UserError(
            f"--likelihood must be one of {', '.join(likelihoods)} for --dataset {dataset.name}, got {name}"
        )
    options = replace(options, batch_size=batch_size, likelihood=name)
    check_run(options, train_images, processes, resumed)
    torch.manual_seed(options.seed)
    if resumed is None:  # made on the CPU, so that a seed means the same initial weights on every device
        prior = prior_of(options.prior, options.latent_dim, train_images)
        model = model_of(tuple(train_images.shape[1:]), options.latent_dim, likelihoods[name], prior)
    else:
        model = resumed.model
    try:
        check_objective(options, model, images, batch_size, together=processes.together)
    except ValueError as error:
        raise UserError(str(error)) from error
    model.to(device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    available, before = torch.get_num_threads(), None if resumed is None else resumed.state.threads
    if device.type == "cpu" and not processes.together:
        number = choose_threads(
            model,
            train_images,
            batch_size,
            precision=options.precision,
            objective=options.objective,
            samples=options.samples,
            before=before,
        )
        held.enter_context(with_threads(number))
    # Of several processes only the first writes.
    folder = Path()
    if processes.rank == 0:
        folder = prepare_run(options.resume or options.out, dataset.name, resumed is None, held)

    say(f"device    {device_name(device)}")
    if device.type == "cpu" and available > 1 and not os.environ.get("OMP_NUM_THREADS"):
        why = "as before" if torch.get_num_threads() == before else f"of {available}, the fastest now"
        say(f"threads   {torch.get_num_threads()}, {why} (the variable OMP_NUM_THREADS sets another number)")
    if processes.together:
        say(f"processes {processes.size}, with {batch_size // processes.size} images of every batch each")
    say(f"backend   {backend}")
    say(f"dataset   {dataset.name}, {images:,} training and {len(test_images):,} test images; {reason}")
    if dataset.skipped:
        say(f"skipped   {skipped_in_words(dataset)}")
    if train_images.device != device:
        say(f"streamed  {train_images.nbytes / 1e9:.1f} GB of images stay on the CPU, batches go to the GPU")
    own = "" if options.prior == "standard" else f"; prior {options.prior}"
    say(f"model     {parameters:,} parameters, of a pixel's likelihood {', '.join(model.likelihood.parameters)}{own}")
    steps = images // batch_size
    total_steps = options.epochs * steps
    chosen = "" if options.objective == "elbo" else f", objective {options.objective}"
    say(f"training  {options.epochs} epochs, {total_steps:,} steps of {batch_size} images{chosen}")
    if resumed is not None:
        say(f"resumed   after step {resumed.step(images, options):,}")
    average = MovingAverage(model, options.ema) if options.ema else None
    settings = replace(options, dataset=dataset.name, device=device.type, threads=torch.get_num_threads())
    rows = fit(
        model, average, train_images, test_images, settings, folder, resumed, standardisation=dataset.standardisation
    )
    if processes.rank > 0:
        return
    last, best, ended = rows[-1], best_epoch(rows), how_it_ended(rows, options, steps)
    if ended == "patience":
        say(f"stopped early: epoch {best} has the smallest test loss, and is in checkpoint.best.pt")
    elif ended == "interrupted":
        say("stopped early; evaluating")
    shown = model if average is None else average.model
    deterministic = options.deterministic
    shown_mse = write_figures(
        folder,
        shown,
        test_images,
        rows,
        deterministic=deterministic,
        seed=options.seed,
        pictures=dataset.has_pictures,
    )
    skipped = [item._asdict() for item in dataset.skipped]
    write_summary(
        folder / "summary.json",
        {
            "interrupted": ended == "interrupted",
            "ended": ended,
            "final": last._asdict(),
            "best": rows[best - 1]._asdict(),
            "planned_steps": total_steps,
            "settings": flag_values(options),
            "dataset": {"name": dataset.name, "training": images, "test": len(test_images), "skipped": skipped},
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
    sampled = "z = mu" if deterministic else "sampled z"
    say(f"pictures  reconstructions and their errors with {sampled}, mse {shown_mse:.4f}")
    say(f"written   {folder}: {', '.join(name for name in FILES if (folder / name).exists())}")


if __name__ == "__main__":
    sys.exit(main())
