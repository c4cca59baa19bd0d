"""Ctrl-C as a request to stop, so that what was trained is kept."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from fastvae.training.listener import Listener


class _Interrupt(Listener):
    """Ends training once Ctrl-C was pressed."""

    pressed = False

    def should_stop(self) -> bool:
        return self.pressed


@contextmanager
def stop_on_interrupt() -> Iterator[Listener]:
    """Gives a listener for `train`, which ends it where Ctrl-C is pressed in this block.

    A second Ctrl-C raises ``KeyboardInterrupt`` as usual. For the main thread only, as are signal handlers.
    """
    interrupt = _Interrupt()

    def stop(number: int, frame: FrameType | None) -> None:
        interrupt.pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # Not print: a handler may run in the middle of another print.
        os.write(2, b"\nstopping after this step; Ctrl-C again aborts\n")

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)
