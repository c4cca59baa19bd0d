"""The dataset that every loader returns."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor

from .standardisation import Standardisation

MOST_PIXELS = 1 << 26  # of an image, 8192 x 8192: a larger one is a mistake, and what is made of it fills the memory


class SkippedFile(NamedTuple):
    """A file that could not be read: its path below the given folder, and the reason."""

    path: str
    reason: str


class ImageDataset(NamedTuple):
    """Images are uint8 [N, C, H, W], 0..255. Labels are int64 [N], or None if there are none. All tensors are on the
    CPU.

    Images may be mapped from a file: parts that are not used take no memory, and you must not write to them.
    class_names: the names of the labels 0, 1, ..., if classes have names. skipped: the files that were left out.

    For a table or signals, train_images and test_images are float32, [N, F] or [N, C, 1, L], and standardised.
    standardisation: the means and scales of the training set. columns: the names of the columns, if they have names.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor | None
    test_images: Tensor
    test_labels: Tensor | None
    class_names: tuple[str, ...] = ()
    skipped: tuple[SkippedFile, ...] = ()
    standardisation: Standardisation | None = None
    columns: tuple[str, ...] = ()

    @property
    def has_pictures(self) -> bool:
        """Whether the samples can be shown as pictures."""
        return self.standardisation is None

    def of_classes(self, labels: Sequence[int]) -> ImageDataset:
        """The samples with one of these labels, in both sets.

        Raises ``ValueError`` if there are no labels, or if a set has no sample with one of them.
        """
        parts: dict[str, Any] = {}
        for name in ("train", "test"):
            images, numbers = getattr(self, f"{name}_images"), getattr(self, f"{name}_labels")
            if numbers is None:
                raise ValueError(f"labels were chosen, and {self.name} has none")
            chosen = torch.isin(numbers, torch.tensor(labels))
            if not chosen.any():
                found = ", ".join(map(str, numbers.unique().tolist()[:20]))
                raise ValueError(f"labels must be some of the {name} set's, {found}, got {', '.join(map(str, labels))}")
            parts[f"{name}_images"], parts[f"{name}_labels"] = images[chosen], numbers[chosen]
        return self._replace(**parts)


def tensor_of(array: NDArray[Any]) -> Tensor:
    """A tensor that shares the array's memory, which may be a file mapped for reading only."""
    with warnings.catch_warnings():
        # A mapping that can be written to is refused where the file is larger than the memory.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)
