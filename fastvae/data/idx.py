"""Reading IDX, the file format of MNIST.

An IDX file is, big-endian: two zero bytes, one byte for the element type (0x08: unsigned byte), one byte for the number
of dimensions n, n unsigned 32-bit sizes, then the elements in row-major order (http://yann.lecun.com/exdb/mnist/).
"""

from __future__ import annotations

import gzip
import io
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_GZIP_MAGIC = b"\x1f\x8b"
_UNSIGNED_BYTE = 0x08
_TYPE_NAMES = {
    0x08: "unsigned byte",
    0x09: "signed byte",
    0x0B: "int16",
    0x0C: "int32",
    0x0D: "float32",
    0x0E: "float64",
}
_MOST_DIMENSIONS = 32  # what every NumPy release can hold
_CHUNK_BYTES = 1 << 20
_MOST_PACKED = 1032  # bytes that one byte of a gzip stream can hold: 258 in two bits


def read_idx(path: str | os.PathLike[str], *, expected_shape: tuple[int, ...] | None = None) -> NDArray[np.uint8]:
    """Read an IDX file of unsigned bytes, packed by gzip or not (its first two bytes decide, not its name).

    Returns a writable uint8 array, 0..255, of the shape in the file's header. If ``expected_shape`` is given, the
    header must have exactly this shape.

    Raises ``ValueError`` for every malformed file, which names the file, what was found and what was expected, and
    ``FileNotFoundError`` if there is no file.
    """
    path = Path(path)
    with path.open("rb") as file:
        first_bytes = file.read(len(_GZIP_MAGIC))
        file.seek(0)
        if first_bytes == _GZIP_MAGIC:
            try:
                with gzip.GzipFile(fileobj=file) as unpacked:
                    return _read_stream(unpacked, path, expected_shape, _MOST_PACKED)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"{path}: corrupt gzip stream ({error}), expected a complete one") from error
        if path.suffix == ".gz":
            raise ValueError(f"{path}: not a gzip file: begins with {first_bytes!r}, expected {_GZIP_MAGIC!r}")
        return _read_stream(file, path, expected_shape, 1)


def _read_stream(
    stream: io.BufferedIOBase, path: Path, expected_shape: tuple[int, ...] | None, most_packed: int
) -> NDArray[np.uint8]:
    """Read a stream of which one byte in the file holds at most so many."""
    shape = _read_header(stream, path)
    if expected_shape is not None and shape != tuple(expected_shape):
        raise ValueError(f"{path}: header names shape {shape}, expected {tuple(expected_shape)}")
    count = math.prod(shape)
    most = most_packed * path.stat().st_size - stream.tell()
    if count > most:  # before what a large file holds is kept
        found = f"{most}" if most_packed == 1 else f"at most {most}"
        raise ValueError(f"{path}: truncated data: {found} bytes, expected {count} for shape {shape}")
    # One byte more than expected finds trailing bytes, and takes gzip to its end, where the checksum is verified.
    data = _read_at_most(stream, count + 1)
    if len(data) < count:
        raise ValueError(f"{path}: truncated data: {len(data)} bytes, expected {count} for shape {shape}")
    if len(data) > count:
        raise ValueError(f"{path}: trailing bytes after the data, expected exactly {count} bytes for shape {shape}")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


def _read_header(stream: io.BufferedIOBase, path: Path) -> tuple[int, ...]:
    magic = _read_at_most(stream, 4)
    if len(magic) < 4:
        raise ValueError(f"{path}: truncated header: {len(magic)} bytes, expected at least 4")
    if magic[:2] != b"\0\0":
        raise ValueError(f"{path}: wrong magic number 0x{magic.hex()}, expected an IDX file, 0x000008nn")
    element_type, dimensions = magic[2], magic[3]
    if element_type != _UNSIGNED_BYTE:
        name = _TYPE_NAMES.get(element_type, "unknown")
        raise ValueError(f"{path}: wrong element type 0x{element_type:02x} ({name}), expected 0x08 (unsigned byte)")
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise ValueError(f"{path}: header names {dimensions} dimensions, expected 1 to {_MOST_DIMENSIONS}")
    sizes = _read_at_most(stream, 4 * dimensions)
    if len(sizes) < 4 * dimensions:
        found, expected = 4 + len(sizes), 4 + 4 * dimensions
        raise ValueError(f"{path}: truncated header: {found} bytes, expected {expected} for {dimensions} dimensions")
    shape = struct.unpack(f">{dimensions}I", sizes)
    if 0 in shape:
        raise ValueError(f"{path}: header names shape {shape}, expected every size to be at least 1")
    return shape


def _read_at_most(stream: io.BufferedIOBase, limit: int) -> bytearray:
    # In chunks: read(limit) would allocate all that an untrusted header asks for before finding the file short.
    data = bytearray()
    while len(data) < limit:
        chunk = stream.read(min(limit - len(data), _CHUNK_BYTES))
        if not chunk:
            break
        data += chunk
    return data
