"""Convert arrays of images and labels, from any kind of file, to an `ImageDataset`."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .dataset import MOST_PIXELS, ImageDataset, tensor_of

_CHANNELS = (1, 3)
_CHUNK_BYTES = 16 << 20


class Part(NamedTuple):
    """The arrays of a training or a test set, each with its name in error messages."""

    images: NDArray[Any]
    images_source: str
    labels: NDArray[Any] | None = None
    labels_source: str = ""


def dataset_of(name: str, train: Part, test: Part | None) -> ImageDataset:
    """A dataset of arrays. Without a test set, the last tenth of the images, at least one, becomes the test set.

    Images are [N, H, W], [N, C, H, W] or [N, H, W, C], with C = 1 or 3. Bytes are used unchanged, without a copy if
    they are in row-major order. Floats must lie in [0, 1]. They are rounded to 256 levels, round(255 x), in memory,
    with an error of at most 1/510. Labels are integers below 2^63, [N] or [N, 1].

    Raises ``ValueError``, which names the source, for any other array, for images above 8192 x 8192 pixels, for fewer
    than two images without a test set, and for a test set whose images have another shape.
    """
    train_images, train_labels = _images(train), labels_of(train)
    if test is not None:
        test_images, test_labels = _images(test), labels_of(test)
        if train_images.shape[1:] != test_images.shape[1:]:
            raise ValueError(
                f"{test.images_source} has images of shape {list(test_images.shape[1:])}, expected "
                f"{list(train_images.shape[1:])}, the shape of those in {train.images_source}"
            )
        return ImageDataset(name, train_images, train_labels, test_images, test_labels)
    first = first_of_test(train)
    labels = (None, None) if train_labels is None else (train_labels[:first], train_labels[first:])
    return ImageDataset(name, train_images[:first], labels[0], train_images[first:], labels[1])


def first_of_test(train: Part) -> int:
    """The index at which the last tenth begins, which becomes the test set if there is none. Raises ``ValueError``."""
    count = len(train.images)
    if count < 2:
        raise ValueError(f"{train.images_source} has {count} image, expected two or more: one is kept for the test set")
    return count - max(1, count // 10)


def _images(part: Part) -> Tensor:
    array, source = part.images, part.images_source
    shape = list(array.shape)
    if 0 in shape:
        raise ValueError(f"{source} has shape {shape}, expected at least one image with at least one pixel")
    # The last size of three is a width; of one colour image it would be the number of its channels.
    channels_first = array.ndim == 4 and shape[1] in _CHANNELS
    channels_last = array.ndim == 4 and shape[3] in _CHANNELS
    if channels_first and channels_last:
        raise ValueError(f"{source} has shape {shape}, which is ambiguous: both [N, C, H, W] and [N, H, W, C] fit")
    if not (channels_first or channels_last or (array.ndim == 3 and shape[2] not in _CHANNELS)):
        raise ValueError(f"{source} has shape {shape}, expected [N, H, W], or [N, C, H, W] or [N, H, W, C], C 1 or 3")
    pixels = math.prod(shape[1:]) // (1 if array.ndim == 3 else shape[1] if channels_first else shape[3])
    if pixels > MOST_PIXELS:
        raise ValueError(f"{source} has shape {shape}: {pixels:,} pixels an image, expected at most {MOST_PIXELS:,}")
    images = tensor_of(_bytes(array, source))
    if array.ndim == 3:
        return images.unsqueeze(1)
    return images.permute(0, 3, 1, 2) if channels_last else images


def _bytes(array: NDArray[Any], source: str) -> NDArray[np.uint8]:
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype.kind != "f":
        raise ValueError(f"{source} has dtype {array.dtype}, expected uint8, or floats in [0, 1]")
    result = np.empty(array.shape, np.uint8)
    rows = max(1, _CHUNK_BYTES // max(1, array[0].nbytes))
    for first in range(0, len(array), rows):
        chunk = np.asarray(array[first : first + rows], np.float64)
        low, high = chunk.min(), chunk.max()
        if not (low >= 0 and high <= 1):  # NaN is neither
            raise ValueError(f"{source} has floats from {low:g} to {high:g}, expected floats in [0, 1], or uint8")
        result[first : first + rows] = np.rint(255 * chunk)
    return result


def labels_of(part: Part) -> Tensor | None:
    """The labels, int64 [N], or None if there are none. Raises ``ValueError``."""
    array, source = part.labels, part.labels_source
    if array is None:
        return None
    count = len(part.images)
    if array.shape not in ((count,), (count, 1)):
        raise ValueError(f"{source} has shape {list(array.shape)}, expected [{count}], a label for each image")
    if array.dtype.kind not in "iu":
        raise ValueError(f"{source} has dtype {array.dtype}, expected integers")
    largest = int(array.max())
    if largest >= 2**63:  # of uint64
        raise ValueError(f"{source} has the label {largest}, expected integers below 2^63")
    return torch.from_numpy(array.reshape(count).astype(np.int64))
