"""What fastvae costs the host: its import, and each call without the launch itself.

    python benchmarks/host_time.py [--rounds 100] [--json PATH]

Calls are measured on tiny CPU tensors with Triton's launch stubbed out: what is left are the checks, the choice of
backend, autograd, the reservation of noise and the allocation of results. They are printed beside the eager operations
that they replace (`fastvae.reference` on the same tensors), measured in turn with them, and judged by the ratio: the
microseconds are those of this machine, and eager ones include what the CPU computes on a hundred numbers.

The reservation of noise, measured alone too, is one torch.randint here, because a CPU generator has no offset; on CUDA
it is get_offset and set_offset. On CUDA one Triton launch comes on top of each fused call, and several kernel launches
on top of each eager one.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch

import fastvae
import fastvae.random
from cases import EAGER, FUSED, OPERATIONS, Case
from fastvae.files import replacing

IMPORTS = """
from time import perf_counter
start = perf_counter()
import torch
middle = perf_counter()
import fastvae.functional, fastvae.nn
print(middle - start, perf_counter() - middle)
"""


def import_seconds(rounds: int) -> list[tuple[float, float]]:
    """How long torch took to import, and fastvae after it, in new processes."""
    return [
        tuple(map(float, subprocess.check_output([sys.executable, "-c", IMPORTS], text=True).split()))
        for _ in range(rounds)
    ]


@contextmanager
def without_launches() -> Iterator[None]:
    """The fused path up to the launch, which does nothing."""
    from fastvae.kernels import elbo, gaussian, reconstruction

    with ExitStack() as stack:
        for module in (elbo, gaussian, reconstruction):
            stack.enter_context(patch.object(module, "launch", lambda *arguments, **constants: None))
        stack.enter_context(fastvae.use_backend("triton"))
        yield


Calls = dict[str, tuple[Callable[[], Any], Callable[[], Any]]]


def calls() -> Calls:
    """Each public operation, fused and eager: forward, and forward with backward."""
    both: Calls = {}
    for name, operation in OPERATIONS.items():
        if operation.backward is None:
            both[name] = fused_and_eager(name, backward=False)
        else:
            both[f"{name} forward"] = fused_and_eager(name, backward=False)
            both[f"{name} forward and backward"] = fused_and_eager(name, backward=True)
    return both


def fused_and_eager(name: str, backward: bool) -> tuple[Callable[[], Any], Callable[[], Any]]:
    case = Case(name, "launch", backward, sizes="smoke")
    inputs = case.inputs(torch.device("cpu"), seed=0)
    fused, eager = case.function(FUSED), case.function(EAGER)
    return lambda: case.step(fused, inputs), lambda: case.step(eager, inputs)


def in_turn(fused: Callable[[], Any], eager: Callable[[], Any], rounds: int) -> tuple[list[float], list[float]]:
    """Seconds per call of the two, a pair for each round."""
    repeat = 5
    seconds: tuple[list[float], list[float]] = [], []
    for call in (fused, eager):
        for _ in range(30):
            call()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for call, times in zip((fused, eager), seconds, strict=True):
                start = perf_counter()
                for _ in range(repeat):
                    call()
                times.append((perf_counter() - start) / repeat)
    finally:
        gc.enable()
    return seconds


def measure(rounds: int) -> dict[str, Any]:
    """Everything, in microseconds and milliseconds. The ratio is the median of the rounds' ratios: what else the
    machine does, slows both calls of a round.
    """
    torch.set_num_threads(1)
    imports = import_seconds(5)
    operations = {}
    cpu = torch.device("cpu")
    reservation, _ = in_turn(lambda: fastvae.random.reserve(cpu, None), lambda: None, rounds)
    with without_launches():
        for name, (fused, eager) in calls().items():
            times = in_turn(fused, eager, rounds)
            ours, theirs = (1e6 * statistics.median(seconds) for seconds in times)
            operations[name] = {
                "fused_us": round(ours, 1),
                "eager_us": round(theirs, 1),
                "ratio": round(statistics.median(a / b for a, b in zip(*times, strict=True)), 3),
            }
    return {
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "import_ms": {
            "torch": round(1e3 * statistics.median(seconds for seconds, _ in imports), 1),
            "fastvae": round(1e3 * statistics.median(seconds for _, seconds in imports), 1),
            "fastvae_least": round(1e3 * min(seconds for _, seconds in imports), 1),
        },
        "reservation_us": round(1e6 * statistics.median(reservation), 1),
        "calls": operations,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    settings = parser.parse_args()
    found = measure(settings.rounds)
    milliseconds = found["import_ms"]
    print(f"import: fastvae {milliseconds['fastvae']} ms over torch's {milliseconds['torch']} ms (medians)")
    print("calls without the launch; those that draw reserve their noise by one torch.randint, which takes")
    print(f"{found['reservation_us']} us of the time (on CUDA it is get_offset and set_offset)")
    print(f"{'':48} {'fused us':>9} {'eager us':>9} {'fused/eager':>12}")
    for name, times in found["calls"].items():
        print(f"{name:48} {times['fused_us']:9.1f} {times['eager_us']:9.1f} {times['ratio']:12.2f}")
    if settings.json:
        with replacing(settings.json) as file:
            file.write(json.dumps(found, indent=1).encode())


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of Triton
    main()
