"""The training loop: Adam on the negative evidence lower bound, with the images as bytes on the model's device.

A step never waits for the device: its loss is written to a tensor there, which is read for the progress display about
twice a second and at the end of each epoch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

import fastvae.functional as F
from fastvae.evaluation import evaluate
from fastvae.functional import ELBO
from fastvae.models import ConvVAE, VAEOutput

# Each report reads from the device, so it waits for the steps that are queued there; a display needs no more than this.
_REPORT_SECONDS = 0.5


class EpochMetrics(NamedTuple):
    """What an epoch came to. Losses are in nats per image.

    epoch: from 1; step: steps since training began.
    loss, reconstruction, kl: means over the epoch's steps, loss = reconstruction + beta * kl.
    test_loss: the loss on the test images, with sampled z; test_mse: their mean squared error per pixel, with z = mu.
    seconds: since training began, tests included.
    """

    epoch: int
    step: int
    loss: float
    reconstruction: float
    kl: float
    test_loss: float
    test_mse: float
    seconds: float


class Progress(NamedTuple):
    """Where training is: the epoch, the steps done and planned, and the means over the steps since the last report."""

    epoch: int
    step: int
    total_steps: int
    loss: float
    reconstruction: float
    kl: float


def training_step(model: ConvVAE, optimizer: Optimizer, images: Tensor, *, beta: float | Tensor = 1.0) -> ELBO:
    """One update of the model on a batch of images [B, C, H, W]; returns the loss before it, on the device."""
    output: VAEOutput = model(images)
    values, gradients = F.elbo_value_and_grad(output.logits, images, output.kl, beta=beta)
    optimizer.zero_grad()
    torch.autograd.backward((output.logits, output.kl), gradients)
    optimizer.step()
    return values


def train(
    model: ConvVAE,
    train_images: Tensor,
    test_images: Tensor,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float = 1e-3,
    beta: float = 1.0,
    should_stop: Callable[[], bool] = lambda: False,
    on_progress: Callable[[Progress], None] | None = None,
    on_epoch: Callable[[EpochMetrics], None] | None = None,
) -> list[EpochMetrics]:
    """Train a model in place, and convert it to the channels_last memory format.

    Images are reshuffled every epoch; those left over from whole batches are skipped in that epoch.

    Args:
        train_images, test_images: [N, C, H, W] on the model's device; uint8 (read as x / 255) or floats in [0, 1].
        epochs, batch_size, learning_rate: positive; beta: the weight of the divergence, not negative.
        should_stop: asked after every step and epoch; a yes ends training with the metrics of the epoch so far.
        on_progress: called about twice a second, and at the end of each epoch.
        on_epoch: called with the metrics of each epoch.

    Returns:
        The metrics of every epoch, the unfinished one included.

    Raises:
        ValueError: an argument out of range, a batch_size larger than the training set, or images on another device.
        FloatingPointError: the loss of an epoch is not finite.
    """
    _check(model, train_images, test_images, epochs, batch_size, learning_rate, beta)
    device = train_images.device
    # channels_last takes 11 to 25 % off a step on a CPU (batches of 128 and 32, one and two threads, the machine of
    # models/same_padding.py), and on a GPU it spares cuDNN its own conversions.
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    train_images = train_images.contiguous(memory_format=torch.channels_last)
    # Fused: 4 dispatched operations per update; the foreach form takes 39, a loop over the parameters 128.
    optimizer = Adam(model.parameters(), lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, fused=True)
    beta_on_device = torch.tensor(beta, device=device)
    steps_per_epoch = len(train_images) // batch_size
    total_steps = epochs * steps_per_epoch
    history = torch.zeros(steps_per_epoch, 3, device=device)  # of one epoch: loss, reconstruction, kl of each step

    rows: list[EpochMetrics] = []
    step = 0
    stopped = False
    began = last_report = time.perf_counter()
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(train_images), device=device)
        reported = 0
        for index in range(steps_per_epoch):
            batch = train_images[order[index * batch_size : (index + 1) * batch_size]]
            torch.stack(training_step(model, optimizer, batch, beta=beta_on_device), out=history[index])
            step += 1
            stopped = should_stop()
            done = index + 1
            ends = stopped or done == steps_per_epoch
            if on_progress is not None and (ends or time.perf_counter() - last_report >= _REPORT_SECONDS):
                on_progress(Progress(epoch, step, total_steps, *history[reported:done].mean(0).tolist()))
                reported, last_report = done, time.perf_counter()
            if stopped:
                break
        loss, reconstruction, kl = history[:done].mean(0).tolist()
        if not math.isfinite(loss):
            raise FloatingPointError(f"training diverged: the mean loss of epoch {epoch} is {loss}")
        test = evaluate(model, test_images, beta=beta)
        row = EpochMetrics(epoch, step, loss, reconstruction, kl, *test, time.perf_counter() - began)
        rows.append(row)
        if on_epoch is not None:
            on_epoch(row)
        if stopped or should_stop():
            break
    return rows


def _check(
    model: ConvVAE,
    train_images: Tensor,
    test_images: Tensor,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    beta: float,
) -> None:
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    if not 1 <= batch_size <= len(train_images):
        raise ValueError(
            f"batch_size must be 1 to {len(train_images)}, the number of training images, got {batch_size}"
        )
    if not (learning_rate > 0 and math.isfinite(learning_rate)):
        raise ValueError(f"learning_rate must be positive and finite, got {learning_rate}")
    if not (beta >= 0 and math.isfinite(beta)):
        raise ValueError(f"beta must be finite and not negative, got {beta}")
    device = next(model.parameters()).device
    for name, images in (("train_images", train_images), ("test_images", test_images)):
        if images.device != device:
            raise ValueError(f"{name} must be on the model's device, {device}, got {images.device}")
    if len(test_images) == 0:
        raise ValueError("test_images must hold at least one image, got none")
