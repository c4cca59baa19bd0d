"""What hears of a training while it goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastvae.training.metrics import EpochMetrics, Progress

if TYPE_CHECKING:
    from fastvae.training.state import TrainingState


class Listener:
    """Is told of steps and epochs by `fastvae.training.train`, and may end it. Each method does nothing here: a class
    of your own defines those that it needs.

    Where several processes train, all of them ask `should_stop`, and the first one alone tells of the rest.
    """

    def begin(self, how: str) -> None:
        """Before the first step, with how steps run, in words: so many at a time as one CUDA graph, or one at a time,
        and then why.
        """

    def should_stop(self) -> bool:
        """Asked after every step (every graph of steps) and every epoch. True ends training, with the metrics of the
        epoch so far.
        """
        return False

    def progress(self, progress: Progress) -> None:
        """About twice a second, and at the end of each epoch. Reading the numbers waits for the device."""

    def epoch(self, metrics: EpochMetrics) -> None:
        """At the end of each epoch, after its test."""

    def state(self, state: TrainingState) -> None:
        """After `epoch`, with what training needs, besides the model's weights, to go on from here. `write_checkpoint`
        keeps it in a file. It is not told of an epoch that diverged, so that what was kept before is good.
        """
