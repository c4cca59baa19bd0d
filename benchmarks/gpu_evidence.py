"""Everything that only a GPU can show, in one command.

    python benchmarks/gpu_evidence.py --out DIR [--data-dir MNIST]

Runs the tests on the device, the tests on the interpreter, the comparison of the compiled code, compute-sanitizer,
the hardware counters, what calls cost the host, the headline benchmarks, and 30 epochs of the example by five
providers. Parts that are not timed run together; what is timed runs alone. Each part is a process of its own, so that
a failure costs one part, and its result is written when it ends. The same command again goes on where the last one
stopped: parts that passed at this commit on this device are kept, the others run again. --minutes bounds one
invocation; a part that no longer fits is left for the next.

A tool that is absent or that fails is recorded as such, never as a pass.

Files in DIR, each written atomically: summary.md, evidence.json, log.txt, codegen.json, benchmarks.json,
benchmarks.md, benchmarks.png, and evidence.tar.gz, which holds them all.

Without a GPU, --rehearse runs every part small on the CPU and the interpreter, to try the command itself.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import torch

from evidence_parts import (
    COUNTERS,
    KERNELS,
    Part,
    Result,
    Running,
    read_benchmarks,
    read_code,
    read_counters,
    read_epochs,
    read_host_time,
    read_sanitizer,
    read_tests,
)
from fastvae.files import replacing
from fastvae.training import versions
from report import commit

HERE = Path(__file__).parent
FILES = ("summary.md", "evidence.json", "log.txt", "codegen.json", "benchmarks.json", "benchmarks.md", "benchmarks.png")
SHORTEST = 20.0  # seconds in which a part can do something
EPOCHS = ("fused-graph", "fused-output-graph", "fused", "eager", "compile")
# Tests of what is the same on every machine; some need packages that a machine with a GPU need not have.
ELSEWHERE = (
    "codegen", "compiled_forms", "data", "data_arrays", "data_folder", "documentation", "export", "host_time",
    "kept_launches", "matlab", "tensorboard",
)  # fmt: skip
COUNTED_ELEMENTS = 1 << 26  # 256 MiB per float32 tensor, several times the cache


def parts(out: Path, data: Path | None, rehearse: bool) -> list[Part]:
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    tests = ["tests", *(f"--ignore=tests/test_{name}.py" for name in ELSEWHERE)]
    if rehearse:
        tests = ["tests/test_layout.py"]
    if importlib.util.find_spec("xdist") is not None:
        tests += ["-n", "2" if rehearse else "6"]  # with what else runs in this stage, a process per core of 16
    codegen = [python, HERE / "codegen.py", "--check", "--json", out / "codegen.json"]
    codegen += ["--target", "sm_90"] if rehearse else []
    calls = [python, HERE / "small_calls.py"]
    sanitizer = ["compute-sanitizer", "--print-limit", "20", "--tool"]
    ncu = ["ncu", "--profile-from-start", "off", "--clock-control", "none", "--csv", "--print-units", "base"]
    ncu += ["--kernel-name", f"regex:{KERNELS}", "--metrics", ",".join(COUNTERS)]
    elements = str(1 << 15 if rehearse else COUNTED_ELEMENTS)
    benchmarks = [*pytest, "benchmarks", "--benchmark", "--report", out, "--limit", "250"]
    benchmarks += ["-k", "reconstruction and launch"] if rehearse else []
    host_time = [python, HERE / "host_time.py", "--device", "cpu" if rehearse else "cuda"]
    epochs = [python, HERE / "train_epochs.py"]
    options: list[str | Path] = ["--data-dir", data] if data else []
    seeds = ["--seeds", *map(str, range(5))]  # of fastvae's loop, which takes seconds, to hold against the reference
    options += ["--epochs", "1", "--limit", "256"] if rehearse else []

    no_gpu = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    here = no_gpu if rehearse else {}
    # So that memcheck sees each tensor's own bounds, not those of the allocator's blocks.
    uncached = {**here, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Part("tests on the device", 1, [*pytest, *tests], 240, read_tests, here),
        Part("tests on the interpreter", 1, [*pytest, *tests], 240, read_tests, no_gpu),
        Part("compiled code", 1, codegen, 240, read_code),
        Part("memcheck", 1, [*sanitizer, "memcheck", *calls], 180, read_sanitizer, uncached),
        Part("racecheck", 1, [*sanitizer, "racecheck", *calls], 180, read_sanitizer, here),
        Part("counters", 2, [*ncu, *calls, "--elements", elements], 90, read_counters, here),
        Part("host time", 3, host_time, 45, read_host_time, {"CUDA_VISIBLE_DEVICES": ""} if rehearse else {}),
        Part("benchmarks", 4, benchmarks, 280, read_benchmarks(out), here),
        *(
            Part(
                f"epochs, {name}",
                stage,
                [*epochs, name, *options, *(seeds if name.endswith("-graph") else [])],
                90,
                read_epochs,
                here,
            )
            for stage, name in enumerate(EPOCHS, start=5)
        ),
    ]


class Evidence:
    """What is known so far, and the files that say it."""

    def __init__(self, out: Path, device: str) -> None:
        self.out = out
        self.state: Result = {"device": device, "commit": commit(), "versions": versions(), "parts": {}}
        path = out / "evidence.json"
        if path.exists():
            before = json.loads(path.read_text())
            if all(before.get(key) == self.state[key] for key in ("device", "commit", "versions")):
                self.state["parts"] = before["parts"]
            else:
                print(f"{out} holds evidence of another commit, device or version: starting anew")
                for name in FILES:
                    (out / name).unlink(missing_ok=True)

    def passed(self, name: str) -> bool:
        return self.state["parts"].get(name, {}).get("status") == "passed"

    def record(self, name: str, status: str, seconds: float, result: Result, log: str) -> None:
        self.state["parts"][name] = {"status": status, "seconds": round(seconds, 1), "log": log, **result}
        print(f"{name}: {status}, {seconds:.0f} s", flush=True)
        self.write()

    def write(self) -> None:
        found = self.state["parts"]
        log = "".join(f"==== {name}: {it['status']}\n{it['log']}\n" for name, it in found.items())
        self._write("log.txt", log)
        self._write("summary.md", summary(self.state, self.out))
        self._write("evidence.json", json.dumps(self.state, indent=1) + "\n")
        with replacing(self.out / "evidence.tar.gz") as file:
            self._pack(file)

    def _write(self, name: str, text: str) -> None:
        with replacing(self.out / name) as file:
            file.write(text.encode())

    def _pack(self, file: BinaryIO) -> None:
        with tarfile.open(fileobj=file, mode="w:gz") as archive:
            for name in FILES:
                if (self.out / name).exists():
                    archive.add(self.out / name, arcname=name)


def run_stage(stage: Sequence[Part], evidence: Evidence, deadline: float) -> None:
    """Run these parts together, and record each as it ends."""
    with tempfile.TemporaryDirectory() as folder:
        running: list[Running] = []
        try:
            for part in stage:
                left = deadline - time.monotonic()
                if not part.available():
                    evidence.record(part.name, "absent", 0.0, {"tool": part.tool}, f"{part.tool} is not installed")
                elif left < min(part.seconds, SHORTEST):
                    evidence.record(part.name, "not run", 0.0, {}, "no time was left: run the command again")
                else:
                    running.append(Running(part, Path(folder), left))
            while running:
                for it in [it for it in running if it.finished()]:
                    running.remove(it)
                    evidence.record(it.part.name, *it.result())
                time.sleep(0.2)
        finally:
            for it in running:
                it.stop()


def summary(state: Result, out: Path) -> str:
    """The page that is committed with the results."""
    found = state["versions"]
    lines = [
        f"# Evidence: {state['device']}",
        "",
        f"torch {found['torch']}, triton {found['triton']}, Python {found['python']}, fastvae {found['fastvae']}, "
        f"commit {state['commit'] or 'unknown'}. Made by `python benchmarks/gpu_evidence.py`.",
        "",
        "| part | result | seconds | found |",
        "|---|---|---:|---|",
    ]
    for name, it in state["parts"].items():
        lines.append(f"| {name} | {it['status']} | {it['seconds']:.0f} | {_found(it)} |")
    counters = state["parts"].get("counters", {}).get("kernels")
    if counters:
        names = list(COUNTERS.values())
        lines += ["", f"## Hardware counters, {COUNTED_ELEMENTS:,} elements", ""]
        lines += [f"| kernel | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
        lines += [f"| {it} | {' | '.join(values.get(name, '') for name in names)} |" for it, values in counters.items()]
    epochs = [it for name, it in state["parts"].items() if name.startswith("epochs") and "steps" in it]
    if epochs:
        lines += ["", f"## {epochs[0]['epochs']} epochs of {epochs[0]['dataset']}, {epochs[0]['steps']:,} steps", ""]
        lines += [
            "| provider | seconds | steps/s | training loss | test loss | test mse |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for it in epochs:
            speed = f"{it['seconds_of_training']:.2f} | {it['steps_per_second']:,.0f}"
            quality = f"{it['final_loss']:.2f} | {it['test_loss']:.2f} | {it['test_mse']:.4f}"
            lines.append(f"| {it['provider']} | {speed} | {quality} |")
        lines += ["", *against_reference(epochs)]
    page = out / "benchmarks.md"
    if page.exists():
        nested = ("\n" + page.read_text()).replace("\n#", "\n##").strip()
        lines += ["", "![time against size](benchmarks.png)", "", nested]
    return "\n".join(lines) + "\n"


def against_reference(epochs: Sequence[Result]) -> Iterator[str]:
    """Whether what was trained with several seeds came to the losses of eager PyTorch in float32."""
    reference = json.loads((HERE / "reference_losses.json").read_text())
    same = [it for it in epochs if all(it[key] == reference[key] for key in ("dataset", "epochs", "steps"))]
    losses = reference["final_losses"]
    lowest, highest = min(losses), max(losses)
    for it in same:
        own = it["final_losses"]
        mean = sum(own) / len(own)
        verdict = "inside" if lowest <= mean <= highest else "OUTSIDE"
        yield (
            f"{it['provider']}: final training loss {mean:.3f} (mean of {len(own)}: {min(own):.3f} to {max(own):.3f}), "
            f"{verdict} of the {lowest:.3f} to {highest:.3f} of {len(losses)} seeds of eager PyTorch in float32.  "
        )


def _found(result: Result) -> str:
    """A part's findings in a few words."""
    if "kernels" in result:
        return f"{len(result['kernels'])} kernels"
    if "provider" in result:
        return f"final loss {result['final_loss']:.2f}"
    hidden = ("status", "seconds", "log", "exit_code", "complaints", "failures", "FAIL")
    words = [f"{value} {name}" for name, value in result.items() if name not in hidden]
    for name in ("complaints", "failures", "FAIL"):
        words += [f"{name}: {'; '.join(map(str, result[name][:5]))}"] if result.get(name) else []
    return ", ".join(words).replace("|", "/").replace("\n", " ")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="MNIST's files; without them, small digits")
    parser.add_argument("--minutes", type=float, default=8.0, help="of this invocation, default: 8")
    parser.add_argument("--rehearse", action="store_true", help="small, on the CPU: what it prints is no evidence")
    settings = parser.parse_args()
    deadline = time.monotonic() + 60 * settings.minutes
    if settings.rehearse:
        device = "a rehearsal on a CPU"
    elif torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        parser.error("there is no CUDA device (--rehearse tries the command without one)")
    out = settings.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    data = settings.data_dir.resolve() if settings.data_dir else None
    evidence = Evidence(out, device)
    todo = [part for part in parts(out, data, settings.rehearse) if not evidence.passed(part.name)]
    try:
        for stage in sorted({part.stage for part in todo}):
            run_stage([part for part in todo if part.stage == stage], evidence, deadline)
    except KeyboardInterrupt:
        print("stopped; what was found is written, and the same command goes on from there")
        return 130
    evidence.write()
    print((out / "summary.md").read_text())
    wanting = [name for name, it in evidence.state["parts"].items() if it["status"] != "passed"]
    print(f"not passed: {', '.join(wanting)}" if wanting else "everything passed")
    return 1 if wanting else 0


if __name__ == "__main__":
    sys.exit(main())
