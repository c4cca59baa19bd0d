"""Datasets by name."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from .dataset import ImageDataset
from .digits import load_digits
from .folder import has_pictures, load_folder
from .idx_pair import holds_images, load_idx
from .mnist import load_fashion_mnist, load_kmnist, load_mnist
from .numpy_files import load_npy, load_npz

_PUBLISHED: dict[str, Callable[[str | os.PathLike[str] | None], ImageDataset]] = {
    "mnist": load_mnist,
    "fashion-mnist": load_fashion_mnist,
    "kmnist": load_kmnist,
}
_ARRAYS: dict[str, Callable[[str | os.PathLike[str]], ImageDataset]] = {
    "npy": load_npy,
    "npz": load_npz,
    "idx": load_idx,
}

OWN_DATASETS = ("folder", *_ARRAYS)
DATASETS = (*_PUBLISHED, "digits", *OWN_DATASETS)

# What files of arrays begin with.
_FIRST_BYTES = {b"\x93NUMPY": "npy", b"PK": "npz", b"\x1f\x8b": "idx", b"\0\0\x08": "idx"}


def find_dataset(data_dir: str | os.PathLike[str]) -> str:
    """Which of ``OWN_DATASETS`` lies in ``data_dir``, a folder or a file: the name that `load_dataset` wants.

    A file is known by its first bytes. A folder is known by its .npy, .npz or IDX files, or by the pictures in it and
    its sub-folders.

    Raises ``ValueError``, saying what was found, where it is none of these or several, ``OSError`` where it cannot be
    read, and ``ImportError`` where Pillow is missing.
    """
    path = Path(data_dir).expanduser()
    if path.is_file():
        with path.open("rb") as file:
            first = file.read(max(map(len, _FIRST_BYTES)))
        for begins, kind in _FIRST_BYTES.items():
            if first.startswith(begins):
                return kind
        raise ValueError(f"{path} begins with {first!r}, expected a .npy, .npz or IDX file, or a folder of pictures")
    names = [item.name for item in path.iterdir() if item.is_file()]
    kinds = {
        "npy": any(name.endswith(".npy") for name in names),
        "npz": any(name.endswith(".npz") for name in names),
        "idx": any(map(holds_images, names)),
        "folder": has_pictures(path),
    }
    found = [kind for kind, there in kinds.items() if there]
    if len(found) > 1:
        raise ValueError(f"{path} has data of several kinds, {', '.join(found)}: name the one that is meant")
    if not found:
        raise ValueError(f"{path} has no images: expected pictures, or arrays in .npy, .npz or IDX files")
    return found[0]


def load_dataset(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    strict: bool = False,
) -> ImageDataset:
    """The dataset of that name, one of ``DATASETS``.

    - "mnist", "fashion-mnist", "kmnist": from ``data_dir``, or downloaded into it; see `load_mnist`.
    - "digits": scikit-learn's, without a data_dir; see `load_digits`.
    - "folder": the pictures in ``data_dir``; see `load_folder`.
    - "npy", "npz", "idx": the arrays in ``data_dir``, a folder or a file; see `load_npy`, `load_npz`, `load_idx`.

    ``image_size``, in pixels, and ``channels`` are for "folder". ``strict``: what cannot be read raises instead of
    being skipped, as it always does where images are not files of their own.

    Raises ``ValueError`` for another name, without a data_dir that is needed or with one that is not, and for
    image_size or channels with another dataset than "folder", and what the functions raise.
    """
    if name not in DATASETS:
        raise ValueError(f"name must be one of {', '.join(DATASETS)}, got {name!r}")
    for argument, value in (("image_size", image_size), ("channels", channels)):
        if value is not None and name != "folder":
            raise ValueError(f'{argument} is for the dataset "folder" alone, got {value} for "{name}"')
    if name in _PUBLISHED:
        return _PUBLISHED[name](data_dir)
    if name == "digits":
        if data_dir is not None:
            raise ValueError(f'the dataset "digits" comes with scikit-learn, without files in data_dir, got {data_dir}')
        return load_digits()
    if data_dir is None:
        raise ValueError(f'the dataset "{name}" needs data_dir, where its files are')
    if name == "folder":
        return load_folder(data_dir, image_size=image_size, channels=channels, strict=strict)
    return _ARRAYS[name](data_dir)
