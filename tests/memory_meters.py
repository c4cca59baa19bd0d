"""What a call allocates on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def peak_memory(function: Callable[[], Any]) -> int:
    """The greatest number of bytes that were allocated at a time on the CPU beyond what was before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@contextmanager
def allocations() -> Iterator[list[int]]:
    """The bytes of each tensor that the block allocates uninitialised, as launchers do."""
    allocated: list[int] = []

    class Allocations(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            if "empty" in function.__name__:
                allocated.append(result.nbytes)
            return result

    with Allocations():
        yield allocated
