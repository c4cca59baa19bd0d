"""What every loader of images returns."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

MOST_PIXELS = 1 << 26  # of an image, 8192 x 8192: a larger one is a mistake, and what is made of it fills the memory


class SkippedFile(NamedTuple):
    """A file that could not be read: its path below the folder that was given, and why."""

    path: str
    reason: str


class ImageDataset(NamedTuple):
    """Images uint8 [N, C, H, W], 0..255; labels int64 [N], or None where there are none. All on the CPU.

    Images may lie in a file that is mapped into memory: what is not used takes none, and they must not be written to.
    class_names: of the labels 0, 1, ..., where classes have names. skipped: the files that were left out.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor | None
    test_images: Tensor
    test_labels: Tensor | None
    class_names: tuple[str, ...] = ()
    skipped: tuple[SkippedFile, ...] = ()


def tensor_of(array: NDArray[Any]) -> Tensor:
    """A tensor that shares the array's memory, which may be a file mapped for reading only."""
    with warnings.catch_warnings():
        # A mapping that can be written to is refused where the file is larger than the memory.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)
