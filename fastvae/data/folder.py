"""A folder of pictures as a dataset: each picture is decoded once, into one file that is then mapped into memory."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastvae.files import replacing

from .dataset import ImageDataset, SkippedFile, tensor_of
from .mnist import default_data_dir
from .pictures import fit, read_picture, require_pillow

_SUFFIXES = (".png", ".jpg", ".jpeg")
_SETS = ("train", "test")
_LARGEST_SHARED_SIZE = 128
_DEFAULT_SIZE = 64
_MODES = {1: "L", 3: "RGB"}
_TENTH = bytes([26])  # of the first bytes of hashes, 26 of 256 are below it
_VERSION = 1  # of the files that are kept: another one where pictures are decoded in another way


class _Picture(NamedTuple):
    """A file that is to be read: its path below the folder, with "/", and what decides its place."""

    path: str
    label: str | None
    in_test: bool
    order: bytes


def load_folder(
    path: str | os.PathLike[str],
    *,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    strict: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
) -> ImageDataset:
    """The PNG and JPEG files in a folder and its sub-folders, of any size, as uint8 [N, C, H, W].

    Files count whose names end in .png, .jpg or .jpeg and do not begin with a dot. If the folder has sub-folders
    "train" and "test", these are the two sets, and whatever else is there is left alone. Else about a tenth of the
    pictures is the test set, at least one: where a picture goes hangs on the hash of its path below the folder alone,
    so more files move no other picture from one set to the other. That hash is also the order within a set, so that the
    first N pictures are of all classes. The classes are the sub-folders at first level (of "train" and "test" if these
    are the sets), numbered in sorted order; a set of which a picture lies in none has no labels.

    Pictures are cut at the edges to the aspect ratio of ``image_size``, which is N for N x N pixels or (height, width),
    and resized to it (see `fastvae.data.pictures`); None: the size of all if that is one and not above 128, else 64.
    ``channels``: 1 for grayscale, 3 for RGB; None: grayscale if all are, else RGB. What a model was trained on is
    ``image_size=model.image_shape[1:], channels=model.image_shape[0]``.

    They are decoded one by one into a file in ``cache_dir`` (None: ``default_data_dir("folders")``) that is mapped into
    memory, and found there again as long as no picture is changed, added or removed. It may be deleted at any time.

    What cannot be read is named in ``skipped``, or, with ``strict``, raises ``ValueError``. Links are followed, each
    folder once.

    Raises ``ValueError`` if one of the sets would be empty, and for another image_size or channels, ``OSError`` where
    the folder cannot be read or cache_dir not written, and ``ImportError`` where Pillow is missing.
    """
    require_pillow()
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"image_size must be a positive number of pixels or two, (height, width), got {image_size}")
    if channels not in (None, *_MODES):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    root = Path(path).expanduser()
    if not root.is_dir():
        root.stat()  # names what is absent
        raise NotADirectoryError(f"{root} is no folder")
    sets = _sets(root)
    pictures, skipped = _find_pictures(root, sets)
    if strict and skipped:
        raise _strict_error(root, skipped)
    folder = default_data_dir("folders") if cache_dir is None else Path(cache_dir).expanduser()
    bytes_path, about = _decoded_once(folder, root, pictures, size, channels, strict)
    skipped += [SkippedFile(*item) for item in about.skipped.items()]
    if strict and skipped:
        raise _strict_error(root, skipped)
    mapped = np.memmap(bytes_path, np.uint8, mode="r", shape=about.shape)
    images = tensor_of(mapped).permute(0, 3, 1, 2)
    readable = [picture for picture in pictures if picture.path not in about.skipped]
    tests = sum(picture.in_test for picture in readable)  # they come first
    if not sets:
        tests = min(max(tests, 1), len(readable) - 1)  # one in each set, whatever their hashes
    if not 0 < tests < len(readable):
        raise ValueError(f"{root} has {len(readable) - tests} training and {tests} test images that can be read")
    # Of all, so that a damaged file changes no label.
    class_names = sorted({picture.label for picture in pictures if picture.label is not None})
    return ImageDataset(
        "folder",
        images[tests:],
        _labels(readable[tests:], class_names),
        images[:tests],
        _labels(readable[:tests], class_names),
        tuple(class_names),
        tuple(skipped),
    )


class _About(NamedTuple):
    """What is kept beside the bytes: their shape, [N, H, W, C], and the reason for each file that has none."""

    shape: tuple[int, int, int, int]
    skipped: dict[str, str]


def _sets(root: Path) -> list[str]:
    """The folders of the two sets, or none."""
    sets = [name for name in _SETS if (root / name).is_dir()]
    if len(sets) == 1:
        raise ValueError(f'{root} has a folder "{sets[0]}", expected both "train" and "test", or neither')
    return sets


def _find_pictures(root: Path, sets: list[str]) -> tuple[list[_Picture], list[SkippedFile]]:
    """The files that are to be read, in their order, and the folders that could not be."""
    errors: list[OSError] = []
    pictures = []
    for top in sets or ["."]:
        seen = set()
        for folder, folders, names in os.walk(root / top, onerror=errors.append, followlinks=True):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in names:
                if name.lower().endswith(_SUFFIXES) and not name.startswith("."):
                    inner = PurePosixPath(Path(folder, name).relative_to(root / top).as_posix())
                    order = hashlib.sha256(os.fsencode(str(inner))).digest()
                    label = inner.parts[0] if len(inner.parts) > 1 else None
                    in_test = top == "test" if sets else order < _TENTH
                    pictures.append(_Picture(str(PurePosixPath(top) / inner), label, in_test, order))
    if errors and not pictures:
        raise errors[0]
    pictures.sort(key=lambda picture: (not picture.in_test, picture.order, picture.path))
    unread = [SkippedFile(_below(root, error.filename), error.strerror or str(error)) for error in errors]
    return pictures, unread


def _below(root: Path, path: str) -> str:
    return Path(path).relative_to(root).as_posix()


def _labels(pictures: list[_Picture], class_names: list[str]) -> Tensor | None:
    if any(picture.label is None for picture in pictures):
        return None
    numbers: dict[str | None, int] = {name: number for number, name in enumerate(class_names)}
    return torch.tensor([numbers[picture.label] for picture in pictures], dtype=torch.int64)


def _decoded_once(
    folder: Path,
    root: Path,
    pictures: list[_Picture],
    size: tuple[int, int] | None,
    channels: int | None,
    strict: bool,
) -> tuple[Path, _About]:
    """The file of the pictures' bytes, which is written unless it is there."""
    name = _cache_name(root, pictures, size, channels)
    bytes_path, about_path = folder / f"{name}.bytes", folder / f"{name}.json"
    about = _read_about(about_path, bytes_path)
    if about is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(bytes_path) as file:
                about = _decode(root, pictures, size, channels, strict, file)
            with replacing(about_path) as file:
                file.write(json.dumps(about._asdict()).encode())
        except OSError as error:
            # A failed write does not name its file.
            raise OSError(error.errno, f"{error.strerror} (see the variable FASTVAE_DATA)", str(folder)) from error
    return bytes_path, about


def _cache_name(root: Path, pictures: list[_Picture], size: tuple[int, int] | None, channels: int | None) -> str:
    import PIL

    digest = hashlib.sha256(json.dumps([_VERSION, PIL.__version__, str(root.resolve()), size, channels]).encode())
    for picture in pictures:
        try:
            status = os.stat(root / picture.path)
            state = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]  # ctime: of its permissions too
        except OSError:
            state = []
        digest.update(json.dumps([picture.path, state]).encode())
    return digest.hexdigest()[:32]


def _read_about(about_path: Path, bytes_path: Path) -> _About | None:
    """What an earlier run has left, if it is whole."""
    try:
        about = json.loads(about_path.read_bytes())
        count, height, width, channels = about["shape"]
        whole = bytes_path.stat().st_size == count * height * width * channels
        return _About((count, height, width, channels), about["skipped"]) if whole else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _decode(
    root: Path,
    pictures: list[_Picture],
    size: tuple[int, int] | None,
    channels: int | None,
    strict: bool,
    file: BinaryIO,
) -> _About:
    """Write the pictures' bytes into a file, [N, H, W, C].

    Where size or channels are None, it begins with what holds if all pictures are alike, of one size and grayscale, and
    starts again when one is not.
    """
    shared = size is None
    mode = _MODES[channels or 1]
    skipped: dict[str, str] = {}
    count = 0
    again = True
    while again:
        again, count = False, 0
        file.seek(0)
        file.truncate()
        for picture in pictures:
            if picture.path in skipped:
                continue
            try:
                image = read_picture(root / picture.path)
            except Exception as error:  # Pillow's decoders raise errors of many kinds
                skipped[picture.path] = _reason(error)
                if strict:
                    raise _strict_error(root, [SkippedFile(picture.path, skipped[picture.path])]) from error
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
        raise ValueError(_no_picture(root, skipped))
    return _About((count, *size, 1 if mode == "L" else 3), skipped)


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.partition("\n")[0] or type(error).__name__


def _no_picture(root: Path, skipped: dict[str, str]) -> str:
    if not skipped:
        return f"{root} has no picture: no file whose name ends in {', '.join(_SUFFIXES)}"
    path, reason = next(iter(skipped.items()))
    return f"{root} has no picture that can be read, of {len(skipped)} files; the first, {path}: {reason}"


def _strict_error(root: Path, skipped: list[SkippedFile]) -> ValueError:
    return ValueError(f"{root / skipped[0].path} cannot be read: {skipped[0].reason} (strict)")
