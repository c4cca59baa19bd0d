"""The parts of the evidence: which run together, their order, and their time limits."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from evidence_output import (
    COUNTERS,
    KERNELS,
    read_benchmarks,
    read_calls,
    read_counters,
    read_epochs,
    read_host_time,
    read_sanitizer,
    read_smoke,
    read_tests,
    read_training,
)
from evidence_process import Part

HERE = Path(__file__).parent
FIRST_MINUTES, SECOND_MINUTES = 7.0, 6.0  # of the stages of first() and of second(), as a test adds them up
# Processes of the smoke test and of the small calls, which mostly compile; with the other parts of their stage, 16 for
# 16 cores. For sm_90 triton 3.6 takes 0.6 seconds for a form of a kernel on one core of an AMD EPYC, and gcc 0.2
# for its launcher. Each process of the smoke test has 45 forms, and each of the small calls 50: 40 seconds.
SMOKE_SHARDS, CALLS_SHARDS = 8, 3
# All tests on the device have 6,200 forms, which take 80 minutes of one core. Every eighth test runs at the first
# visit, and another eighth at the second. An eighth has 1,000 forms, and 12 processes.
TESTS_SHARDS = 8
# Tests whose results depend on the device. tests/test_gpu.py, which is skipped without a GPU, is a part of its own.
DEVICE_TESTS = (
    "contract", "contract_autograd", "noise", "posterior", "elbo", "sigmoid_mse", "copies", "likelihoods", "counts",
    "grouped_likelihoods", "smaller", "launches", "layout", "steps", "training", "together", "batch_offset",
    "distributions", "compile", "latents", "likelihood", "continuous_likelihoods", "vae", "backend",
    "parity_training", "transforms", "mixture", "importance", "total_correlation", "discrepancy", "training_data",
    "general_posterior",
)  # fmt: skip
COUNTED_ELEMENTS = 1 << 26  # 256 MiB per float32 tensor, several times the cache
CASES = "(packed or value_and_grad) and not bfloat16 and not channels_last"  # six that tell launches and bandwidth

Stage = list[Part]  # parts that run together


class Command:
    """The command lines of the parts, on this machine and for this data."""

    def __init__(self, out: Path, data: Path | None, rehearse: bool) -> None:
        self.out, self.data, self.rehearse = out, data, rehearse
        # In a rehearsal the kernels run on the interpreter.
        self.environment = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"} if rehearse else {}

    def smoke(self, shard: int) -> Part:
        shards = 40 if self.rehearse else SMOKE_SHARDS
        device = "cpu" if self.rehearse else "cuda"
        command = [sys.executable, HERE / "gpu_smoke.py", "--device", device, "--shard", f"{shard}/{shards}"]
        return Part(f"smoke {shard + 1} of {SMOKE_SHARDS}", command, 90, read_smoke, self.environment)

    def tests(
        self, name: str, seconds: float, tests: Sequence[str], processes: int, *options: str, **more: bool
    ) -> Part:
        """-v, so that a run that is cut short has said which tests failed."""
        command = [*self._pytest(), "-v", "--slow", "--tb=short", *tests, *options]
        if processes > 1 and importlib.util.find_spec("xdist") is not None:
            command += ["-n", str(processes)]
        # Each process compiles in itself: Inductor's own processes would be 16 for each of them.
        environment = {**self.environment, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        return Part(name, command, seconds, read_tests, environment, **more)

    def device_tests(self, name: str, seconds: float, shard: int) -> Part:
        files = ["layout"] if self.rehearse else DEVICE_TESTS
        paths = [f"tests/test_{it}.py" for it in files]
        return self.tests(name, seconds, paths, 12, "--shard", f"{shard}/{TESTS_SHARDS}", takes_the_rest=True)

    def train(self, name: str, seconds: float, *options: str, launcher: Sequence[str] = ()) -> Part:
        folder = self.out / "runs" / name.replace(" ", "-")
        command = [sys.executable, *launcher, HERE.parent / "examples" / "train.py", "--out", folder, *options]
        if self.data is not None:
            command += ["--dataset", "mnist", "--data-dir", self.data]
        command += ["--device", "cpu", "--limit", "128"] if self.rehearse else ["--device", "cuda"]
        return Part(name, command, seconds, read_training(folder), self.environment)

    def epochs(self, name: str, provider: str, seconds: float, *options: str) -> Part:
        command = [sys.executable, HERE / "train_epochs.py", provider, *options]
        command += ["--data-dir", self.data] if self.data is not None else []
        command += ["--epochs", "1", "--limit", "128"] if self.rehearse else []
        return Part(name, command, seconds, read_epochs, self.environment)

    def benchmarks(self, name: str, seconds: float, cases: str) -> Part:
        folder = self.out / "benchmarks" / name.split(" ")[-1]
        command = [*self._pytest(), "-q", "benchmarks", "--benchmark", "--report", folder, "-k", cases]
        # On a CPU only fastvae's rivals are timed.
        read = read_benchmarks(folder, own=not self.rehearse)
        return Part(name, command, seconds, read, self.environment, limit_option="--limit")

    def calls(self, shard: int) -> Part:
        command = [sys.executable, HERE / "small_calls.py", "--shard", f"{shard}/{CALLS_SHARDS}"]
        command += ["--elements", "4096"] if self.rehearse else []
        return Part(f"small calls {shard + 1} of {CALLS_SHARDS}", command, 90, read_calls, self.environment)

    def sanitizer(self, tool: str, seconds: float, **environment: str) -> Part:
        command = ["compute-sanitizer", "--tool", tool, "--report-api-errors", "no", "--print-limit", "20"]
        command += [sys.executable, HERE / "small_calls.py"]
        environment = {**self.environment, **environment}
        return Part(tool, command, seconds, read_sanitizer, environment, takes_the_rest=True)

    def counters(self, seconds: float) -> Part:
        command = ["ncu", "--profile-from-start", "off", "--clock-control", "none", "--csv", "--print-units", "base"]
        command += ["--kernel-name", f"regex:{KERNELS}", "--metrics", ",".join(COUNTERS)]
        elements = 1 << 15 if self.rehearse else COUNTED_ELEMENTS
        command += [sys.executable, HERE / "small_calls.py", "--elements", str(elements)]
        return Part("counters", command, seconds, read_counters, self.environment)

    def host_time(self, seconds: float) -> Part:
        # On the interpreter there is nothing to measure, so a rehearsal measures with the stand-in for the driver.
        device, environment = ("cpu", {"CUDA_VISIBLE_DEVICES": ""}) if self.rehearse else ("cuda", {})
        command = [sys.executable, HERE / "host_time.py", "--device", device, "--rounds", "40"]
        return Part("host time", command, seconds, read_host_time, environment)

    def _pytest(self) -> list[str | Path]:
        return [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]


def first(command: Command, failed: Sequence[str]) -> list[Stage]:
    """What the first minutes are for. The limits are those of an H100 or H200 machine of 16 cores, estimated at about
    twice what a part should take; nothing of it has been measured yet.
    """
    rehearse = command.rehearse
    launcher = ["-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", "1"]
    launcher += ["--master-addr", "127.0.0.1", "--master-port", "29511"]
    together = [command.smoke(shard) for shard in range(SMOKE_SHARDS)]
    if failed:
        together.append(command.tests("failed tests", 90, failed, 4))
    together += [
        command.train("one epoch as a graph", 90, "--epochs", "1", "--graph", "auto" if rehearse else "on"),
        command.tests("graphs and streams", 90, ["tests/test_layout.py" if rehearse else "tests/test_gpu.py"], 3),
        # They compile for memcheck and racecheck, under which compiling takes several times as long.
        *(command.calls(shard) for shard in range(CALLS_SHARDS)),
        command.train("NCCL, one process", 90, "--epochs", "1", launcher=launcher),
    ]
    return [
        together,
        [command.train("training", 40, "--epochs", "1" if rehearse else "30")],
        [command.epochs("epochs, fused-graph", "fused-graph", 40)],
        [command.epochs("epochs, eager", "eager", 40)],
        [command.benchmarks("benchmarks", 105, "reconstruction and launch" if rehearse else CASES)],
        [
            # Without the caching allocator, so that memcheck sees the bounds of each tensor.
            command.sanitizer("memcheck", 105, PYTORCH_NO_CUDA_MEMORY_CACHING="1"),
            command.device_tests("tests", 105, 0),
        ],
    ]


def second(command: Command) -> list[Stage]:
    """What a second visit is for, by value, because it may be cut short."""
    return [
        [command.epochs("epochs, three seeds", "fused-graph", 45, "--seeds", "0", "1", "2")],
        [command.benchmarks("benchmarks of the training step", 110, "training_step")],
        [command.counters(75)],
        [command.host_time(60)],
        [command.sanitizer("racecheck", 70), command.device_tests("more tests", 70, 1)],
    ]


def stages(out: Path, data: Path | None, rehearse: bool, failed: Sequence[str]) -> list[Stage]:
    command = Command(out, data, rehearse)
    found = [*first(command, failed), *second(command)]
    if rehearse:  # on a few cores, which the parts of a stage share
        found = [[replace(part, seconds=5 * part.seconds) for part in stage] for stage in found]
    return found
