"""Datasets by name."""

from __future__ import annotations

import os
from collections.abc import Callable

from .dataset import ImageDataset
from .digits import load_digits
from .folder import load_folder
from .idx_pair import load_idx
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
    - "digits": scikit-learn's; see `load_digits`.
    - "folder": the pictures in ``data_dir``; see `load_folder`.
    - "npy", "npz", "idx": the arrays in ``data_dir``, a folder or a file; see `load_npy`, `load_npz`, `load_idx`.

    ``image_size``, in pixels, and ``channels`` are for "folder". ``strict``: what cannot be read raises instead of
    being skipped, as it always does where images are not files of their own.

    Raises ``ValueError`` for another name, without a data_dir that is needed, and for image_size or channels with
    another dataset than "folder", and what the functions raise.
    """
    if name not in DATASETS:
        raise ValueError(f"name must be one of {', '.join(DATASETS)}, got {name!r}")
    for argument, value in (("image_size", image_size), ("channels", channels)):
        if value is not None and name != "folder":
            raise ValueError(f'{argument} is for the dataset "folder" alone, got {value} for "{name}"')
    if name in _PUBLISHED:
        return _PUBLISHED[name](data_dir)
    if name == "digits":
        return load_digits()
    if data_dir is None:
        raise ValueError(f'the dataset "{name}" needs data_dir, where its files are')
    if name == "folder":
        return load_folder(data_dir, image_size=image_size, channels=channels, strict=strict)
    return _ARRAYS[name](data_dir)
