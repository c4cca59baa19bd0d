"""Ctrl-C as a request to stop, so that what was trained is kept."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Gives a function for `train`'s should_stop: whether Ctrl-C was pressed in this block.

    A second Ctrl-C raises ``KeyboardInterrupt`` as usual. For the main thread only, as are signal handlers.
    """
    pressed = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # Not print: a handler may run in the middle of another print.
        os.write(2, b"\nstopping after this step; Ctrl-C again aborts\n")

    previous = signal.signal(signal.SIGINT, stop)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, previous)
