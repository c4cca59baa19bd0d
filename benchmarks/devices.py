"""The clock, the memory meter and the launch counter of the measured device.

A CUDA device is timed in two ways. `call_seconds` is the time of a call in a loop of calls, including the host's time.
`graph_seconds` is the time of the kernels alone: calls on several input sets are captured in one CUDA graph, which is
replayed after the L2 cache was filled with other data. A CPU has only the first.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from fastvae.random import by_pointer

Call = Callable[[int], Any]  # on the input set of that number

# A round of calls takes about this long, so that a clock's resolution and a synchronisation are lost in it.
ROUND_SECONDS = 4e-3
# The device's queue takes about a thousand launches; the eager operations make up to 30 per call. With this many calls
# the host never waits for the device, and what is measured is the host alone.
HOST_CALLS = 20
GIBIBYTE = 1 << 30
# A timed graph is queued behind so many fills of the flush buffer: while the device is busy with them (600 MB where the
# cache has 60) the host has the time to launch the graph, and no gap between the two is timed.
FLUSHES = 5


class CPU:
    """Times on the host's clock."""

    name = "cpu"

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    @property
    def description(self) -> str:
        return f"CPU, {torch.get_num_threads()} threads"

    def input_sets(self, bytes_per_set: int) -> int:
        return 1

    def synchronize(self) -> None:
        pass

    def first_call_seconds(self, call: Call) -> float:
        return _clocked(lambda: call(0), self.synchronize)

    def calls_per_round(self, call: Call) -> int:
        return max(1, min(1000, round(ROUND_SECONDS / max(_clocked(lambda: call(0), self.synchronize), 1e-9))))

    def call_seconds(self, call: Call, calls: int, sets: int) -> float:
        def loop() -> None:
            for index in range(calls):
                call(index % sets)

        return _clocked(loop, self.synchronize) / calls

    def copy_bandwidth(self) -> float:
        """Bytes per second read and written by a large copy: what the memory can do."""
        source = torch.empty(GIBIBYTE // 8, dtype=torch.uint8)
        target = torch.empty_like(source)
        target.copy_(source)
        seconds = statistics.median(_clocked(lambda: target.copy_(source), self.synchronize) for _ in range(9))
        return 2 * source.numel() / seconds


class CUDA(CPU):
    """Times on the device's clock and on the host's. `api` is torch.cuda, or what stands in for it in a test."""

    name = "cuda"

    def __init__(self, api: Any = torch.cuda, device: torch.device | None = None) -> None:
        self.api = api
        self.device = device or torch.device("cuda", api.current_device())
        self.properties = api.get_device_properties(self.device)
        # Twice the cache, so that nothing of what was there before stays.
        self._flush = torch.empty(2 * self.properties.L2_cache_size, dtype=torch.uint8, device=self.device)

    @property
    def description(self) -> str:
        return str(self.properties.name)

    def input_sets(self, bytes_per_set: int) -> int:
        """So many that they do not fit in the cache together, but no more than a graph takes in a moment."""
        return max(1, min(32, -(-2 * self.properties.L2_cache_size // max(bytes_per_set, 1))))

    def synchronize(self) -> None:
        self.api.synchronize(self.device)

    def capture(self, call: Call, sets: int) -> Callable[[], None]:
        """One graph of a call on each input set. Returns its replay.

        Captured calls must have run before: compiled, with their lazy initialisations behind them.
        """
        stream = self.api.Stream(self.device)
        stream.wait_stream(self.api.current_stream(self.device))
        with self.api.stream(stream), by_pointer():
            for index in range(min(sets, 3)):
                call(index)
        self.api.current_stream(self.device).wait_stream(stream)
        self.synchronize()
        graph = self.api.CUDAGraph()
        gc.collect()  # nothing may be freed into the graph's pool, or out of it, by a collection during capture
        # A capture that fails leaves its stream current; the outer block puts back the one that was. thread_local: what
        # the threads of other libraries do is no part of this capture.
        generator = self.api.default_generators[self.device.index or 0]
        state = generator.clone_state()
        try:
            with (
                self.api.stream(self.api.current_stream(self.device)),
                self.api.graph(graph, capture_error_mode="thread_local"),
            ):
                for index in range(sets):
                    call(index)
        except BaseException:
            # Up to torch 2.11 a generator stays in a capture that failed, so that every later draw raises.
            generator.graphsafe_set_state(state)
            raise
        graph.replay()  # the first one uploads the graph
        self.synchronize()
        replay: Callable[[], None] = graph.replay
        return replay

    def graph_seconds(self, replay: Callable[[], None], sets: int) -> float:
        """The device's time per captured call, its input not in the cache."""
        for _ in range(FLUSHES):
            self._flush.zero_()
        begin, end = self.api.Event(enable_timing=True), self.api.Event(enable_timing=True)
        begin.record()
        replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3 / sets

    def host_seconds(self, call: Call, sets: int) -> float:
        """The host's time per call; the device does not hold it up."""
        self.synchronize()
        began = time.perf_counter()
        for index in range(HOST_CALLS):
            call(index % sets)
        seconds = (time.perf_counter() - began) / HOST_CALLS
        self.synchronize()
        return seconds

    def extra_bytes(self, call: Call) -> int:
        """The most that a call allocates at a time, its results included."""
        self.synchronize()
        self.api.reset_peak_memory_stats(self.device)
        before = self.api.memory_allocated(self.device)
        results = call(0)
        self.synchronize()
        peak = self.api.max_memory_allocated(self.device) - before
        del results
        return int(peak)

    def launches(self, call: Call, profile: Callable[..., AbstractContextManager[Any]] | None = None) -> int | None:
        """Kernels, fills and copies that a call runs on the device, as torch's profiler sees them.

        None where it sees nothing. Profile after everything has been timed: CUDA's profiling library stays in the
        process and slows every later launch (pytorch issue 144455).
        """
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity
        from torch.profiler import profile as torch_profile

        profile = profile or torch_profile
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
            call(0)
            self.synchronize()
        on_device = [event for event in recorded.events() if event.device_type == DeviceType.CUDA]
        # The ranges that optimizers and compiled functions mark appear on the device as well, and launch nothing.
        return sum(not event.is_user_annotation for event in on_device) or None

    def copy_bandwidth(self) -> float:
        source = torch.empty(2 * GIBIBYTE, dtype=torch.uint8, device=self.device).random_()
        target = torch.empty_like(source)
        target.copy_(source)
        times = []
        for _ in range(15):
            begin, end = self.api.Event(enable_timing=True), self.api.Event(enable_timing=True)
            begin.record()
            target.copy_(source)
            end.record()
            end.synchronize()
            times.append(float(begin.elapsed_time(end)) * 1e-3)
        return 2 * source.numel() / statistics.median(times)


def _clocked(work: Callable[[], Any], synchronize: Callable[[], None]) -> float:
    synchronize()
    began = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - began


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """(first quartile, median, third quartile)."""
    if len(samples) < 2:
        return samples[0], samples[0], samples[0]
    first, median, third = statistics.quantiles(samples, n=4, method="inclusive")
    return first, median, third
