"""A listener of training made of functions, so that a test needs no class of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastvae.training import Listener


def listener(**methods: Callable[..., Any]) -> Listener:
    """With these methods of `Listener`: should_stop, progress, epoch, state."""
    made = Listener()
    for name, method in methods.items():
        getattr(made, name)  # raises for what is none
        setattr(made, name, method)
    return made
