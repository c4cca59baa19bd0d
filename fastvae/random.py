"""Reserve noise from a torch generator without drawing it.

A fused operation computes its noise from the pair (seed, offset), see `fastvae.kernels.noise`. The pair comes from the
generator in one of three ways:

- CUDA, eager: the two numbers themselves. The generator's offset grows as if a kernel of torch had drawn. This needs no
  launch and no synchronisation, and `manual_seed`, `fork_rng`, `set_rng_state` and activation checkpointing work as for
  any other draw.
- CUDA, during the capture of a graph and in the steps before it (`by_pointer`): device pointers. Each replay then draws
  new noise, and `manual_seed` before a replay repeats it. Before torch 2.13, which has no such pointers, one captured
  draw of two integers.
- Otherwise one draw of two integers from the generator, because CPU generators have no offset and torch.compile must
  see the draw.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

# Torch's contract: whoever reserves an increment owns that many 32-bit words, a multiple of 4, of every Philox
# subsequence.
_INCREMENT = 4

# Reading and moving the offset are two calls: without it, two threads could draw the same noise.
_lock = threading.Lock()


class PhiloxState(NamedTuple):
    """By value: (None, None, seed, offset). By pointer: two int64 tensors, and an offset that is added to the offset
    read from them.
    """

    seed_tensor: Tensor | None
    offset_tensor: Tensor | None
    seed: int
    offset: int


# One for all threads: backward, which may draw again, runs in a thread of its own.
_wanted_by_pointer = False


@contextmanager
def by_pointer() -> Iterator[None]:
    """In this block noise is reserved by pointer, as during the capture of a graph.

    Before torch 2.13 this draws with a kernel of torch. Draws before a capture load the kernel, because a capture
    cannot load it.
    """
    global _wanted_by_pointer
    before, _wanted_by_pointer = _wanted_by_pointer, True
    try:
        yield
    finally:
        _wanted_by_pointer = before


def reserve(device: torch.device, generator: torch.Generator | None) -> PhiloxState:
    """Reserve the noise of one call from `generator`, or from the default generator of `device`."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return _drawn(device, generator)
    if generator is None:
        generator = torch.cuda.default_generators[device.index]
    if _is_capturing(device):
        return _captured(device, generator)
    if _wanted_by_pointer:
        return _drawn(device, generator)
    return by_value(generator)


def by_value(generator: torch.Generator) -> PhiloxState:
    """The pair of numbers of a generator that has an offset."""
    with _lock:
        offset = generator.get_offset()
        generator.set_offset(offset + _INCREMENT)
    seed = generator.initial_seed()
    # A kernel argument is a signed integer; the generator's seed is not.
    return PhiloxState(None, None, seed - (1 << 64) if seed >= 1 << 63 else seed, offset)


def _is_capturing(device: torch.device) -> bool:
    if device.index == torch.cuda.current_device():
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _captured(device: torch.device, generator: torch.Generator) -> PhiloxState:
    if hasattr(generator, "philox_state"):  # torch 2.14
        seed, offset, extra = generator.philox_state(_INCREMENT)
        return PhiloxState(seed, offset, 0, int(extra))
    if hasattr(torch.ops.inductor_prims, "inductor_reserve_rng_state"):  # torch 2.13
        seed, offset, extra = torch.ops.inductor_prims.inductor_reserve_rng_state(generator, _INCREMENT)
        return PhiloxState(seed, offset, 0, int(extra))
    return _drawn(device, generator)


def _drawn(device: torch.device, generator: torch.Generator | None) -> PhiloxState:
    if generator is not None and torch.compiler.is_compiling():
        raise NotImplementedError(
            "generator is not supported under torch.compile, which cannot trace a torch.Generator"
        )
    pair = torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=device, generator=generator)
    seed, offset = pair.unbind()
    return PhiloxState(seed, offset, 0, 0)
