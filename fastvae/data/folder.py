"""A folder of pictures as a dataset. Each picture is decoded once, into one file that is then mapped into memory."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .dataset import MOST_PIXELS, ImageDataset, SkippedFile, tensor_of
from .decoded import MODES, decoded_once, strict_error
from .mnist import default_data_dir
from .pictures import picture_endings, require_pillow

_SETS = ("train", "test")
_TENTH = bytes([26])  # of the first bytes of hashes, 26 of 256 are below it
_RUN = {"metrics.csv", "checkpoint.pt"}  # in the folder of a run, whose pictures are not meant to be trained on
_HIDDEN = ("desktop.ini", "thumbs.db")  # by Windows, as names that begin with a dot are elsewhere


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
    """The pictures in a folder and its sub-folders, of any size, as uint8 [N, C, H, W].

    A picture is a file whose name has an ending of a format that Pillow reads: .png, .jpg, .bmp, .tif, .gif, .webp and
    more. If a file has several frames or pages, the first is read. If the folder has sub-folders "train" and "test",
    these are the two sets, and everything else in the folder is ignored. Otherwise about a tenth of the pictures, at
    least one, is the test set. The set of a picture depends only on the hash of its path below the folder, so adding
    files does not move other pictures between the sets. Pictures are sorted by the same hash within a set, so that the
    first N pictures come from all classes. The classes are the sub-folders at the first level (of "train" and "test" if
    these are the sets), numbered in sorted order. A set with a picture outside of such sub-folders has no labels.

    Pictures are cropped at the edges to the aspect ratio of ``image_size`` and resized to it (see
    `fastvae.data.pictures`). ``image_size`` is N for N x N pixels, or (height, width). None means the size of the
    pictures if all have the same size of at most 128, else 64. ``channels`` is 1 for grayscale and 3 for RGB. None
    means grayscale if all pictures are grayscale, else RGB. For pictures as a model was trained on pass
    ``image_size=model.image_shape[1:], channels=model.image_shape[0]``.

    Pictures are decoded one by one into a file in ``cache_dir`` (default: ``default_data_dir("folders")``), which is
    mapped into memory. Later calls use the file again as long as no picture is changed, added or removed. You may
    delete it at any time. Its checksum is compared in each call, and a damaged file is written again.

    ``skipped`` names every file that is not read: damaged pictures, and files with any other ending. With ``strict``
    such a file raises ``ValueError``. Hidden files (names that begin with a dot, desktop.ini, Thumbs.db) and the
    folders of train.py's runs are ignored. Links are followed, each folder once.

    Raises ``ValueError`` if one of the sets would be empty, or image_size or channels have another value, ``OSError``
    if the folder cannot be read or cache_dir cannot be written, and ``ImportError`` if Pillow is missing.
    """
    require_pillow()
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"image_size must be a positive number of pixels or two, (height, width), got {image_size}")
    if size is not None and math.prod(size) > MOST_PIXELS:
        raise ValueError(f"image_size must be of at most {MOST_PIXELS:,} pixels, got {size[0]} x {size[1]}")
    if channels not in (None, *MODES):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    root = Path(path).expanduser()
    if not root.is_dir():
        root.stat()  # names what is absent
        raise NotADirectoryError(f"{root} is no folder")
    sets = _sets(root)
    pictures, skipped = _find_pictures(root, sets)
    if not pictures:
        raise ValueError(
            f"{root} has no picture: none of its {len(skipped):,} files is named like one, .png for example"
        )
    if strict and skipped:
        raise strict_error(root, skipped[0])
    folder = default_data_dir("folders") if cache_dir is None else Path(cache_dir).expanduser()
    paths = [picture.path for picture in pictures]
    bytes_path, decoded = decoded_once(folder, root, paths, size, channels, strict)
    damaged = [SkippedFile(*item) for item in decoded.skipped.items()]
    if strict and damaged:
        raise strict_error(root, damaged[0])
    mapped = np.memmap(bytes_path, np.uint8, mode="r", shape=decoded.shape)
    images = tensor_of(mapped).permute(0, 3, 1, 2)
    readable = [picture for picture in pictures if picture.path not in decoded.skipped]
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
        (*damaged, *skipped),
    )


def _sets(root: Path) -> list[str]:
    """The folders of the two sets, or none."""
    sets = [name for name in _SETS if (root / name).is_dir()]
    if len(sets) == 1:
        raise ValueError(f'{root} has a folder "{sets[0]}", expected both "train" and "test", or neither')
    return sets


def has_pictures(root: Path) -> bool:
    """Whether a file below the folder has the name of a picture that `load_folder` reads.

    Raises ``ImportError`` if Pillow is missing.
    """
    require_pillow()
    return any(_is_picture(name) for _, name in _files(root, []))


def _find_pictures(root: Path, sets: list[str]) -> tuple[list[_Picture], list[SkippedFile]]:
    """The pictures that are to be read, in their order, and the folders and files that are not."""
    errors: list[OSError] = []
    pictures, others = [], []
    for top in sets or ["."]:
        for folder, name in _files(root / top, errors):
            inner = PurePosixPath((folder / name).relative_to(root / top).as_posix())
            path = str(PurePosixPath(top) / inner)
            if not _is_picture(name):
                ending = folder.joinpath(name).suffix
                reason = f"{ending} is no ending of" if ending else "its name has no ending of"
                others.append(SkippedFile(path, f"{reason} a picture that Pillow reads"))
                continue
            order = hashlib.sha256(os.fsencode(str(inner))).digest()
            label = inner.parts[0] if len(inner.parts) > 1 else None
            in_test = top == "test" if sets else order < _TENTH
            pictures.append(_Picture(path, label, in_test, order))
    if errors and not pictures:
        raise errors[0]
    pictures.sort(key=lambda picture: (not picture.in_test, picture.order, picture.path))
    unread = [SkippedFile(_below(root, error.filename), error.strerror or str(error)) for error in errors]
    return pictures, unread + sorted(others)


def _files(top: Path, errors: list[OSError]) -> Iterator[tuple[Path, str]]:
    """The folder and the name of each file below ``top`` that is not hidden; what cannot be read goes into errors."""
    seen = set()
    for folder, folders, names in os.walk(top, onerror=errors.append, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen or (Path(folder) != top and _RUN.issubset(names)):
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from ((Path(folder), name) for name in names if not name.startswith(".") and name.lower() not in _HIDDEN)


def _is_picture(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in picture_endings()


def _below(root: Path, path: str) -> str:
    return Path(path).relative_to(root).as_posix()


def _labels(pictures: list[_Picture], class_names: list[str]) -> Tensor | None:
    if any(picture.label is None for picture in pictures):
        return None
    numbers: dict[str | None, int] = {name: number for number, name in enumerate(class_names)}
    return torch.tensor([numbers[picture.label] for picture in pictures], dtype=torch.int64)
