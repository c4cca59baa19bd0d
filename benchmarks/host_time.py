"""The time of fastvae on the host: of its import, and of each call.

    python benchmarks/host_time.py [--device cpu|cuda] [--rounds 100] [--json PATH]

Calls are measured on tiny tensors. Their time includes the checks, the choice of backend, autograd, the reservation of
noise, the allocation of results, and the launches, but not the kernels. It is printed beside the time of the eager
operations that they replace (`plain.py` on the same tensors), which is measured alternately. Compare the ratios,
because the microseconds depend on the machine.

On a CPU a stand-in for the driver (`stand_in.py`) launches nothing, and eager times include the computation of a
hundred numbers. Neither side includes the driver's time for a launch. On CUDA this time is added once for each fused
call and each fused backward, and once for every eager operation that they replace.
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
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import fastvae
from cases import EAGER, FUSED, OPERATIONS, Case
from fastvae.files import replacing
from fastvae.operations import of_each_kind
from stand_in import stand_in

# fastvae's bytecode goes to the folder of the first argument, as pip writes it when it installs a package, because an
# environment may write none (PYTHONDONTWRITEBYTECODE), and compilation takes longer than the import.
IMPORTS = """
import sys
from time import perf_counter
start = perf_counter()
import torch
middle = perf_counter()
sys.dont_write_bytecode, sys.pycache_prefix = False, sys.argv[1]
import fastvae.functional, fastvae.nn
print(middle - start, perf_counter() - middle)
"""


IMPORT_ROUNDS = 3  # each starts a process; torch's CUDA build alone takes seconds to import


def import_milliseconds(rounds: int) -> dict[str, float]:
    """How long torch took to import, and fastvae after it, in new processes. One more before them writes bytecode."""
    with tempfile.TemporaryDirectory() as bytecode:
        command = [sys.executable, "-c", IMPORTS, bytecode]
        seconds = [tuple(map(float, subprocess.check_output(command, text=True).split())) for _ in range(rounds + 1)]
    torch_seconds, fastvae_seconds = zip(*seconds[1:], strict=True)
    return {
        "torch": round(1e3 * statistics.median(torch_seconds), 1),
        "fastvae": round(1e3 * statistics.median(fastvae_seconds), 1),
        "fastvae_least": round(1e3 * min(fastvae_seconds), 1),
    }


Calls = dict[str, tuple[Callable[[], Any], Callable[[], Any]]]


def calls(device: torch.device) -> Calls:
    """Each kind of operation, fused and eager: forward, and forward with backward."""
    both: Calls = {}
    for operation in of_each_kind(list(OPERATIONS.values())):
        name = operation.name
        if operation.backward is None:
            both[name] = fused_and_eager(name, False, device)
        else:
            both[f"{name} forward"] = fused_and_eager(name, False, device)
            both[f"{name} forward and backward"] = fused_and_eager(name, True, device)
    both["ELBO path"] = elbo_path(device)
    return both


def elbo_path(device: torch.device) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """All that a training step does between the encoder and the decoder, and after it: from the moments and the logits
    to the gradients of both, given that of z.
    """
    moments = torch.randn(4, 6, device=device, requires_grad=True)
    logits = torch.randn(4, 1, 5, 5, device=device, requires_grad=True)
    target, z_grad = torch.rand(4, 1, 5, 5, device=device), torch.randn(4, 3, device=device)
    one = torch.ones((), device=device)

    def fused() -> Any:
        z, kl = FUSED.gaussian_sample_kl_packed(moments)
        _, (logits_grad, kl_grad) = FUSED.elbo_value_and_grad(logits, target, kl, beta=0.5)
        return torch.autograd.grad((z, kl), moments, (z_grad, kl_grad)), logits_grad

    def eager() -> Any:
        z, kl = EAGER.gaussian_sample_kl_packed(moments)
        loss = EAGER.elbo_loss(logits, target, kl, beta=0.5).loss
        return torch.autograd.grad((z, loss), (moments, logits), (z_grad, one))

    return fused, eager


def fused_and_eager(name: str, backward: bool, device: torch.device) -> tuple[Callable[[], Any], Callable[[], Any]]:
    case = Case(name, "launch", backward, sizes="smoke")
    inputs = case.inputs(device, seed=0)
    fused, eager = case.function(FUSED), case.function(EAGER)
    return lambda: case.step(fused, inputs), lambda: case.step(eager, inputs)


def in_turn(
    fused: Callable[[], Any], eager: Callable[[], Any], rounds: int, wait: Callable[[], None] = lambda: None
) -> tuple[list[float], list[float]]:
    """Seconds per call of the two, a pair for each round. `wait` empties the device's queue, outside of the times."""
    repeat = 5  # some 200 launches at most, which a queue of 1,024 holds
    seconds: tuple[list[float], list[float]] = [], []
    for call in (fused, eager):
        for _ in range(30):
            call()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for call, times in zip((fused, eager), seconds, strict=True):
                wait()
                start = perf_counter()
                for _ in range(repeat):
                    call()
                times.append((perf_counter() - start) / repeat)
    finally:
        gc.enable()
    return seconds


def measure(device: torch.device, rounds: int) -> dict[str, dict[str, float]]:
    """Each call in microseconds, printed as it is found. The ratio is the median of the rounds' ratios: what else the
    machine does, slows both calls of a round.
    """
    torch.set_num_threads(1)
    operations = {}
    on_gpu = device.type == "cuda"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    print(f"{'':48} {'fused us':>9} {'eager us':>9} {'fused/eager':>12}")
    with fastvae.use_backend("triton") if on_gpu else stand_in():
        for name, (fused, eager) in calls(device).items():
            times = in_turn(fused, eager, rounds, wait)
            ours, theirs = (1e6 * statistics.median(seconds) for seconds in times)
            ratio = statistics.median(a / b for a, b in zip(*times, strict=True))
            operations[name] = {"fused_us": round(ours, 1), "eager_us": round(theirs, 1), "ratio": round(ratio, 3)}
            print(f"{name:48} {ours:9.1f} {theirs:9.1f} {ratio:12.2f}", flush=True)
    return operations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    settings = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("unset TRITON_INTERPRET: the interpreter's way to a launch is another one")
    operations = measure(torch.device(settings.device), settings.rounds)
    imports = import_milliseconds(IMPORT_ROUNDS)
    print(f"import: fastvae {imports['fastvae']} ms over torch's {imports['torch']} ms (medians)")
    if settings.json:
        found = {
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "import_ms": imports,
            "calls": operations,
        }
        with replacing(settings.json) as file:
            file.write(json.dumps(found, indent=1).encode())


if __name__ == "__main__":
    main()
