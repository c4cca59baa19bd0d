"""Datasets by name."""

from __future__ import annotations

import os

from .digits import load_digits
from .mnist import ImageDataset, load_mnist


def load_dataset(name: str, data_dir: str | os.PathLike[str] | None = None) -> ImageDataset:
    """The dataset of that name: "mnist", from `data_dir` (see `load_mnist`), or "digits" (see `load_digits`).

    Raises ``ValueError`` for another name, and what the two functions raise.
    """
    if name == "mnist":
        return load_mnist(data_dir)
    if name == "digits":
        return load_digits()
    raise ValueError(f'name must be "mnist" or "digits", got {name!r}')
