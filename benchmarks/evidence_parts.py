"""Parts of the evidence: processes whose output says what was found."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LOG_BYTES = 256 * 1024  # kept of each part, from its end
KERNELS = "^(gaussian|dimensions|sigmoid_mse|elbo|conv_elbo)_"
COUNTERS = {
    "gpu__time_duration.sum": "nanoseconds",
    "dram__bytes_read.sum": "bytes read",
    "dram__bytes_write.sum": "bytes written",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy",
    "launch__registers_per_thread": "registers",
}

Result = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A process, and how its result is read. Parts of one stage run together."""

    name: str
    stage: int
    command: Sequence[str | Path]
    seconds: float  # after which it is stopped
    read: Callable[[str, int], tuple[bool, Result]]  # its output and exit code: whether it passed, and what it found
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def tool(self) -> str:
        return str(self.command[0])

    def available(self) -> bool:
        return shutil.which(self.tool) is not None


def read_tests(output: str, code: int) -> tuple[bool, Result]:
    """The counts in pytest's last line, and the failures by name."""
    counts = {
        word: int(number)
        for number, word in re.findall(r"(\d+) (passed|failed|error|errors|skipped|deselected)", _last_count(output))
    }
    failures = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    return code == 0 and counts.get("passed", 0) > 0, {**counts, "failures": failures[:50]}


def _last_count(output: str) -> str:
    lines = [line for line in output.splitlines() if re.search(r"\d+ (passed|failed|error)", line)]
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


def read_code(output: str, code: int) -> tuple[bool, Result]:
    return code == 0, {"complaints": [] if code == 0 else output.splitlines()[-20:]}


def read_benchmarks(folder: Path) -> Callable[[str, int], tuple[bool, Result]]:
    def read(output: str, code: int) -> tuple[bool, Result]:
        _, found = read_tests(output, code)
        path = folder / "benchmarks.json"
        if not path.exists():
            return False, found
        cells = json.loads(path.read_text())["cells"]
        wrong = [
            f"{cell['case']}, {name}: {it['failure']}"
            for cell in cells
            for name, it in cell["providers"].items()
            if it["failure"]
        ]
        return code == 0 and not wrong, {**found, "cases": len(cells), "FAIL": wrong}

    return read


def read_host_time(output: str, code: int) -> tuple[bool, Result]:
    ratios = [line.split()[-1] for line in output.splitlines() if line.startswith("ELBO path")]
    return code == 0 and len(ratios) == 1, {"of eager's host time on the ELBO path": ratios[0]} if ratios else {}


def read_epochs(output: str, code: int) -> tuple[bool, Result]:
    lines = [line for line in output.splitlines() if line.startswith('{"provider"')]
    return code == 0 and bool(lines), json.loads(lines[-1]) if lines else {}


class Running:
    """A part that has been started. Its output goes to a file, so that it is there also when the part is stopped."""

    def __init__(self, part: Part, folder: Path, seconds: float) -> None:
        self.part = part
        self._path = folder / f"{part.name.replace(' ', '_')}.log"
        self._file = self._path.open("wb")
        # Whether kernels are interpreted is the part's own affair.
        inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        self._process = subprocess.Popen(
            list(part.command),
            cwd=ROOT,
            env={**inherited, **part.environment},
            stdout=self._file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its own children can be stopped with it
        )
        self._began = time.monotonic()
        self._end = self._began + min(part.seconds, seconds)

    def finished(self) -> bool:
        """Whether it has ended; it is stopped when its time is up."""
        if self._process.poll() is not None:
            return True
        if time.monotonic() > self._end:
            self.stop()
            return True
        return False

    def stop(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def result(self) -> tuple[str, float, Result, str]:
        """(status, seconds, what was found, the end of its output)"""
        seconds = time.monotonic() - self._began
        self._file.close()
        output = self._path.read_bytes().decode(errors="replace")
        code = self._process.returncode
        try:
            passed, found = self.part.read(output, code)
        except Exception as error:  # output of another form than this tool is known for
            passed, found = False, {"unreadable": f"{type(error).__name__}: {error}"}
        status = "passed" if passed else "timed out" if time.monotonic() > self._end else "failed"
        return status, seconds, {"exit_code": code, **found}, output[-LOG_BYTES:]
