"""What training reports."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class EpochMetrics(NamedTuple):
    """What an epoch came to. Losses are in nats per image.

    epoch: from 1; step: steps since training began.
    loss, reconstruction, kl: means over the epoch's steps. For the objective "elbo", loss = reconstruction + beta * kl;
    for others reconstruction and kl are the terms of the ELBO of the same samples.
    test_loss: the loss on the test images, with sampled z; test_mse: their mean squared error per pixel, with z = mu.
    seconds: since training began, tests included.
    skipped: the steps of the epoch that were not finite and changed nothing; the means leave them out.
    learning_rate: in this epoch.
    """

    epoch: int
    step: int
    loss: float
    reconstruction: float
    kl: float
    test_loss: float
    test_mse: float
    seconds: float
    skipped: int = 0
    learning_rate: float = math.nan


class Progress(NamedTuple):
    """Where training is: the epoch, the steps done and planned, the means over the steps since the last report, and how
    many of these were skipped.
    """

    epoch: int
    step: int
    total_steps: int
    loss: float
    reconstruction: float
    kl: float
    skipped: int = 0


def best_epoch(rows: Sequence[EpochMetrics]) -> int:
    """The first epoch with the smallest test loss; 0 if there are none. NaN is larger than any."""
    losses = [math.inf if math.isnan(row.test_loss) else row.test_loss for row in rows]
    return rows[losses.index(min(losses))].epoch if rows else 0
