"""Images in NumPy's files, .npy and .npz."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import Part, dataset_of
from .dataset import ImageDataset

# What arrays may be called: the images and labels of the training set, and those of the test set.
_NAMES = (
    (("train_images", "train_labels"), ("test_images", "test_labels")),
    (("x_train", "y_train"), ("x_test", "y_test")),
    (("images", "labels"), None),
)


def load_npy(path: str | os.PathLike[str]) -> ImageDataset:
    """Load images from .npy files. ``path`` is one such file, or a folder of files with one of these sets of names.

    - train_images.npy, train_labels.npy, test_images.npy, test_labels.npy
    - x_train.npy, y_train.npy, x_test.npy, y_test.npy
    - images.npy, labels.npy

    Only the first file of each set is needed. Without a test set, the last tenth of the images, at least one, becomes
    the test set. Shuffle images that are sorted by class first. Images are [N, H, W], [N, C, H, W] or [N, H, W, C],
    with C = 1 or 3. uint8 files in row-major order are mapped, not read, so a file may be larger than the memory.
    Floats must lie in [0, 1]. They are rounded to 256 levels in memory, with an error of at most 1/510. Labels are
    integers, [N] or [N, 1].

    Raises ``ValueError``, which names the file, for any other content, such as objects (pickles), and ``OSError``.
    """
    return dataset_of("npy", *npy_parts(Path(path).expanduser()))


def load_npz(path: str | os.PathLike[str]) -> ImageDataset:
    """Load images from an .npz file. ``path`` is this file, or a folder with one such file.

    The arrays have the names of `load_npy`'s files without ".npy", and the same shapes and types. They are read into
    memory. Raises the errors of `load_npy`.
    """
    return dataset_of("npz", *npz_parts(Path(path).expanduser()))


def numpy_parts(path: Path) -> tuple[Part, Part | None]:
    """The arrays of the training set and of the test set, if there is one, in .npy or .npz files."""
    npz = path.suffix == ".npz" if path.is_file() else not any(path.glob("*.npy"))
    return npz_parts(path) if npz else npy_parts(path)


def npy_parts(path: Path) -> tuple[Part, Part | None]:
    """`numpy_parts` of .npy files."""
    if not path.is_dir():
        return Part(_read_npy(path), str(path)), None
    files = {file.stem: file for file in path.glob("*.npy")}
    return _named(path, files, lambda name: _read_npy(files[name]), lambda name: str(files[name]))


def npz_parts(path: Path) -> tuple[Part, Part | None]:
    """`numpy_parts` of an .npz file."""
    if path.is_dir():
        files = sorted(path.glob("*.npz"))
        if len(files) != 1:
            raise ValueError(f"{path} has {len(files)} files that end in .npz, expected one, or name the file itself")
        (path,) = files
    with _reading(path, ".npz"):
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array, as .npy files do")

    def read(name: str) -> NDArray[Any]:
        with _reading(path, ".npz"):
            array: NDArray[Any] = archive[name]
        return array

    with archive:
        return _named(path, archive.files, read, lambda name: f"{name} in {path}")


def _named(
    path: Path,
    names: Collection[str],
    read: Callable[[str], NDArray[Any]],
    source: Callable[[str], str],
) -> tuple[Part, Part | None]:
    def part(images: str, labels: str) -> Part:
        if labels not in names:
            return Part(read(images), source(images))
        return Part(read(images), source(images), read(labels), source(labels))

    for train, test in _NAMES:
        if train[0] in names:
            return part(*train), part(*test) if test is not None and test[0] in names else None
    expected = " or ".join(train[0] for train, _ in _NAMES)
    raise ValueError(f"{path} has arrays named {', '.join(sorted(names)[:10]) or 'nothing'}, expected {expected}")


def _read_npy(path: Path) -> NDArray[Any]:
    with _reading(path, ".npy"), np.errstate(over="raise"):  # of the file's size, from the shape in its header
        return np.lib.format.open_memmap(path, mode="r")


@contextmanager
def _reading(path: Path, suffix: str) -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # NumPy and zipfile raise errors of many kinds
        raise ValueError(f"{path} cannot be read as {suffix}: {str(error) or type(error).__name__}") from error
