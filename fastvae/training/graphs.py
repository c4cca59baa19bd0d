"""CUDA graphs of what a function launches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch


class GraphError(RuntimeError):
    """A CUDA graph was asked for, and its capture failed."""


def on_side_stream(run: Callable[[], None], device: torch.device) -> None:
    """What is captured later must have run on a stream other than the default one, where nothing can be captured."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream(device).wait_stream(stream)


def capture(run: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """A CUDA graph of what `run` launches on a device; nothing is computed yet. Returns its replay.

    If it fails, the device's default generator and memory are as they were: up to torch 2.11 the generator stays in
    capture, so that the next draw raises, and the graph's memory is never given back. (Other graphs then follow the
    generator's seed no longer.) What `run` raised is raised, not what the end of its broken capture raises.
    """
    generator = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    state = generator.clone_state()
    pool = torch.cuda.graph_pool_handle()  # type: ignore[no-untyped-call]
    graph = torch.cuda.CUDAGraph()
    # torch.cuda.graph's own stream is one for all: of the device that was current when the process first captured.
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    first: BaseException | None = None
    try:
        # A capture that fails leaves its stream current: the outer block puts back the one that was. thread_local: what
        # the threads of other libraries do is no part of this capture.
        with (
            torch.cuda.stream(torch.cuda.current_stream(device)),
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            try:
                run()
            except BaseException as error:
                first = error
                raise
    except BaseException as error:
        generator.graphsafe_set_state(state)
        with suppress(RuntimeError):  # that the pool is closed: the capture has ended, and the graph releases it
            torch._C._cuda_endAllocateToPool(generator.device.index, pool)
            torch._C._cuda_releasePool(generator.device.index, pool)
        if first is not None and first is not error:
            raise first from None
        raise
    replay: Callable[[], None] = graph.replay
    return replay
