"""Files that are either complete or absent."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A binary file that replaces ``path`` when the block ends, and is removed if the block raises.

    Readers therefore see the old content or the new content, never a part of it, even if the process is killed. Raises
    ``OSError``, which names ``path``, also if the block cannot write because the disk is full.
    """
    # A name of its own, so that processes writing at the same time do not write into each other's file.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a power failure may leave the new name with nothing in it
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None and error.filename in (None, str(temporary), temporary):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Write a CSV file, which is either complete or absent. None becomes an empty field. Floats have the seven digits
    of float32.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([f"{value:.7g}" if isinstance(value, float) else value for value in row] for row in rows)
    with replacing(path) as file:
        file.write(text.getvalue().encode())


def checksum(content: bytes | Path) -> str:
    """The SHA-256 of bytes or of a file, as 64 hexadecimal digits. Reads a file in blocks. Raises ``OSError``."""
    digest = hashlib.sha256(b"" if isinstance(content, Path) else content)
    if isinstance(content, Path):
        with open(content, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
