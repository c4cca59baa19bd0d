"""Launching: where, in which mode, and with which ticket."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from .numerics import exp

# The mode is fixed when a function is decorated, and TRITON_INTERPRET may have changed since: ask a function, not the
# environment.
INTERPRETED = not isinstance(exp, triton.JITFunction)

# The kernels' FAST: NVIDIA's approximate instructions exist neither on the interpreter nor on AMD.
FAST = not INTERPRETED and torch.version.hip is None

# By device and stream.
_tickets: dict[tuple[str, int | None, int], Tensor] = {}
_zeros: dict[tuple[str, int | None, int], Tensor] = {}
_calling = threading.local()


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make `device` current; free where it is already, or is no CUDA device."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return nullcontext()


def launch(kernel: Any, programs: int, num_warps: int, device: torch.device, *arguments: Any, **constants: Any) -> None:
    """Run `kernel` with `programs` programs on the current stream of `device`, also when another device is current."""
    options = dict(constants, num_warps=num_warps, enable_fp_fusion=True)
    if "FAST" in kernel.arg_names:
        options["FAST"] = FAST
    try:
        with on_device(device):
            kernel[(programs,)](*arguments, **options)
    except BaseException:
        # A launch that was cut short may have drawn tickets: later launches get new ones.
        _tickets.clear()
        raise


def ticket(device: torch.device) -> Tensor:
    """int32 [1], zero: the counter by which the last program of a launch knows itself (`tiles.drew_last_ticket`).

    One per device and stream, because launches on one stream follow each other. Under capture a new one, zeroed inside
    the graph, because a graph may be replayed on any stream; also inside `fresh_tickets`.
    """
    return _kept_zero(_tickets, device, torch.int32)


def zero(device: torch.device) -> Tensor:
    """int64 [1], zero, which no kernel writes; kept like a ticket."""
    return _kept_zero(_zeros, device, torch.int64)


def _kept_zero(kept: dict[tuple[str, int | None, int], Tensor], device: torch.device, dtype: torch.dtype) -> Tensor:
    stream = 0
    if device.type == "cuda":
        with on_device(device):
            if torch.cuda.is_current_stream_capturing():
                return torch.zeros(1, dtype=dtype, device=device)
        stream = torch._C._cuda_getCurrentRawStream(device.index)
    if getattr(_calling, "fresh_tickets", False):
        return torch.zeros(1, dtype=dtype, device=device)
    key = (device.type, device.index, stream)
    tensor = kept.get(key)
    if tensor is None:
        tensor = kept[key] = torch.zeros(1, dtype=dtype, device=device)
    return tensor


@contextmanager
def fresh_tickets() -> Iterator[None]:
    """Launches in this block get tickets of their own.

    For calls out of torch.compile: its warm-up of CUDA graphs allocates from the pool of the graph, where nothing may
    stay when the call is over.
    """
    _calling.fresh_tickets = True
    try:
        yield
    finally:
        _calling.fresh_tickets = False
