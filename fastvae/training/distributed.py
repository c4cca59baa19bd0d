"""Training in several processes, each with a part of every batch: torch.distributed, and what they agree upon.

All processes hold all images and draw the same permutations and seeds; noise is addressed by a sample's place in the
whole batch. So they train as one process would on the whole batch, but for the order of the sums.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from fastvae.models import VAE

# To agree, all processes wait for each other; a step between two GPUs takes less than a millisecond.
_STEPS_BETWEEN_AGREEMENTS = 16

# A process that is killed is noticed at once; this is for one that hangs.
_TIMEOUT = timedelta(minutes=5)

# For what the first process does alone while the others wait: a large set of images takes its time.
_PATIENCE = timedelta(days=1)

# torchrun gives a process 30 seconds to end.
_FAREWELL_SECONDS = 10


class ProcessLost(RuntimeError):
    """Another process of the run has ended, or cannot be reached."""


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """The default process group of what torchrun started: NCCL for a CUDA device, which becomes the current one, else
    gloo; without torchrun, nothing.

    torchrun ends all processes by SIGTERM when one has failed; in this block that is said. For the main thread only.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield
        return
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_cuda else "gloo", timeout=_TIMEOUT)
    try:
        with _said_when_terminated():
            waiting_group()
            yield
    except BaseException:
        _gloo_groups.clear()
        # Another process may be lost: leaving NCCL then waits for what will never come, and this process is to end.
        leaving = threading.Thread(target=_leave, args=[device], daemon=True)
        leaving.start()
        leaving.join(_FAREWELL_SECONDS)
        raise
    _gloo_groups.clear()
    dist.destroy_process_group()


def _leave(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with suppress(Exception):  # there is an error already
        dist.destroy_process_group()


@contextmanager
def _said_when_terminated() -> Iterator[None]:
    """In this block SIGTERM ends the process with a message.

    A handler in Python waits for the main thread to come back from what it calls, which may be a collective operation
    that never ends. So a thread is told of the signal, through a pipe that Python's own handler writes to.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        while number := os.read(reader, 1)[0]:
            if number == signal.SIGTERM:
                text = f"process {os.environ['RANK']}: ended by SIGTERM, as torchrun does when one has failed\n"
                os.write(2, text.encode())
                os._exit(128 + signal.SIGTERM)

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    previous = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
        signal.set_wakeup_fd(fd)
        os.write(writer, b"\0")  # not its end: a process that was forked may hold it open
        watching.join()
        os.close(writer)
        os.close(reader)


@contextmanager
def losses_named() -> Iterator[None]:
    """Raise `ProcessLost` for an error of the communication."""
    try:
        yield
    except RuntimeError as error:
        # gloo's errors have no class of their own.
        if "gloo" in str(error) or (dist.is_available() and isinstance(error, dist.DistError)):
            reason = str(error).partition("\n")[0]
            raise ProcessLost(f"another process has ended, or cannot be reached: {reason}") from error
        raise


def waiting_group() -> dist.ProcessGroup:
    """The group in which processes wait for the first: of gloo, because what waits on a GPU has no patience.

    To be called by all at about the same time, before one lets the others wait: making a group takes all of them, and
    has no patience either.
    """
    everyone = dist.group.WORLD
    assert everyone is not None
    if dist.get_backend() == "gloo":
        return everyone
    if everyone not in _gloo_groups:
        _gloo_groups[everyone] = dist.new_group(backend="gloo", timeout=_TIMEOUT)
    return _gloo_groups[everyone]


def wait_for_all() -> None:
    """Wait until all processes have come here; it is an error if one has ended."""
    options = dist.BarrierOptions()
    options.timeout = _PATIENCE
    waiting_group().barrier(options).wait(_PATIENCE)


_gloo_groups: dict[dist.ProcessGroup, dist.ProcessGroup] = {}


class Processes:
    """The processes of torch.distributed's default group; without one, this process alone.

    together: whether there is a group, of whatever size.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.together = dist.is_available() and dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if self.together else (0, 1)

    def wrap(self, model: VAE) -> VAE | DistributedDataParallel:
        """The model, with the weights of the first process, whose gradients are averaged over the processes."""
        if not self.together:
            return model
        waiting_group()
        return DistributedDataParallel(model, device_ids=[self.device] if self.device.type == "cuda" else None)

    def share_generators(self) -> None:
        """Give the default generators the states of the first process."""
        if not self.together:
            return
        state = torch.get_rng_state().to(self.device)
        dist.broadcast(state, 0)
        torch.set_rng_state(state.cpu())
        if self.device.type == "cuda":
            state = torch.cuda.get_rng_state(self.device).to(self.device)
            dist.broadcast(state, 0)
            torch.cuda.set_rng_state(state.cpu(), self.device)

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The first process goes through this block before the others do."""
        if self.rank:
            wait_for_all()
        yield
        if self.together and not self.rank:
            wait_for_all()

    def part(self, indices: Tensor) -> Tensor:
        """This process's images of a batch."""
        size = len(indices) // self.size
        return indices[self.rank * size : (self.rank + 1) * size]

    def offset(self, samples: int) -> int | None:
        """The number of samples in the batch before this process's, of which it has so many; None without a group."""
        return self.rank * samples if self.together else None

    def average(self, values: Tensor) -> None:
        """Over the processes, in place."""
        if self.together:
            dist.all_reduce(values)
            values /= self.size

    def meet(self, done: int, count: int) -> bool:
        """Whether after so many of an epoch's steps all processes agree upon what to do: one alone, always."""
        return not self.together or done == count or done % _STEPS_BETWEEN_AGREEMENTS == 0

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set in any process."""
        if not self.together:
            return list(flags)
        values = torch.tensor(flags, dtype=torch.float32, device=self.device)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return [value > 0 for value in values.tolist()]

    def by_first(self, compute: Callable[[], tuple[float, ...]], count: int) -> list[float]:
        """What the first process computes, `count` numbers, in all of them."""
        values = list(compute()) if self.rank == 0 else [0.0] * count
        if not self.together:
            return values
        wait_for_all()
        numbers = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.broadcast(numbers, 0)
        return list(numbers.tolist())
