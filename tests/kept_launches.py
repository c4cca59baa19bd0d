"""Every launch twice: as `kernels.launch` finds it among what it kept, and Triton's own way; run in a process of its
own by `test_kept_launches.py`.

    python tests/kept_launches.py

Nothing is compiled: what stands in for a compiled kernel is kept by Triton, by its own rules, for what it would have
compiled. Both ways must end at the same one, with the same grid and arguments. At the end one kernel is compiled, and
what the driver is given is compared.

Prints, as JSON, how many launches there were, how many of them found something kept, and those that differ; and whether
the tests' count of launches sees both ways.
"""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.compiler import CompiledKernel

import compiled_forms  # puts benchmarks/ on the path
import fastvae.functional as F
from fastvae.kernels import launch as launching
from fastvae.kernels.posterior import gaussian
from fastvae.reference.gaussian import Posterior
from launches import MODULES
from stand_in import stand_in

SAMPLE = Posterior(draws=True, diverges=False)


class Compiled(CompiledKernel):
    """In place of a compiled kernel: notes how it is launched, by Triton (`run`) and by hand (`[grid]`)."""

    function = packed_metadata = module = None

    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def launch_metadata(self, *arguments: Any) -> None:
        return None

    def run(self, x: int, y: int, z: int, *arguments: Any) -> None:
        given = arguments[6:]  # after the stream, the function, its metadata and hooks
        self.log.append((self, (x, y, z), list(given), "Triton"))

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *given: self.log.append((self, grid, list(given), "kept"))


def unaligned(*shape: int, dtype: torch.dtype, by: int) -> torch.Tensor:
    """A tensor that starts `by` elements behind an aligned address."""
    return torch.empty(by + torch.Size(shape).numel(), dtype=dtype)[by:].view(shape)


def calls() -> Iterator[Callable[[], Any]]:
    yield from compiled_forms.calls()
    for by, dtype in product((0, 1, 2, 4, 8), (torch.float32, torch.bfloat16)):
        mu, logvar = (unaligned(6, 8, dtype=dtype, by=b) for b in (by, 0))
        for first, second in ((mu, logvar), (logvar, mu)):
            yield partial(gaussian, SAMPLE, first, second, None, None, None, 1, 4, 0)
            yield partial(F.elbo_loss, first, second, unaligned(6, dtype=torch.float32, by=by))
    for mu in (torch.empty(4, 1), torch.empty(4, 3)[:, :1]):  # rows at a distance of 1, which is compiled in, and of 3
        yield partial(F.gaussian_kl, mu, mu, reduction="none")
    mu = torch.empty(6, 8)
    for seed, offset, before in product(
        (0, 1, 16, 2**31, 2**63 - 1, -1, -(2**63)), (0, 1, 4, 16, 2**40), (0, 1, 2, 16, 2**31, 2**40)
    ):
        yield partial(gaussian, SAMPLE, mu, mu, None, None, None, seed, offset, before)
    pointer = torch.empty(2, dtype=torch.int64)
    for seed_tensor, offset_tensor in ((pointer[:1], pointer[1:]), (pointer[1:], pointer[:1])):
        yield partial(gaussian, SAMPLE, mu, mu, None, seed_tensor, offset_tensor, 0, 0, 0)


def same(first: Any, second: Any) -> bool:
    return first is second or (type(first) is type(second) and not isinstance(first, torch.Tensor) and first == second)


def compare() -> dict[str, Any]:
    log: list[Any] = []
    found: dict[str, Any] = {"launches": 0, "kept": 0, "different": []}

    def twice(kernel: Any, plan: launching.Plan, device: torch.device, *arguments: Any) -> None:
        launching.launch(kernel, plan, device, *arguments)
        with patch.object(launching, "_compiled", {}):
            launching.launch(kernel, plan, device, *arguments)
        (compiled, grid, given, way), (expected, expected_grid, expected_given, its_way) = log
        log.clear()
        assert its_way == "Triton"
        found["launches"] += 1
        found["kept"] += way == "kept"
        equal = compiled is expected and grid == expected_grid and len(given) == len(expected_given)
        if not equal or not all(map(same, given, expected_given)):
            found["different"].append(f"{kernel.fn.__name__} {plan} {arguments}")

    with ExitStack() as stack:
        stack.enter_context(stand_in())
        for module in MODULES:
            stack.enter_context(patch.object(module, "launch", twice))
        stack.enter_context(patch("triton.compiler.compile", lambda *arguments, **options: Compiled(log)))
        for call in calls():
            call()
    for module in MODULES:
        for kernel in vars(module).values():
            if isinstance(kernel, triton.JITFunction):
                kernel.device_caches.clear()
    launching._compiled.clear()
    return found


def driver_is_given_the_same() -> bool:
    """The first launch is Triton's own, the second finds what it compiled."""
    given: list[tuple[Any, ...]] = []
    moments = torch.empty(6, 8)
    with stand_in(lambda *arguments: given.append(arguments)):
        for _ in range(2):
            gaussian(Posterior(True, True), moments, None, None, None, None, 1, 4, 0)
    first, second = given
    # The metadata for profilers and z and kl are new objects each time.
    return len(first) == len(second) and all(
        same(getattr(a, "data", a), getattr(b, "data", b))
        or (isinstance(a, torch.Tensor) and a.shape == b.shape and a.dtype == b.dtype)
        for a, b in zip(first, second, strict=True)
    )


def counts() -> list[int]:
    """What the tests count of two launches, the second of which is found among those kept."""
    with patch("torch.cuda.is_available", lambda: True):  # else it would ask for the interpreter
        conftest = runpy.run_path(str(Path(__file__).with_name("conftest.py")))
    conftest["_count_launches"]()
    found = []
    with stand_in():
        for _ in range(2):
            F.gaussian_kl(torch.empty(3, 5), torch.empty(3, 5), reduction="sum")
            found.append(conftest["Launches"].count)
    return found


if __name__ == "__main__":
    print(json.dumps(compare() | {"driver": driver_is_given_the_same(), "counts": counts()}))
