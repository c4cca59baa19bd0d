"""The pictures of a folder as bytes. They are decoded once, into a file that later calls find again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from fastvae.files import checksum, replacing

from .dataset import SkippedFile
from .pictures import fit, read_picture

MODES = {1: "L", 3: "RGB"}  # of a number of channels
_LARGEST_SHARED_SIZE = 128
_DEFAULT_SIZE = 64
_VERSION = 2  # of the files that are kept: another one where pictures are decoded in another way


class Decoded(NamedTuple):
    """The information that is stored beside the bytes: their shape, [N, H, W, C], and the reason for each file that was
    skipped.
    """

    shape: tuple[int, int, int, int]
    skipped: dict[str, str]


def decoded_once(
    folder: Path,
    root: Path,
    paths: Sequence[str],
    size: tuple[int, int] | None,
    channels: int | None,
    strict: bool,
) -> tuple[Path, Decoded]:
    """The file in ``folder`` with the bytes of the pictures ``paths`` below ``root``. It is written unless it exists
    and is intact.

    Raises ``OSError`` if it cannot be written, and ``ValueError`` if no picture can be read. With ``strict``, one
    picture that cannot be read raises ``ValueError``.
    """
    name = _name(root, paths, size, channels)
    bytes_path, about_path = folder / f"{name}.bytes", folder / f"{name}.json"
    decoded = _kept(about_path, bytes_path)
    if decoded is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(bytes_path) as file:
                decoded = _decode(root, paths, size, channels, strict, file)
            about = {**decoded._asdict(), "sha256": checksum(bytes_path)}
            with replacing(about_path) as file:
                file.write(json.dumps({**about, "sha256 of the above": _own_checksum(about)}).encode())
        except OSError as error:
            # A failed write does not name its file.
            raise OSError(error.errno, f"{error.strerror} (see the variable FASTVAE_DATA)", str(folder)) from error
    return bytes_path, decoded


def _name(root: Path, paths: Sequence[str], size: tuple[int, int] | None, channels: int | None) -> str:
    import PIL

    digest = hashlib.sha256(json.dumps([_VERSION, PIL.__version__, str(root.resolve()), size, channels]).encode())
    for path in paths:
        try:
            status = os.stat(root / path)
            state = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]  # ctime: of its permissions too
        except OSError:
            state = []
        digest.update(json.dumps([path, state]).encode())
    return digest.hexdigest()[:32]


def _kept(about_path: Path, bytes_path: Path) -> Decoded | None:
    """What an earlier run has left, if it is whole: no bit of either file has changed."""
    try:
        about = json.loads(about_path.read_bytes())
        if about.pop("sha256 of the above") != _own_checksum(about) or about["sha256"] != checksum(bytes_path):
            return None
        count, height, width, channels = about["shape"]
        return Decoded((count, height, width, channels), about["skipped"])
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return None


def _own_checksum(about: dict[str, Any]) -> str:
    return checksum(json.dumps(about, sort_keys=True).encode())


def _decode(
    root: Path,
    paths: Sequence[str],
    size: tuple[int, int] | None,
    channels: int | None,
    strict: bool,
    file: BinaryIO,
) -> Decoded:
    """Write the pictures' bytes into a file, [N, H, W, C].

    Where size or channels are None, it begins with what holds if all pictures are alike, of one size and grayscale, and
    starts again when one is not.
    """
    shared = size is None
    mode = MODES[channels or 1]
    skipped: dict[str, str] = {}
    count = 0
    again = True
    while again:
        again, count = False, 0
        file.seek(0)
        file.truncate()
        for path in paths:
            if path in skipped:
                continue
            try:
                image = read_picture(root / path)
            except Exception as error:  # Pillow's decoders raise errors of many kinds
                skipped[path] = _reason(error)
                if strict:
                    raise strict_error(root, SkippedFile(path, skipped[path])) from error
                continue
            size = size or (image.height, image.width)
            if shared and ((image.height, image.width) != size or max(size) > _LARGEST_SHARED_SIZE):
                size, shared, again = (_DEFAULT_SIZE, _DEFAULT_SIZE), False, True
            if channels is None and image.mode == "RGB" and mode == "L":
                mode, again = "RGB", True
            if again:
                break
            file.write(fit(image, mode, *size).tobytes())
            count += 1
    if size is None or count == 0:
        path, reason = next(iter(skipped.items()))
        raise ValueError(
            f"{root} has no picture that can be read, of {len(skipped)} files; the first, {path}: {reason}"
        )
    return Decoded((count, *size, 1 if mode == "L" else 3), skipped)


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.partition("\n")[0] or type(error).__name__


def strict_error(root: Path, item: SkippedFile) -> ValueError:
    return ValueError(f"{root / item.path} is not read: {item.reason} (strict)")
