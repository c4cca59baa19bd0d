"""Tables and signals. Their numbers may be of any size and are standardised. They are not shown as pictures."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arrays import Part, first_of_test, labels_of
from .csv_files import csv_parts
from .dataset import ImageDataset
from .numpy_files import numpy_parts
from .standardisation import Standardisation


def load_table(path: str | os.PathLike[str], *, standardisation: Standardisation | None = None) -> ImageDataset:
    """Load a table of numbers with a row for each sample, as float32 [N, F]. Each column is standardised.

    ``path`` is a .csv, .npy or .npz file, a folder with train.csv and perhaps test.csv, a folder with one .csv file, or
    a folder with arrays [N, F] that are named as for `load_npy`. Without a test set, the last tenth of the rows, at
    least one, becomes the test set. Shuffle sorted rows first.

    A .csv file is separated by commas, semicolons or tabs. It may begin with a line of names, none of which is a
    number. A column named "label" or "class" holds the labels, which may be texts. Every other cell must be a finite
    number.

    ``standardisation``: the standardisation of a model's training set, for data of that model. None means the
    standardisation of this training set. The dataset has the attributes ``standardisation`` and ``columns``.

    Raises ``ValueError``, which names the file, line and column, for any other content, and ``OSError``.
    """
    path = Path(path).expanduser()
    found = csv_parts(path)
    if found is None:
        train, test = numpy_parts(path)
        return _numbers("table", train, test, _rows, standardisation)
    return _numbers("table", found.train, found.test, _rows, standardisation, found.columns, found.class_names)


def load_signals(path: str | os.PathLike[str], *, standardisation: Standardisation | None = None) -> ImageDataset:
    """Load signals as float32 [N, C, 1, L], with C channels of L values. Each channel is standardised. They are images
    of height 1, so `fastvae.models.ConvVAE` takes them.

    ``path`` is a .npy or .npz file, or a folder, as for `load_npy`. Arrays are [N, L], [N, L, C] or [N, C, L]; the
    longer of the two dimensions is the length. Test set and standardisation are as in `load_table`.

    Raises ``ValueError``, which names the file, for any other content, and ``OSError``.
    """
    train, test = numpy_parts(Path(path).expanduser())
    return _numbers("signal", train, test, _channels, standardisation)


def _numbers(
    name: str,
    train: Part,
    test: Part | None,
    brought: Callable[[Part], NDArray[Any]],
    standardisation: Standardisation | None,
    columns: tuple[str, ...] = (),
    class_names: tuple[str, ...] = (),
) -> ImageDataset:
    values, labels = brought(train), labels_of(train)
    if test is not None:
        test_values, test_labels = brought(test), labels_of(test)
        if test_values.shape[1:] != values.shape[1:]:
            raise ValueError(
                f"{test.images_source} has samples of shape {list(test_values.shape[1:])}, expected "
                f"{list(values.shape[1:])}, as in {train.images_source}"
            )
    else:
        first = first_of_test(train)
        values, test_values = values[:first], values[first:]
        labels, test_labels = (None, None) if labels is None else (labels[:first], labels[first:])
    if standardisation is None:
        standardisation = Standardisation.of(values)
    elif len(standardisation.mean) != values.shape[1]:
        raise ValueError(
            f"{train.images_source} has {values.shape[1]} columns or channels, expected {len(standardisation.mean)}, "
            "those that the standardisation is of"
        )
    return ImageDataset(
        name,
        standardisation.apply(values),
        labels,
        standardisation.apply(test_values),
        test_labels,
        class_names,
        standardisation=standardisation,
        columns=columns,
    )


def _rows(part: Part) -> NDArray[Any]:
    array = _finite(part)
    if array.ndim != 2:
        raise ValueError(f"{part.images_source} has shape {list(array.shape)}, expected [N, F], a row for each sample")
    return array


def _channels(part: Part) -> NDArray[Any]:
    """[N, C, 1, L]"""
    array, shape = _finite(part), list(part.images.shape)
    if array.ndim == 2:
        return array[:, None, None, :]
    if array.ndim != 3:
        raise ValueError(f"{part.images_source} has shape {shape}, expected [N, L], [N, L, C] or [N, C, L]")
    if shape[1] == shape[2]:
        raise ValueError(
            f"{part.images_source} has shape {shape}, which is ambiguous: both [N, L, C] and [N, C, L] fit"
        )
    return array.transpose(0, 2, 1)[:, :, None, :] if shape[1] > shape[2] else array[:, :, None, :]


def _finite(part: Part) -> NDArray[Any]:
    array, source = part.images, part.images_source
    if 0 in array.shape:
        raise ValueError(
            f"{source} has shape {list(array.shape)}, expected at least one sample with at least one number"
        )
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{source} has dtype {array.dtype}, expected numbers")
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        place = ", ".join(map(str, bad[0]))
        raise ValueError(f"{source} has {array[tuple(bad[0])]} at [{place}], expected finite numbers")
    return array.astype(np.float64)
