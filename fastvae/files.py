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
    """A binary file that takes the place of ``path`` when the block ends, and vanishes if it raises.

    So readers, and runs that are killed, see the old content or the new, never a part of it. Raises ``OSError``, which
    names ``path``, also where the block could not write, because the disk is full.
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
    """A CSV file, complete or absent. None is an empty field; floats have the seven digits that float32 holds."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([f"{value:.7g}" if isinstance(value, float) else value for value in row] for row in rows)
    with replacing(path) as file:
        file.write(text.getvalue().encode())


def checksum(content: bytes | Path) -> str:
    """The SHA-256, 64 hexadecimal digits, of bytes or of a file, which is read block by block. Raises ``OSError``."""
    digest = hashlib.sha256(b"" if isinstance(content, Path) else content)
    if isinstance(content, Path):
        with open(content, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
