"""A stand-in for the driver of an H200. Triton compiles for it and prepares every launch, but nothing is launched.

It measures launches of CPU tensors, up to the call of the driver, on a machine without a GPU. TRITON_INTERPRET must not
be set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import fastvae
from fastvae import backend, random


class Driver:
    """`launch` is called in place of the driver's: with the grid, the stream, the function and what belongs to it, and
    the arguments.
    """

    def __init__(self, launch: Callable[..., Any]) -> None:
        self.launcher_cls = lambda source, metadata: launch
        self.functions = 0
        properties = {"max_shared_mem": 227 << 10, "multiprocessor_count": 132, "warpSize": 32}
        self.utils = SimpleNamespace(load_binary=self.load_binary, get_device_properties=lambda device: properties)

    def load_binary(self, *arguments: Any) -> tuple[int, int, int, int, int]:
        self.functions += 1
        return 1, self.functions, 32, 0, 1024  # module, function, registers, spills, threads at most

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Generator:
    """As a CUDA generator hands out noise: two numbers, without a draw."""

    offset = 0

    def get_offset(self) -> int:
        return self.offset

    def set_offset(self, offset: int) -> None:
        self.offset = offset

    def initial_seed(self) -> int:
        return 0x5EED_0000_0000


@contextmanager
def stand_in(launch: Callable[..., Any] = lambda *arguments: None) -> Iterator[None]:
    """Fused operations take CPU tensors, and do all but the launch."""
    generator = Generator()

    def reserve(device: torch.device, unused: Any) -> random.PhiloxState:
        return random.by_value(generator)

    with ExitStack() as stack:
        stack.enter_context(patch.object(backend, "_obstacle", lambda tensor: None))
        stack.enter_context(patch.object(random, "reserve", reserve))
        stack.enter_context(patch.object(driver, "_active", Driver(launch)))
        stack.enter_context(fastvae.use_backend("triton"))
        yield
