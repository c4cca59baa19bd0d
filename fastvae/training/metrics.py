"""What training reports."""

from __future__ import annotations

from typing import NamedTuple


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
