"""Run a part of the evidence as a process: start its command, enforce its time limit, stop it and read its output."""

from __future__ import annotations

import os
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
# Between SIGINT, after which pytest and the examples still say what they know, and SIGKILL: the last of a part's
# seconds, so that its limit holds.
GRACE = 8.0
ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",  # a part that is killed has said what it knew
    "OMP_NUM_THREADS": "2",  # several parts run at once
    "MPLBACKEND": "Agg",
    "GLOO_SOCKET_IFNAME": "lo",  # a machine without a network has no other
    "NCCL_SOCKET_IFNAME": "lo",
}
Result = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A process, and how its result is read."""

    name: str
    command: Sequence[str | Path]
    seconds: float  # after which it is stopped
    read: Callable[[str, int], tuple[bool, Result]]  # its output and exit code: whether it passed, and what it found
    environment: dict[str, str] = field(default_factory=dict)
    takes_the_rest: bool = False  # its limit is all the time that is left, where that is more
    limit_option: str | None = None  # of the command: the seconds in which it should be done

    @property
    def tool(self) -> str:
        return str(self.command[0])

    def available(self) -> bool:
        return shutil.which(self.tool) is not None


class Running:
    """A part that has been started. Its output goes to a file, so that it is there also when the part is stopped."""

    def __init__(self, part: Part, folder: Path, left: float) -> None:
        self.part = part
        seconds = left if part.takes_the_rest else min(part.seconds, left)
        self._path = folder / f"{part.name.replace(' ', '_')}.log"
        self._file = self._path.open("wb")
        # Whether kernels are interpreted is the part's own affair.
        inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        limit = [part.limit_option, f"{max(seconds - 2 * GRACE, 1.0):.0f}"] if part.limit_option else []
        self._process = subprocess.Popen(
            [*part.command, *limit],
            cwd=ROOT,
            env={**inherited, **ENVIRONMENT, **part.environment},
            stdout=self._file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its own children can be stopped with it
            # A job in the background ignores SIGINT, which children inherit.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self._began = time.monotonic()
        self._end = self._began + seconds
        self._asked = False  # to stop
        self._stopped = False

    def finished(self) -> bool:
        """Whether it has ended; it is asked to end shortly before its time is up, and stopped when it is."""
        if self._process.poll() is not None:
            return True
        now = time.monotonic()
        if now > self._end:
            self.stop()
            return True
        if now > self._end - GRACE and not self._asked:
            # To the leader alone: pytest-xdist and torchrun end their children themselves, and would report those that
            # ended without being asked as crashed.
            self._process.send_signal(signal.SIGINT)
            self._asked = True
        return False

    def stop(self) -> None:
        self._stopped = True
        self._kill_group()
        self._process.wait()

    def _kill_group(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def result(self) -> tuple[str, float, Result, str]:
        """(status, seconds, what was found, the end of its output)"""
        seconds = time.monotonic() - self._began
        self._kill_group()  # children that outlived it would slow the parts that follow
        self._file.close()
        output = self._path.read_bytes().decode(errors="replace")
        code = self._process.returncode
        try:
            passed, found = self.part.read(output, code)
        except Exception as error:  # output of another form than this tool is known for
            passed, found = False, {"unreadable": f"{type(error).__name__}: {error}"}
        # Some programs end well when they are asked to: what they were to show is not whole all the same.
        status = "timed out" if self._asked or self._stopped else "passed" if passed else "failed"
        return status, seconds, {"exit_code": code, **found}, output[-LOG_BYTES:]
