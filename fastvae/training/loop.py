"""The training loop: Adam on the negative evidence lower bound, or another objective, with the images as bytes on the
model's device.

A step never waits for the device: its loss is written to a tensor there, which is read for the progress display about
twice a second and at the end of each epoch. On a CUDA device several steps run as one captured graph.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from functools import partial

import torch
from torch.optim import Adam
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fastvae.evaluation import Evaluation, evaluate, evaluate_batches
from fastvae.models import VAE
from fastvae.training.average import MovingAverage
from fastvae.training.checks import check_arguments, check_model, check_objective, look_at, warn_of_warmup
from fastvae.training.data import (
    Arrays,
    Data,
    Stream,
    Whole,
    formatted,
    mapped,
    open_data,
    open_test,
    tensors,
    to_channels_last,
)
from fastvae.training.distributed import Processes, losses_named
from fastvae.training.finite import broken, means
from fastvae.training.listener import Listener
from fastvae.training.memory import freed_memory_kept
from fastvae.training.metrics import EpochMetrics, Progress, best_epoch
from fastvae.training.objectives import evaluated_loss
from fastvae.training.precision import arithmetic
from fastvae.training.settings import COMPARING, Training
from fastvae.training.state import TrainingState, restore, state_of
from fastvae.training.steps import Steps
from fastvae.training.threads import choose_threads, with_threads

# Each report reads from the device, so it waits for the steps that are queued there; a display needs no more than this.
_REPORT_SECONDS = 0.5


def train(
    model: VAE,
    data: Data,
    test_data: Data,
    settings: Training = Training(),
    *,
    average: MovingAverage | None = None,
    listeners: Sequence[Listener] = (),
    resume: TrainingState | None = None,
) -> list[EpochMetrics]:
    """Train a model in place, with its likelihood, and convert it to the channels_last memory format (not one with
    weights of volumes, whose format is another).

    Data are one of these:

    - a tensor [N, ...] of images, signals, volumes, rows of a table: uint8 (the encoder reads x / 255) or of the
      model's dtype, in [0, 1] where the likelihood's target is "unit" (a warning says where they are not); on the
      model's device, or on the CPU, from where they are brought as they are needed: sets that do not fit a GPU;
    - a tuple of tensors, whose meaning ``settings.parts`` says: input, target, condition;
    - a torch.utils.data.Dataset of such samples, an IterableDataset too, read in this process as it is needed;
    - a DataLoader, which makes the batches as it was told to: with workers, pinned memory, a sampler.

    Tensors and Datasets are reshuffled every epoch; samples left over from whole batches are skipped in that epoch. A
    DataLoader is gone through once in an epoch, or for ``settings.steps_per_epoch`` steps, after which the next epoch
    goes on where it is; one that ends before begins again.

    On a CUDA device several steps run as one CUDA graph, where the shapes of batches are fixed: those of tensors and
    Datasets are, those of a DataLoader with drop_last. Listeners are told whether, and if not why.

    Where torch.distributed has a process group, its processes train together, called alike and each with all samples:
    every batch is shared out evenly, as DistributedDataParallel has it, and the noise is that of the whole batch. (A
    DataLoader gives each process its own part, by a DistributedSampler, of one size in all.) The weights and generators
    are those of the first process at the start; it alone tests, on all of its test_data, and tells the listeners.
    Without a CUDA graph.

    Args:
        data, test_data: what is trained on, and tested on after each epoch.
        settings: how to train.
        average: takes in the weights after every step; its model is then the one that is tested.
        listeners: are told of the training, in this order, and may end it.
        resume: a state that a listener was given, with the weights of that moment in the model and the other arguments
            as they were (epochs may be more): training goes on as if it had not stopped, on a CPU bit for bit. (A
            DataLoader begins again, also within an epoch, whose steps that are left then have other samples.)
            `fastvae.training.checkpoint` keeps states in files.

    Returns:
        The metrics of every epoch, the unfinished one included.

    Raises:
        ValueError: a batch_size larger than the training set, data on another device, of no samples, of several tensors
            without ``settings.parts``, or without a length and ``settings.steps_per_epoch``; graph="on" without a CUDA
            device, or with batches that may differ in size; a model without a parameter to train, or a state of other
            data, batches or parameters; in several processes a batch_size that they cannot share evenly, or graph="on";
            an objective that does not go with the model's prior, with these data, or with several processes.
        TypeError: a model that is no VAE, data that are none of those above or of another dtype, or what is no
            listener.
        FloatingPointError: a loss or a gradient is not finite, or with skip_nonfinite none of an epoch is finite, seen
            at the next report or at the end of its epoch.
        ProcessLost: another process has ended.
        GraphError: with graph="on", a capture failed.
    """
    check_model(model)
    check_arguments(settings, listeners, resume)
    device = next(model.parameters()).device
    on_cuda = device.type == "cuda"
    processes = Processes(device)
    look = partial(look_at, model=model, first=processes.rank == 0)
    source = open_data("data", data, settings, processes, look)
    tested = open_test("test_data", test_data, settings, look)
    settings, plain = _resolved(settings, source, processes)
    check_objective(settings, model, source.size, source.batch_size, together=processes.together)
    if processes.rank == 0:
        warn_of_warmup(settings.kl_warmup, settings.epochs)
    # channels_last takes 11 to 25 % off a step on a CPU (batches of 128 and 32, one and two threads, the machine of
    # models/same_padding.py), and on a GPU it spares cuDNN its own conversions.
    to_channels_last(model)
    if average is not None:
        to_channels_last(average.model)
    if isinstance(source, Arrays) and source.all.input.is_cuda:
        # On a CPU each batch is brought to that format: images may be a file mapped into memory.
        source = Arrays(mapped(source.all, formatted), source.batch_size)
    # What changes must be a tensor on a GPU, for a captured graph to read; a scheduler writes into it.
    moves = on_cuda and settings.schedule != "constant"
    rate = torch.tensor(settings.learning_rate, device=device) if moves else settings.learning_rate
    # Fused: 4 dispatched operations per update; the foreach form takes 39, a loop over the parameters 128.
    optimizer = Adam(model.parameters(), lr=rate, betas=(0.9, 0.999), eps=1e-8, fused=True, capturable=on_cuda)
    scheduler = settings.scheduler(optimizer)
    threads = _threads(settings, model, source, processes, resume)
    on_device = torch.cuda.device(device) if on_cuda else freed_memory_kept()
    with losses_named(), arithmetic(settings.precision), with_threads(threads), on_device:
        steps = Steps(model, optimizer, source, settings, average=average, processes=processes)
        if processes.rank == 0:
            number = steps.at_a_time
            how = f"{number} at a time, as one CUDA graph" if plain is None else f"one at a time, because {plain}"
            for listener in listeners:
                listener.begin(how)
        try:
            return _train(steps, scheduler, tested, listeners, resume)
        finally:
            steps.release()


def _resolved(settings: Training, data: Arrays | Stream, processes: Processes) -> tuple[Training, str | None]:
    """The settings, without graphs where there can be none, and why there are none. Raises ``ValueError`` for what
    these data, this device or these processes do not go with.
    """
    batch_size = data.batch_size
    if data.ordered and (batch_size or 0) > (data.size or 0):
        raise ValueError(f"batch_size must be 1 to {data.size}, the number of training samples, got {batch_size}")
    if data.ordered and settings.steps_per_epoch is not None:
        raise ValueError(f"steps_per_epoch must be None for {data.size} samples, got {settings.steps_per_epoch}")
    if data.count == 0:
        raise ValueError(f"data must give at least one batch, got {data.size} samples in batches of {batch_size}")
    plain = None
    if processes.together:
        if batch_size is not None and batch_size % processes.size:
            raise ValueError(f"batch_size must be a multiple of {processes.size}, the processes, got {batch_size}")
        if settings.graph == "on":
            raise ValueError('graph must be "auto" or "off" where several processes train, got "on"')
        plain = "several processes train"
    elif processes.device.type != "cuda":
        if settings.graph == "on":
            raise ValueError(f'graph="on" needs a CUDA device, got {processes.device}')
        plain = f"only a CUDA device has graphs, and the model is on {processes.device}"
    elif settings.graph == "off":
        plain = 'graph is "off"'
    elif data.varying is not None:
        if settings.graph == "on":
            raise ValueError(f'graph="on" needs batches of one size: {data.varying}')
        plain = data.varying
    return (settings if plain is None else dataclasses.replace(settings, graph="off")), plain


def _threads(
    settings: Training, model: VAE, data: Arrays | Stream, processes: Processes, resume: TrainingState | None
) -> int:
    before = None if resume is None else resume.threads
    if processes.device.type == "cuda":
        return torch.get_num_threads()
    if settings.threads is not None:
        return settings.threads
    if processes.together or isinstance(data, Stream):
        return before or torch.get_num_threads()
    return choose_threads(
        model,
        data.all.input,
        data.batch_size,
        target=data.all.target,
        condition=data.all.condition,
        precision=settings.precision,
        objective=settings.objective,
        samples=settings.samples,
        before=before,
    )


def _evaluated(model: VAE, data: Arrays | Whole, settings: Training, dataset_size: int) -> Evaluation:
    """The test of a model."""
    loss = evaluated_loss(settings, dataset_size)
    if loss is None and isinstance(data, Arrays) and len(tensors(data.all)) == 1:
        return evaluate(model, data.all.input, beta=settings.beta)
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[]):  # a loader draws a seed when it begins, and augmentation more
        batches = (mapped(batch, lambda part: part.to(device)) for batch in data.whole())
        if settings.objective in COMPARING:
            batches = (batch for batch in batches if len(batch.input) > 1)
        return evaluate_batches(model, batches, beta=settings.beta, loss=loss)


def _train(
    steps: Steps,
    scheduler: LRScheduler | None,
    test_data: Arrays | Whole,
    listeners: Sequence[Listener],
    resume: TrainingState | None,
) -> list[EpochMetrics]:
    settings, processes = steps.settings, steps.processes
    told = listeners if processes.rank == 0 else ()
    epochs, beta, patience = settings.epochs, settings.beta, settings.patience
    total_steps = epochs * steps.count
    warmup_steps = settings.kl_warmup * steps.count
    held_beta = beta
    rows: list[EpochMetrics] = []
    done = 0  # steps of this epoch
    began = last_report = time.perf_counter()
    if resume is not None:
        rows, done = list(resume.rows), restore(resume, steps, scheduler)
        began -= resume.seconds
    elif steps.average is not None:
        steps.average.begin(steps.model)
    stopped = False
    for epoch in range(len(rows) + 1, epochs + 1):
        if patience is not None and len(rows) - best_epoch(rows) >= patience:
            break
        processes.share_generators()  # of every epoch: a listener, or a test, may have drawn in the first process alone
        if done == 0:
            steps.shuffle()
        else:
            steps.go_on(done)
        reported = done
        while done < steps.count and not stopped:
            step = (epoch - 1) * steps.count + done
            beta_now = beta * step / warmup_steps if step < warmup_steps else beta
            if beta_now != held_beta:
                steps.beta.fill_(beta_now)
                held_beta = beta_now
            done += steps.run(done)
            if not processes.meet(done, steps.count):
                continue
            due = processes.rank == 0 and time.perf_counter() - last_report >= _REPORT_SECONDS
            stopped, due = processes.any(_stop(listeners), due)
            ends = stopped or done == steps.count
            if ends or (due and listeners):
                processes.average(steps.history[reported:done])
                if told:
                    step = (epoch - 1) * steps.count + done
                    progress = Progress(epoch, step, total_steps, *means(steps, reported, done, epoch))
                    for listener in told:
                        listener.progress(progress)
                reported, last_report = done, time.perf_counter()
        step = (epoch - 1) * steps.count + done
        loss, reconstruction, kl, skipped = means(steps, 0, done, epoch)
        if skipped == steps.count:
            raise FloatingPointError(f"training diverged: none of the steps of epoch {epoch}, to {step}, was finite")
        tested = steps.model if steps.average is None else steps.average.model
        test = Evaluation(
            *processes.by_first(partial(_evaluated, tested, test_data, settings, steps.data.size or 0), 2)
        )
        if not math.isfinite(test.loss) and broken(steps):  # the last step's update did it
            raise FloatingPointError(
                f"training diverged: after step {step}, at the end of epoch {epoch}, these are not finite: "
                f"{', '.join(broken(steps))}"
            )
        seconds = time.perf_counter() - began
        rate = float(steps.optimizer.param_groups[0]["lr"])
        row = EpochMetrics(epoch, step, loss, reconstruction, kl, *test, seconds, skipped, rate)
        if scheduler is not None and done == steps.count:
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(test.loss)
            else:
                scheduler.step()
        for listener in told:
            listener.epoch(row)
        if told:
            finished = rows if done < steps.count else [*rows, row]
            state = state_of(steps, scheduler, finished, done % steps.count, seconds)
            for listener in told:
                listener.state(state)
        rows.append(row)
        if stopped or processes.any(_stop(listeners))[0]:
            break
        done = 0
    return rows


def _stop(listeners: Sequence[Listener]) -> bool:
    """Whether one of them ends training; all are asked, for one may count how often."""
    return any([listener.should_stop() for listener in listeners])
