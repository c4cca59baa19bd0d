"""The number of threads of a CPU's steps, chosen by what steps take.

Threads wait for each other by spinning. So with two threads on two cores 8 epochs of the small digits took 13.3 s on an
idle machine, and 35 to 41 s beside one other busy process; with one thread 17.7 and 17.9 s (Xeon at 2.8 GHz, torch
2.13.0). No fixed number is right for both.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fastvae.models import VAE
from fastvae.training.data import formatted, to_channels_last
from fastvae.training.memory import freed_memory_kept
from fastvae.training.precision import arithmetic
from fastvae.training.settings import DEFAULT_SAMPLES
from fastvae.training.step import training_step

# For each number of threads, in each of two rounds. A scheduler lets one process run for some milliseconds, so that
# this sees several of its turns.
_SECONDS = 0.2


def choose_threads(
    model: VAE,
    images: Tensor,
    batch_size: int,
    *,
    target: Tensor | None = None,
    condition: Tensor | None = None,
    precision: str = "tf32",
    objective: str = "elbo",
    samples: int | None = None,
    before: int | None = None,
) -> int:
    """The number of threads with which a step of `fastvae.training.train` takes the least time on this CPU now.

    Its batches are of these images, or other samples [N, ...], with their targets and conditions, if any; its objective
    is that of `Training`.

    Steps are tried on a copy of the model with 1, 2, 4, ... threads, up to ``torch.get_num_threads()``, for 0.4 s each
    (at least three steps). The model and the random numbers stay as they were.

    The last bits of what is trained depend on the number of threads. So a run that goes on keeps the number that it had
    ``before``, unless torch has fewer here. Where the environment variable OMP_NUM_THREADS is set,
    ``torch.get_num_threads()`` is returned, so that equal seeds give equal bits whatever else the machine does.
    """
    available = torch.get_num_threads()
    if os.environ.get("OMP_NUM_THREADS"):
        return available
    if before is not None:
        if not isinstance(before, int) or before < 1:
            raise ValueError(f"resume does not fit: threads must be a positive integer, got {before!r}")
        if before <= available:
            return before
    if available == 1:
        return available
    try:
        trial = copy.deepcopy(model)
    except RuntimeError:  # of weights that are computed, by torch.nn.utils.weight_norm for one
        return available
    to_channels_last(trial)
    optimizer = torch.optim.SGD(trial.parameters(), lr=0.0)
    batch = formatted(images[:batch_size])
    target, condition = (None if it is None else formatted(it[:batch_size]) for it in (target, condition))
    autocast_dtype = torch.bfloat16 if precision == "bf16" else None
    numbers = [1 << power for power in range(available.bit_length()) if 1 << power < available]
    with torch.random.fork_rng(devices=[]), arithmetic(precision), freed_memory_kept():

        def step() -> None:
            training_step(
                trial,
                optimizer,
                batch,
                autocast_dtype=autocast_dtype,
                target=target,
                condition=condition,
                objective=objective,
                samples=samples or DEFAULT_SAMPLES,
                dataset_size=len(images),
            )

        return fastest([*numbers, available], step)


def fastest(numbers: Sequence[int], step: Callable[[], object]) -> int:
    """Of these numbers of threads the one with which a step takes the least time; of equals the first."""
    seconds = dict.fromkeys(numbers, 0.0)
    for number in numbers:  # the first step with each number allocates and prepares
        with with_threads(number):
            step()
    for _ in range(2):  # in turns, because the load of the machine changes
        for number in numbers:
            with with_threads(number):
                seconds[number] += mean_seconds(step)
    return min(numbers, key=lambda number: seconds[number])


def mean_seconds(step: Callable[[], object]) -> float:
    """Of a step, in as many as take _SECONDS. The mean, because waiting threads make a few steps very slow."""
    began, count = time.perf_counter(), 0
    while True:
        step()
        count += 1
        elapsed = time.perf_counter() - began
        if elapsed >= _SECONDS:
            return elapsed / count


@contextmanager
def with_threads(number: int) -> Iterator[None]:
    """Compute with so many threads in this block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
