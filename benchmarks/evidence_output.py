"""Read the output of each part of the evidence: whether it passed, and its results."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evidence_process import Result
from fastvae.operations import all_kernel_names

KERNELS = f"^({'|'.join(sorted({kernel.split('.')[1] for kernel in all_kernel_names()}))})$"
COUNTERS = {
    "gpu__time_duration.sum": "nanoseconds",
    "dram__bytes_read.sum": "bytes read",
    "dram__bytes_write.sum": "bytes written",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy",
    "launch__registers_per_thread": "registers",
}


def read_smoke(output: str, code: int) -> tuple[bool, Result]:
    """The checks of gpu_smoke.py; only its last line says that none was left out."""
    lines = output.splitlines()
    failures = [line[4:].strip() for line in lines if line.startswith("FAIL ")]
    remarks = [line for line in lines if re.search(r"(copy|captured step|launches of the ELBO path): ", line)]
    whole = bool(re.search(r"^\d+ checks passed, 0 failed$", output, re.MULTILINE))
    found: Result = {"passed": sum(line.startswith("ok ") for line in lines), "failures": failures}
    if remarks:
        found["remarks"] = [line.split("s  ", 1)[-1] for line in remarks]
    return code == 0 and whole and not failures, found


_VERDICT = r"(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)"


def read_tests(output: str, code: int) -> tuple[bool, Result]:
    """The counts in pytest's last line, and the failures by name. Where pytest was stopped before that line, both come
    from what -v printed of each test.
    """
    counts = {
        word: int(number)
        for number, word in re.findall(r"(\d+) (passed|failed|error|errors|skipped|deselected)", _last_count(output))
    }
    # "tests/test_a.py::test_b[x] FAILED [ 12%]", and with pytest-xdist "[gw3] [ 12%] FAILED tests/test_a.py::test_b[x]"
    verdicts = re.findall(rf"^(\S+::.+?) {_VERDICT}\b.*\[ *\d+%\]\s*$", output, re.MULTILINE)
    verdicts += [
        (name, verdict)
        for verdict, name in re.findall(rf"^\[gw\d+\] \[ *\d+%\] {_VERDICT} (.+?)\s*$", output, re.MULTILINE)
    ]
    failures = dict.fromkeys(name for name, verdict in verdicts if verdict in ("FAILED", "ERROR"))
    if not verdicts:
        failures = dict.fromkeys(re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.MULTILINE))
    if not counts and verdicts:
        words = [verdict.lower() for _, verdict in verdicts]
        counts = {word: words.count(word) for word in ("passed", "failed", "error", "skipped") if word in words}
    return code == 0 and counts.get("passed", 0) > 0, {**counts, "failures": list(failures)}


def _last_count(output: str) -> str:
    lines = [line for line in output.splitlines() if re.search(r"\d+ (passed|failed|error).* in [\d.]+s", line)]
    return lines[-1] if lines else ""


def read_sanitizer(output: str, code: int) -> tuple[bool, Result]:
    """compute-sanitizer's own summary, and the program's last line: only both say that it watched and saw nothing."""
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)
    ran = re.search(r"(\d+) operations ran", output)
    found: Result = {
        "operations": int(ran[1]) if ran else None,
        "errors": int(summary[1]) if summary else None,
    }
    return code == 0 and found["errors"] == 0 and bool(found["operations"]), found


def read_counters(output: str, code: int) -> tuple[bool, Result]:
    """ncu's CSV: a row per kernel and metric."""
    start = output.find('"ID"')
    kernels: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(io.StringIO(output[start:] if start >= 0 else "")):
        metric = row.get("Metric Name")
        if metric in COUNTERS and re.match(KERNELS, row.get("Kernel Name", "")):
            kernel = kernels.setdefault(f"{row['ID']} {row['Kernel Name']}", {})
            kernel[COUNTERS[metric]] = f"{row['Metric Value']} {row['Metric Unit']}".strip()
    return code == 0 and bool(kernels), {"kernels": kernels}


def read_calls(output: str, code: int) -> tuple[bool, Result]:
    """small_calls.py on its own."""
    ran = re.search(r"^(\d+) operations ran$", output, re.MULTILINE)
    return code == 0 and ran is not None, {"operations": int(ran[1]) if ran else None}


def read_benchmarks(folder: Path, own: bool = True) -> Callable[[str, int], tuple[bool, Result]]:
    """The benchmarks in `folder`, in which fastvae must have been measured if `own`. A rival that fails is reported and
    does not fail the part, because it is not fastvae's to repair; its test fails, so that pytest's exit code is 1.
    """

    def read(output: str, code: int) -> tuple[bool, Result]:
        _, found = read_tests(output, code)
        found.pop("failures")
        path = folder / "benchmarks.json"
        if not path.exists():
            return False, found
        cells = json.loads(path.read_text())["cells"]
        wrong: list[str] = []
        rivals: list[str] = []
        for cell in cells:
            for name, it in cell["providers"].items():
                if it["failure"]:
                    (wrong if name.startswith("fused") else rivals).append(f"{cell['case']}, {name}: {it['failure']}")
        measured = all(any(it.startswith("fused") for it in cell["providers"]) for cell in cells)
        passed = code in (0, 1) and bool(cells) and (measured or not own) and not wrong
        return passed, {**found, "cases": len(cells), "FAIL": wrong, "rivals": rivals}

    return read


def read_host_time(output: str, code: int) -> tuple[bool, Result]:
    ratios = [line.split()[-1] for line in output.splitlines() if line.startswith("ELBO path")]
    return code == 0 and len(ratios) == 1, {"of eager's host time on the ELBO path": ratios[0]} if ratios else {}


def read_epochs(output: str, code: int) -> tuple[bool, Result]:
    lines = [line for line in output.splitlines() if line.startswith('{"provider"')]
    return code == 0 and bool(lines), json.loads(lines[-1]) if lines else {}


def read_training(folder: Path) -> Callable[[str, int], tuple[bool, Result]]:
    """A run of examples/train.py in `folder`: it came to its end, and says on what."""

    def read(output: str, code: int) -> tuple[bool, Result]:
        path = folder / "summary.json"
        if not path.exists():
            return False, {}
        summary = json.loads(path.read_text())
        last = summary["final"]
        found = {
            "epochs run": last["epoch"],
            "seconds of training": round(last["seconds"], 2),
            "loss": round(last["loss"], 3),
            "test loss": round(last["test_loss"], 3),
            "backend": summary["backend"]["name"],
            "processes": summary["processes"],
        }
        whole = not summary["interrupted"] and "without a CUDA graph" not in output
        return code == 0 and whole, found

    return read
