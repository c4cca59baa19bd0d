"""Datasets by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from .csv_files import ENDINGS
from .dataset import ImageDataset
from .digits import load_digits
from .folder import has_pictures, load_folder
from .idx_pair import holds_images, load_idx
from .mnist import load_fashion_mnist, load_kmnist, load_mnist
from .numbers import load_signals, load_table
from .numpy_files import load_npy, load_npz, npy_parts
from .standardisation import Standardisation

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

_NUMBERS: dict[str, Callable[..., ImageDataset]] = {"table": load_table, "signal": load_signals}

OWN_DATASETS = ("folder", *_ARRAYS, *_NUMBERS)
DATASETS = (*_PUBLISHED, "digits", *OWN_DATASETS)

# What files of arrays begin with.
_FIRST_BYTES = {b"\x93NUMPY": "npy", b"PK": "npz", b"\x1f\x8b": "idx", b"\0\0\x08": "idx"}


def find_dataset(data_dir: str | os.PathLike[str]) -> str:
    """The kind of data in ``data_dir``, a folder or a file: one of ``OWN_DATASETS``, as a name for `load_dataset`.

    A file is recognised by its first bytes, or by a name that ends in .csv. A folder is recognised by its .npy, .npz or
    IDX files, or by the pictures in it and in its sub-folders, or else by its .csv files. Arrays with two dimensions
    are a table. Signals cannot be distinguished from images.

    Raises ``ValueError``, which names what was found, if it is none of these or several of them, ``OSError`` if it
    cannot be read, and ``ImportError`` if Pillow is missing.
    """
    path = Path(data_dir).expanduser()
    if path.is_file():
        if path.suffix.lower() in ENDINGS:
            return "table"
        with path.open("rb") as file:
            first = file.read(max(map(len, _FIRST_BYTES)))
        for begins, kind in _FIRST_BYTES.items():
            if first.startswith(begins):
                return "table" if kind == "npy" and _is_table(path) else kind
        raise ValueError(
            f"{path} begins with {first!r}, expected a .npy, .npz, IDX or .csv file, or a folder of pictures"
        )
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
    if not found and any(name.lower().endswith(ENDINGS) for name in names):
        return "table"
    if not found:
        raise ValueError(f"{path} has no images: expected pictures, or arrays in .npy, .npz, IDX or .csv files")
    return "table" if found == ["npy"] and _is_table(path) else found[0]


def _is_table(path: Path) -> bool:
    """Whether .npy files hold an array of two dimensions; what is wrong with them is the loader's to say."""
    try:
        return npy_parts(path)[0].images.ndim == 2
    except ValueError:
        return False


def load_dataset(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    strict: bool = False,
    labels: Sequence[int] | None = None,
    standardisation: Standardisation | None = None,
) -> ImageDataset:
    """Load the dataset with this name, one of ``DATASETS``.

    - "mnist", "fashion-mnist", "kmnist": from ``data_dir``, or downloaded into it; see `load_mnist`.
    - "digits": scikit-learn's digits, without a data_dir; see `load_digits`.
    - "folder": the pictures in ``data_dir``; see `load_folder`.
    - "npy", "npz", "idx": the arrays in ``data_dir``, a folder or a file; see `load_npy`, `load_npz`, `load_idx`.
    - "table", "signal": numbers in ``data_dir``, a folder or a file; see `load_table`, `load_signals`.

    ``image_size``, in pixels, and ``channels`` are for "folder". ``strict``: a picture that cannot be read raises an
    error instead of being skipped. (Other files always raise an error.) ``labels``: only the samples with these labels
    (`ImageDataset.of_classes`). ``standardisation``: for "table" and "signal", the standardisation of a model's
    training set.

    Raises ``ValueError`` for another name, for a data_dir that is missing or not needed, for image_size or channels
    with another dataset than "folder", and for a standardisation of images. It also raises the errors of the functions.
    """
    if name not in DATASETS:
        raise ValueError(f"name must be one of {', '.join(DATASETS)}, got {name!r}")
    for argument, value in (("image_size", image_size), ("channels", channels)):
        if value is not None and name != "folder":
            raise ValueError(f'{argument} is for the dataset "folder" alone, got {value} for "{name}"')
    if standardisation is not None and name not in _NUMBERS:
        raise ValueError(f'standardisation is for the datasets {", ".join(_NUMBERS)} alone, got one for "{name}"')
    if name in _PUBLISHED:
        dataset = _PUBLISHED[name](data_dir)
    elif name == "digits":
        if data_dir is not None:
            raise ValueError(f'the dataset "digits" comes with scikit-learn, without files in data_dir, got {data_dir}')
        dataset = load_digits()
    elif data_dir is None:
        raise ValueError(f'the dataset "{name}" needs data_dir, where its files are')
    elif name == "folder":
        dataset = load_folder(data_dir, image_size=image_size, channels=channels, strict=strict)
    elif name in _NUMBERS:
        dataset = _NUMBERS[name](data_dir, standardisation=standardisation)
    else:
        dataset = _ARRAYS[name](data_dir)
    return dataset if labels is None else dataset.of_classes(labels)
