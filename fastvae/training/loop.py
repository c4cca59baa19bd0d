"""The training loop: Adam on the negative evidence lower bound, with the images as bytes on the model's device.

A step never waits for the device: its loss is written to a tensor there, which is read for the progress display about
twice a second and at the end of each epoch. On a CUDA device several steps run as one captured graph.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fastvae.evaluation import Evaluation, evaluate
from fastvae.models import VAE
from fastvae.training.average import MovingAverage
from fastvae.training.checks import (
    check_images,
    check_model,
    integer,
    not_negative,
    number,
    positive,
    warn_of_values,
    warn_of_warmup,
)
from fastvae.training.distributed import Processes, losses_named
from fastvae.training.finite import broken, means
from fastvae.training.memory import freed_memory_kept
from fastvae.training.metrics import EpochMetrics, Progress, best_epoch
from fastvae.training.precision import PRECISIONS, arithmetic
from fastvae.training.state import TrainingState, restore, state_of
from fastvae.training.steps import Steps
from fastvae.training.threads import choose_threads, with_threads

# Each report reads from the device, so it waits for the steps that are queued there; a display needs no more than this.
_REPORT_SECONDS = 0.5


def train(
    model: VAE,
    train_images: Tensor,
    test_images: Tensor,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float = 1e-3,
    beta: float = 1.0,
    kl_warmup: float = 0.0,
    free_bits: float = 0.0,
    clip_norm: float | None = None,
    schedule: Callable[[Optimizer], LRScheduler] | None = None,
    average: MovingAverage | None = None,
    patience: int | None = None,
    skip_nonfinite: bool = False,
    graph: str = "auto",
    precision: str = "tf32",
    threads: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_progress: Callable[[Progress], None] | None = None,
    on_epoch: Callable[[EpochMetrics], None] | None = None,
    on_state: Callable[[TrainingState], None] | None = None,
    resume: TrainingState | None = None,
) -> list[EpochMetrics]:
    """Train a model in place, with its likelihood, and convert it to the channels_last memory format.

    Images are reshuffled every epoch; those left over from whole batches are skipped in that epoch.

    Where torch.distributed has a process group, its processes train together, called alike and each with all images:
    every batch is shared out evenly, as DistributedDataParallel has it, and the noise is that of the whole batch. The
    weights and generators are those of the first process at the start; it alone tests, and calls on_progress, on_epoch
    and on_state. Without a CUDA graph.

    Args:
        train_images, test_images: [N, C, H, W], uint8 (read as x / 255) or of the model's dtype, in [0, 1] where the
            likelihood's target is "unit" (a warning says where they are not); on the model's device, or on the CPU,
            from where they are brought as they are needed: sets that do not fit a GPU.
        epochs, batch_size, learning_rate: positive; beta: the weight of the divergence, not negative.
        kl_warmup: the epochs, whole or not, in which the weight grows from 0 to beta in equal steps (Bowman et al.,
            "Generating Sentences from a Continuous Space", 2016); the steps of one graph share a weight. The test loss
            has beta from the start. More epochs than there are is a warning.
        free_bits: nats that each dimension of z may hold, in the mean over a batch, before its divergence counts
            (`fastvae.functional.gaussian_kl`); of several processes each has its own mean. The test loss has none.
        clip_norm: the largest norm of all gradients together; larger ones are scaled to it.
        schedule: makes one of torch.optim.lr_scheduler's schedulers of an optimizer; it takes a step after each epoch.
            With `resume` it goes on as it was made first.
        average: takes in the weights after every step; its model is then the one that is tested.
        patience: training ends once so many epochs have passed without a smaller test loss.
        skip_nonfinite: a step whose gradient is not finite changes nothing and is counted (`EpochMetrics.skipped`).
        graph: "on": several steps run as one CUDA graph, which only a CUDA device can; "off"; "auto": where it can, and
            where the capture fails a warning. The model must then do the same work at every step, without reading from
            the device.
        precision: of convolutions and matrix products, "fp32"; "tf32", where the hardware has it; or "bf16", by
            autocast. Weights and losses are float32 with each.
        threads: of a CPU's steps; None: those with which a step takes the least time (`choose_threads`), or with
            `resume` those of the state. Of several processes each has those that torch has.
        should_stop: asked after every step (every graph of steps) and epoch; a yes ends training with the metrics of
            the epoch so far.
        on_progress: called about twice a second, and at the end of each epoch.
        on_epoch: called with the metrics of each epoch.
        on_state: called after on_epoch with what training needs, besides the model's weights, to go on from there.
        resume: such a state, with the weights of that moment in the model and the other arguments as they were (epochs
            may be more): training goes on as if it had not stopped, on a CPU bit for bit. `fastvae.training.checkpoint`
            keeps states in files.

    Returns:
        The metrics of every epoch, the unfinished one included.

    Raises:
        ValueError: an argument out of range, a batch_size larger than the training set, images on another device,
            graph="on" without a CUDA device, a model without a parameter to train, or a state of other images, batches
            or parameters; in several processes a batch_size that they cannot share evenly, or graph="on".
        TypeError: a model that is no VAE, images that are no tensor or of another dtype, or what is no number.
        FloatingPointError: a loss or a gradient is not finite, or with skip_nonfinite none of an epoch is finite, seen
            at the next report or at the end of its epoch; on_state is not called for that epoch, so that what it kept
            before is good.
        ProcessLost: another process has ended.
        GraphError: with graph="on", a capture failed.
    """
    check_model(model)
    check_images("train_images", train_images, model)
    check_images("test_images", test_images, model)
    epochs = integer("epochs", epochs, 1)
    batch_size = integer("batch_size", batch_size, 1, len(train_images), ", the number of training images")
    learning_rate = number("learning_rate", learning_rate, "positive and finite", positive)
    beta = number("beta", beta, "finite and not negative", not_negative)
    kl_warmup = number("kl_warmup", kl_warmup, "finite and not negative", not_negative)
    free_bits = number("free_bits", free_bits, "finite and not negative", not_negative)
    if clip_norm is not None:
        clip_norm = number("clip_norm", clip_norm, "positive", lambda value: value > 0)
    if patience is not None:
        patience = integer("patience", patience, 1)
    if threads is not None:
        threads = integer("threads", threads, 1)
    if graph not in ("auto", "on", "off"):
        raise ValueError(f'graph must be "auto", "on" or "off", got {graph!r}')
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if resume is not None and not isinstance(resume, TrainingState):
        raise TypeError(f"resume must be a TrainingState, of on_state or a Checkpoint's state, got {type(resume)}")
    device = next(model.parameters()).device
    on_cuda = device.type == "cuda"
    processes = Processes(device)
    if processes.together:
        if batch_size % processes.size:
            raise ValueError(f"batch_size must be a multiple of {processes.size}, the processes, got {batch_size}")
        if graph == "on":
            raise ValueError('graph must be "auto" or "off" where several processes train, got "on"')
    if graph == "on" and not on_cuda:
        raise ValueError(f'graph="on" needs a CUDA device, got {device}')
    if processes.rank == 0:
        warn_of_values("train_images", train_images, model.likelihood)
        warn_of_values("test_images", test_images, model.likelihood)
        warn_of_warmup(kl_warmup, epochs)
    # channels_last takes 11 to 25 % off a step on a CPU (batches of 128 and 32, one and two threads, the machine of
    # models/same_padding.py), and on a GPU it spares cuDNN its own conversions.
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if average is not None:
        average.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if train_images.is_cuda:  # on a CPU each batch is brought to that format: images may be a file mapped into memory
        train_images = train_images.contiguous(memory_format=torch.channels_last)
    # What changes must be a tensor on a GPU, for a captured graph to read; a scheduler writes into it.
    rate = torch.tensor(learning_rate, device=device) if on_cuda and schedule is not None else learning_rate
    # Fused: 4 dispatched operations per update; the foreach form takes 39, a loop over the parameters 128.
    optimizer = Adam(model.parameters(), lr=rate, betas=(0.9, 0.999), eps=1e-8, fused=True, capturable=on_cuda)
    scheduler = None if schedule is None else schedule(optimizer)
    beta_on_device = torch.tensor(beta, device=device)
    autocast_dtype = torch.bfloat16 if precision == "bf16" else None
    if on_cuda or (processes.together and threads is None):
        threads = torch.get_num_threads()
    elif threads is None:
        before = None if resume is None else resume.threads
        threads = choose_threads(model, train_images, batch_size, precision=precision, before=before)
    on_device = torch.cuda.device(device) if on_cuda else freed_memory_kept()
    with losses_named(), arithmetic(precision), with_threads(threads), on_device:
        steps = Steps(
            model,
            optimizer,
            train_images,
            batch_size,
            beta_on_device,
            graph if on_cuda and not processes.together else "off",
            autocast_dtype,
            clip_norm,
            skip_nonfinite,
            average,
            processes,
            free_bits,
        )
        if processes.rank:
            on_progress, on_epoch, on_state = (call and _ignored for call in (on_progress, on_epoch, on_state))
        try:
            return _train(
                steps,
                scheduler,
                test_images,
                epochs,
                beta,
                kl_warmup,
                patience,
                should_stop,
                on_progress,
                on_epoch,
                on_state,
                resume,
            )
        finally:
            steps.release()


def _ignored(report: object) -> None:
    """What the other processes do with what they are told."""


def _train(
    steps: Steps,
    scheduler: LRScheduler | None,
    test_images: Tensor,
    epochs: int,
    beta: float,
    kl_warmup: float,
    patience: int | None,
    should_stop: Callable[[], bool],
    on_progress: Callable[[Progress], None] | None,
    on_epoch: Callable[[EpochMetrics], None] | None,
    on_state: Callable[[TrainingState], None] | None,
    resume: TrainingState | None,
) -> list[EpochMetrics]:
    processes = steps.processes
    total_steps = epochs * steps.count
    warmup_steps = kl_warmup * steps.count
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
        processes.share_generators()  # of every epoch: on_epoch, or a test, may have drawn in the first process alone
        if done == 0:
            steps.shuffle()
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
            stopped, due = processes.any(should_stop(), due)
            ends = stopped or done == steps.count
            if ends or (due and on_progress is not None):
                processes.average(steps.history[reported:done])
                if on_progress is not None:
                    step = (epoch - 1) * steps.count + done
                    on_progress(Progress(epoch, step, total_steps, *means(steps, reported, done, epoch)))
                reported, last_report = done, time.perf_counter()
        step = (epoch - 1) * steps.count + done
        loss, reconstruction, kl, skipped = means(steps, 0, done, epoch)
        if skipped == steps.count:
            raise FloatingPointError(f"training diverged: none of the steps of epoch {epoch}, to {step}, was finite")
        tested = steps.model if steps.average is None else steps.average.model
        test = Evaluation(*processes.by_first(partial(evaluate, tested, test_images, beta=beta), 2))
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
        if on_epoch is not None:
            on_epoch(row)
        if on_state is not None:
            finished = rows if done < steps.count else [*rows, row]
            on_state(state_of(steps, scheduler, finished, done % steps.count, seconds))
        rows.append(row)
        if stopped or processes.any(should_stop())[0]:
            break
        done = 0
    return rows
