"""Showing a run's progress: one bar over the whole run in a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from fastvae.training.listener import Listener
from fastvae.training.metrics import EpochMetrics, Progress

# In plain lines, between the epochs: often enough to see that a long epoch is alive.
_LINE_SECONDS = 30.0


class Display(Listener):
    """Shows nothing."""

    def close(self) -> None:
        """Leave the terminal to others."""


def make_display(epochs: int, quiet: bool = False, first_step: int = 0) -> Display:
    """A bar if standard output is a terminal with a width and tqdm is installed, else lines; nothing if ``quiet``.

    first_step: the steps of an earlier run that this one goes on from; the rate and the time left are without them.
    """
    if quiet:
        return Display()
    if sys.stdout.isatty() and _width() != 0:
        try:
            from tqdm import tqdm
        except ImportError:
            return Lines(epochs, first_step)
        return Bar(epochs, tqdm, first_step)
    return Lines(epochs, first_step)


def _width() -> int | None:
    """Of the terminal; 0, which some terminals within other programs say, would leave no room for a bar."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns
    except (OSError, ValueError):  # none that has a size
        return None


class _Shown(Display):
    def begin(self, how: str) -> None:
        print(f"steps     {how}", flush=True)


class Bar(_Shown):
    """A progress bar: epoch, steps per second, time left, loss, reconstruction and divergence."""

    def __init__(self, epochs: int, tqdm: Any, first_step: int) -> None:
        self.epochs = epochs
        self.first_step = first_step
        self.tqdm = tqdm
        self.bar: Any = None

    def progress(self, progress: Progress) -> None:
        if self.bar is None:
            self.bar = self.tqdm(
                total=progress.total_steps,
                initial=self.first_step,
                file=sys.stdout,
                dynamic_ncols=True,
                # The bar comes last: in a narrow terminal it is what is cut.
                bar_format="{desc}, {rate_noinv_fmt}, {remaining} left{postfix} |{bar}|",
                unit=" steps",
            )
        self.bar.set_description_str(f"epoch {progress.epoch}/{self.epochs}", refresh=False)
        self.bar.set_postfix_str(
            f"loss {progress.loss:.1f}, reconstruction {progress.reconstruction:.1f}, KL {progress.kl:.1f}"
            f"{skipped(progress)}",
            refresh=False,
        )
        self.bar.update(progress.step - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class Lines(_Shown):
    """A line for each epoch, and one every half minute within it."""

    def __init__(self, epochs: int, first_step: int) -> None:
        self.epochs = epochs
        self.first_step = first_step
        self.began = self.last_line = time.perf_counter()
        self.total_steps = 0

    def progress(self, progress: Progress) -> None:
        self.total_steps = progress.total_steps
        if time.perf_counter() - self.last_line >= _LINE_SECONDS:
            self._line(progress)

    def epoch(self, metrics: EpochMetrics) -> None:
        self._line(metrics, f", test loss {metrics.test_loss:.2f}, test mse {metrics.test_mse:.4f}")

    def _line(self, values: Progress | EpochMetrics, test: str = "") -> None:
        self.last_line = time.perf_counter()
        rate = (values.step - self.first_step) / (self.last_line - self.began)
        left = (self.total_steps - values.step) / rate
        print(
            f"epoch {values.epoch}/{self.epochs}, step {values.step}: loss {values.loss:.2f}, "
            f"reconstruction {values.reconstruction:.2f}, KL {values.kl:.2f}{test}{skipped(values)}, "
            f"{rate:.1f} steps/s, {left:.0f} s left",
            flush=True,
        )


def skipped(values: Progress | EpochMetrics) -> str:
    """Nothing where no step was skipped."""
    return f", {values.skipped} skipped" if values.skipped else ""
