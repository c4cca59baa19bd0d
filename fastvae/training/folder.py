"""The folder of a run: made, emptied of what an earlier run left, and locked while a run writes into it."""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from fastvae.program import UserError, make_folder, prepare_folder
from fastvae.training.records import write_metrics

FILES = (
    "metrics.csv",
    "checkpoint.pt",
    "checkpoint.previous.pt",
    "checkpoint.best.pt",
    "loss.png",
    "reconstructions.png",
    "error_histogram.png",
    "generated.png",
    "summary.json",
)


def prepare_run(out: Path | None, dataset: str, new: bool, held: contextlib.ExitStack) -> Path:
    """The run's folder, locked; that of a run that goes on is already."""
    try:
        folder = new_folder(dataset) if out is None else out
        if new:
            make_folder(folder)
            held.enter_context(locked(folder))
        prepare_folder(folder, FILES, new=new)
        if new:
            shutil.rmtree(folder / "tensorboard", ignore_errors=True)
            write_metrics(folder / "metrics.csv", [])  # shows now, not after training, that files can be written
    except OSError as error:
        raise UserError(f"--out cannot be written: {error}") from error
    return folder


def new_folder(dataset: str) -> Path:
    """A folder named after the dataset and the time, made here, so that runs that start together do not share one."""
    name = f"{dataset}-{datetime.now():%Y%m%d-%H%M%S}"
    for number in itertools.count(1):
        folder = Path("runs", name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
    return folder


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder, because each would overwrite the other's files. Of a run with several processes
    only the first locks.

    The operating system ends the lock when the process ends, also when it is killed; the file .lock remains. Raises
    `UserError` while another process holds the lock, and ``OSError``.
    """
    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not _try_to_lock(file):
            holder = os.read(file, 200).decode(errors="replace") or "another process"
            raise UserError(f"{folder} is in use by another run, {holder}: wait for its end, or name another folder")
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {platform.node()}".encode())
        yield
    finally:
        _unlock(file)
        os.close(file)


def _try_to_lock(file: int) -> bool:
    """Whether no other process holds the lock; true too where the file system has no locks."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(file, 1 << 30, os.SEEK_SET)  # behind the text, because Windows lets nobody read what is locked
        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            os.lseek(file, 0, os.SEEK_SET)
    else:
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return True
    return True


def _unlock(file: int) -> None:
    """Closing the file alone does not unlock it while a process that was forked holds it open."""
    if sys.platform != "win32":
        import fcntl

        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_UN)
