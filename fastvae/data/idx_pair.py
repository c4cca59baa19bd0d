"""Images and labels in IDX files of any name and size."""

from __future__ import annotations

import os
from pathlib import Path

from .arrays import Part, dataset_of
from .dataset import ImageDataset
from .idx import read_idx

_TEST_WORDS = ("test", "t10k")


def load_idx(path: str | os.PathLike[str]) -> ImageDataset:
    """Load images, and labels if there are any, from IDX files (MNIST's format) of any name and size, packed by gzip or
    not.

    ``path`` is a folder with one training set and at most one test set. The names of its image files contain "images"
    and "idx", and for the test set also "test" or "t10k". Or ``path`` is the file of the training images. The test
    images are then in the file of the same name with "train" replaced by "test" or "t10k", if it exists. The labels of
    images are in the file of the same name with "images" replaced by "labels" and "idx3" by "idx1", if it exists.

    Without a test set, the last tenth of the images, at least one, becomes the test set. Shuffle images that are sorted
    by class first. Images are [N, H, W], [N, C, H, W] or [N, H, W, C], with C = 1 or 3. They are read into memory.

    Raises ``ValueError``, which names the file, for any other content, and ``OSError``.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        train, test = _in_folder(path)
    else:
        train = path
        names = [path.name.replace("train", word) for word in _TEST_WORDS if "train" in path.name]
        test = next((found for name in names if (found := _find(path.parent, name)) is not None), None)
    return dataset_of("idx", _part(train), None if test is None else _part(test))


def holds_images(name: str) -> bool:
    """Whether this is the name of an IDX file of images."""
    return "images" in name and "idx" in name


def _in_folder(folder: Path) -> tuple[Path, Path | None]:
    # A file that is there packed and unpacked counts once.
    names = {_plain(path.name) for path in folder.iterdir() if path.is_file()}
    images = sorted(filter(holds_images, names))
    tests = [name for name in images if any(word in name for word in _TEST_WORDS)]
    trains = [name for name in images if name not in tests]
    if len(trains) != 1 or len(tests) > 1:
        raise ValueError(
            f"{folder} has {', '.join(images) or 'no such file'}, expected one file of training images and at most one "
            f'of test images: IDX files with "images" and "idx" in their names, and "test" or "t10k" for the test set '
            "(or name the file of the training images itself)"
        )
    train = _find(folder, trains[0])
    assert train is not None
    return train, _find(folder, tests[0]) if tests else None


def _part(path: Path) -> Part:
    images = read_idx(path)
    labels = None
    if "images" in path.name:
        labels = _find(path.parent, path.name.replace("images", "labels").replace("idx3", "idx1"))
    return Part(images, str(path)) if labels is None else Part(images, str(path), read_idx(labels), str(labels))


def _find(folder: Path, name: str) -> Path | None:
    candidates = (folder / f"{_plain(name)}.gz", folder / _plain(name))
    return next((path for path in candidates if path.is_file()), None)


def _plain(name: str) -> str:
    return name.removesuffix(".gz")
