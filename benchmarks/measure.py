"""Measure all providers of one case. They are checked first and then timed alternately, so that changes of clock or
load affect all of them.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from devices import CPU, CUDA, quartiles
from providers import PROVIDERS

MIN_ROUNDS, MAX_ROUNDS = 5, 25


class Subject(Protocol):
    """An operation on certain inputs, or the training step."""

    compulsory_bytes: int | None
    providers: tuple[str, ...]
    steps_per_call: dict[str, int]  # by provider, 1 unless it is there

    def prepare(self, device: torch.device, input_sets: Callable[[int], int]) -> int:
        """Make the input sets, as many as `input_sets(bytes)` says. Returns their number."""

    def build(self, name: str) -> Callable[[int], Any]:
        """The provider's step, as a function of the input set's number. Not called for graph providers."""

    def complaint(self, name: str, call: Callable[[int], Any]) -> str | None:
        """What is wrong with what it computes after its first call, or None."""

    def release(self) -> None:
        """Let go of what `prepare` made, also where it was cut short."""


@dataclass
class Measurement:
    """Of one provider. Times in seconds, one per round; empty or None where there is none.

    call: of a call in a loop of calls: the larger of the host's and the device's. For a graph provider, of a call
    inside the graph. gpu: the device's, in a replayed graph. host: the host's, to launch. first: until the first
    result, compilation included. failure: why there are no times: a wrong result, or what it raised.
    """

    provider: str
    compulsory_bytes: int | None = None
    failure: str | None = None
    first: float | None = None
    call: list[float] = field(default_factory=list)
    gpu: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    launches: int | None = None
    extra_bytes: int | None = None
    uncaptured: str | None = None  # why there is no graph

    def fail(self, reason: str) -> None:
        self.failure = reason
        self.call, self.gpu, self.host = [], [], []

    def as_dict(self) -> dict[str, Any]:
        times = {"call": self.call, "gpu": self.gpu, "host": self.host}
        best = self.gpu or self.call
        rate = self.compulsory_bytes / quartiles(best)[1] if best and self.compulsory_bytes else None
        return {
            "provider": self.provider,
            "failure": self.failure,
            "uncaptured": self.uncaptured,
            "first_seconds": self.first,
            **{f"{name}_seconds": quartiles(samples) if samples else None for name, samples in times.items()},
            "launches": self.launches,
            "extra_bytes": self.extra_bytes,
            "compulsory_bytes": self.compulsory_bytes,
            "bytes_per_second": rate,
        }


def measure(subject: Subject, device: CPU, names: Sequence[str], budget: float) -> dict[str, Measurement]:
    """Measure the providers of these names, for about `budget` seconds after compilation."""
    # Dynamo keeps compiled code by source line, which all cases share, and gives up after eight.
    torch.compiler.reset()
    measurements = {name: Measurement(name, subject.compulsory_bytes) for name in names}
    own = [name for name in names if PROVIDERS[name].base is None]
    runners: list[_Runner] = []
    try:
        sets = subject.prepare(device.device, device.input_sets)
        runners += [runner for name in own if (runner := _start(subject, device, sets, measurements[name]))]
        _time_in_turns(runners, device, budget)
    except Exception as error:  # no memory for the inputs, say: the next subject may fit
        for measurement in measurements.values():
            measurement.fail(_one_line(error))
    finally:
        # Graphs own memory, which the next subject needs.
        runners.clear()
        subject.release()
        gc.collect()
    for name in names:
        if PROVIDERS[name].base:
            _derive_graph(measurements[name], measurements[PROVIDERS[name].base])
    return measurements


def count_launches(subject: Subject, device: CUDA, names: Sequence[str]) -> dict[str, int | None]:
    """By provider; None where it cannot be counted. Compiles anew, out of the caches that `measure` filled."""
    torch.compiler.reset()
    counts: dict[str, int | None] = dict.fromkeys(names)
    with suppress(Exception):  # the times, which matter more, have been taken
        subject.prepare(device.device, lambda _: 1)
        for name in names:
            with suppress(Exception):
                call = subject.build(name)
                for _ in range(3):  # compile; record, where the compiler makes CUDA graphs; run
                    call(0)
                counts[name] = device.launches(call)
    subject.release()
    gc.collect()
    return counts


@dataclass
class _Runner:
    """A provider that computes the right thing, ready to be timed."""

    measurement: Measurement
    call: Callable[[int], Any]
    calls: int  # per round
    sets: int
    steps: int  # per call
    replay: Callable[[], None] | None = None

    def time(self, device: CPU) -> None:
        measurement = self.measurement
        measurement.call.append(device.call_seconds(self.call, self.calls, self.sets) / self.steps)
        if isinstance(device, CUDA) and PROVIDERS[measurement.provider].is_torch:
            measurement.host.append(device.host_seconds(self.call, self.sets))
            if self.replay is not None:
                measurement.gpu.append(device.graph_seconds(self.replay, self.sets))


def _start(subject: Subject, device: CPU, sets: int, measurement: Measurement) -> _Runner | None:
    try:
        call = subject.build(measurement.provider)
        measurement.first = device.first_call_seconds(call)
        measurement.failure = subject.complaint(measurement.provider, call)
        if measurement.failure:
            return None
        steps = subject.steps_per_call.get(measurement.provider, 1)
        provider = PROVIDERS[measurement.provider]
        # max-autotune records a graph for each address of an input that its backward reads, and looks through them at
        # each call: it gets one set, as a training loop's allocator would give it.
        runner = _Runner(measurement, call, device.calls_per_round(call), sets if provider.capturable else 1, steps)
        # A provider that makes CUDA graphs itself owns its memory between calls, which no peak shows.
        if isinstance(device, CUDA) and provider.is_torch and provider.capturable:
            measurement.extra_bytes = device.extra_bytes(call)
            try:
                runner.replay = device.capture(call, sets)
            except Exception as error:
                measurement.uncaptured = _one_line(error)
        return runner
    except Exception as error:  # whatever a provider raises is its result; the others go on
        measurement.failure = _one_line(error)
        return None


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _time_in_turns(runners: Sequence[_Runner], device: CPU, budget: float) -> None:
    began = time.perf_counter()
    for round in range(MAX_ROUNDS):
        if round >= MIN_ROUNDS and time.perf_counter() - began > budget:
            break
        for runner in runners:
            if runner.measurement.failure:
                continue
            try:
                runner.time(device)
            except Exception as error:  # of memory, say, which another provider holds
                runner.measurement.fail(_one_line(error))


def _derive_graph(measurement: Measurement, base: Measurement) -> None:
    """A graph provider runs its base's kernels, so the base's replay is what it takes."""
    measurement.failure = base.failure or base.uncaptured
    measurement.first = base.first
    measurement.call = measurement.gpu = base.gpu
