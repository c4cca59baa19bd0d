"""MNIST and two datasets in its format. Their four published files are found on disk, or downloaded once and verified.

LeCun, Cortes, Burges, "The MNIST Database of Handwritten Digits". Xiao, Rasul, Vollgraf, "Fashion-MNIST: a Novel Image
Dataset for Benchmarking Machine Learning Algorithms", 2017. Clanuwat et al., "Deep Learning for Classical Japanese
Literature" (KMNIST), 2018.
"""

from __future__ import annotations

import hashlib
import http.client
import math
import os
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastvae.files import replacing

from .dataset import ImageDataset
from .idx import read_idx


class DownloadError(RuntimeError):
    """No mirror delivered a file. The message lists each mirror with the reason."""


class PublishedFile(NamedTuple):
    """A published file: the name of the unpacked file, the md5 of the packed ``name + ".gz"``, and the shape of its
    content.
    """

    name: str
    md5: str
    shape: tuple[int, ...]


def _published(train_images: str, train_labels: str, test_images: str, test_labels: str) -> dict[str, PublishedFile]:
    """A set's files by their md5."""
    return {
        "train_images": PublishedFile("train-images-idx3-ubyte", train_images, (60_000, 28, 28)),
        "train_labels": PublishedFile("train-labels-idx1-ubyte", train_labels, (60_000,)),
        "test_images": PublishedFile("t10k-images-idx3-ubyte", test_images, (10_000, 28, 28)),
        "test_labels": PublishedFile("t10k-labels-idx1-ubyte", test_labels, (10_000,)),
    }


MNIST_FILES = _published(
    "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "d53e105ee54ea40749a09fcbcd1e9432",
    "9fb629c4189551a2d022fa330f9573f3",
    "ec29112dd5afa0611ce80d1b7f02629c",
)
MNIST_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)

FASHION_MNIST_FILES = _published(
    "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "25c81989df183df01b3e8a0aad5dffbe",
    "bef4ecab320f06d8554ea6380940ec79",
    "bb300cfdad3c16e7a12a480ee83cd310",
)
FASHION_MNIST_MIRRORS = ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",)

KMNIST_FILES = _published(
    "bdb82020997e1d708af4cf47b453dcf7",
    "e144d726b3acfaa3e44228e80efcd344",
    "5c965bf0a639b31b8f53240b1b52f4d7",
    "7320c461ea6c1c855c0b718fb2a4b134",
)
KMNIST_MIRRORS = ("http://codh.rois.ac.jp/kmnist/dataset/kmnist/",)


def default_data_dir(name: str = "mnist") -> Path:
    """The folder ``name`` in ``$FASTVAE_DATA``, or in ``~/.cache/fastvae`` if that is unset or empty."""
    return Path(os.environ.get("FASTVAE_DATA") or "~/.cache/fastvae").expanduser() / name


def load_mnist(
    data_dir: str | os.PathLike[str] | None = None,
    *,
    download: bool = True,
    mirrors: Sequence[str] = MNIST_MIRRORS,
    timeout: float = 10.0,
) -> ImageDataset:
    """MNIST: 60,000 training and 10,000 test images, uint8 [N, 1, 28, 28], with int64 labels [N].

    The function looks for the four files in ``data_dir`` (default: ``default_data_dir()``), packed
    (``train-images-idx3-ubyte.gz``) or unpacked (``train-images-idx3-ubyte``, ``train-images.idx3-ubyte``). It checks
    their content, so repacked files are accepted. Absent files are downloaded into ``data_dir`` from the first of
    ``mirrors`` (base addresses) that delivers the published md5. ``timeout`` is in seconds, for each wait on the
    network.

    Raises ``ValueError`` for a malformed file, ``FileNotFoundError`` for absent files with ``download=False``,
    ``DownloadError`` when every mirror fails, ``OSError`` when the file cannot be written. A failed download leaves no
    file behind.
    """
    return _load("mnist", MNIST_FILES, data_dir, download, mirrors, timeout)


def load_fashion_mnist(
    data_dir: str | os.PathLike[str] | None = None,
    *,
    download: bool = True,
    mirrors: Sequence[str] = FASHION_MNIST_MIRRORS,
    timeout: float = 10.0,
) -> ImageDataset:
    """Fashion-MNIST: articles of clothing in ten classes, with the shapes and file names of MNIST; see `load_mnist`.

    The default ``data_dir`` is ``default_data_dir("fashion-mnist")``. Each dataset needs its own folder, because the
    names of the files are those of MNIST.
    """
    return _load("fashion-mnist", FASHION_MNIST_FILES, data_dir, download, mirrors, timeout)


def load_kmnist(
    data_dir: str | os.PathLike[str] | None = None,
    *,
    download: bool = True,
    mirrors: Sequence[str] = KMNIST_MIRRORS,
    timeout: float = 10.0,
) -> ImageDataset:
    """KMNIST: handwritten Japanese characters in ten classes, with the shapes and file names of MNIST; see
    `load_mnist`.

    The default ``data_dir`` is ``default_data_dir("kmnist")``. Each dataset needs its own folder, because the names of
    the files are those of MNIST.
    """
    return _load("kmnist", KMNIST_FILES, data_dir, download, mirrors, timeout)


def _load(
    name: str,
    files: Mapping[str, PublishedFile],
    data_dir: str | os.PathLike[str] | None,
    download: bool,
    mirrors: Sequence[str],
    timeout: float,
) -> ImageDataset:
    if isinstance(mirrors, str) or not mirrors:
        raise ValueError(f"mirrors must be a non-empty sequence of base addresses, got {mirrors!r}")
    if not timeout > 0:
        raise ValueError(f"timeout must be a positive number of seconds, got {timeout!r}")
    folder = default_data_dir(name) if data_dir is None else Path(data_dir).expanduser()
    found = {field: _find(folder, file.name) for field, file in files.items()}
    absent = [files[field].name for field, path in found.items() if path is None]
    if absent and not download:
        raise FileNotFoundError(f"{folder} lacks {', '.join(absent)} (packed or unpacked), and download=False")
    arrays = {
        field: read_idx(found[field] or _download(file, files, folder, mirrors, timeout), expected_shape=file.shape)
        for field, file in files.items()
    }
    return ImageDataset(
        name,
        _images(arrays["train_images"]),
        _labels(arrays["train_labels"]),
        _images(arrays["test_images"]),
        _labels(arrays["test_labels"]),
    )


def _images(array: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(array).unsqueeze(1)


def _labels(array: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(array).to(torch.int64)


def _find(folder: Path, name: str) -> Path | None:
    # Some unpackers write "train-images.idx3-ubyte".
    candidates = (folder / f"{name}.gz", folder / name, folder / name.replace("-idx", ".idx"))
    return next((path for path in candidates if path.is_file()), None)


def _download(
    file: PublishedFile, files: Mapping[str, PublishedFile], folder: Path, mirrors: Sequence[str], timeout: float
) -> Path:
    path = folder / f"{file.name}.gz"
    reasons = []
    for mirror in mirrors:
        address = f"{mirror.rstrip('/')}/{path.name}"
        try:
            with urllib.request.urlopen(address, timeout=timeout) as response:
                # A packed file is hardly larger than what it holds; a mirror may send anything.
                content: bytes = response.read(2 * math.prod(file.shape) + 1024)
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: an address urllib rejects
            reasons.append(f"{address}: {type(error).__name__}: {error}")
            continue
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if md5 != file.md5:
            reasons.append(f"{address}: md5 of the {len(content)} bytes received is {md5}, expected {file.md5}")
            continue
        # Outside the try above: a full disk is no fault of the mirror, and the next one would not help.
        folder.mkdir(parents=True, exist_ok=True)
        _write_atomically(path, content)
        return path
    names = ", ".join(f"{published.name}.gz" for published in files.values())
    raise DownloadError(
        f"cannot download {path.name}, every mirror failed:\n"
        + "".join(f"  {reason}\n" for reason in reasons)
        + f"Put the files into {folder} by hand, packed or unpacked ({names}), "
        "or pass data_dir= (a folder that holds them) or mirrors= (other base addresses)."
    )


def _write_atomically(path: Path, content: bytes) -> None:
    try:
        with replacing(path) as file:
            file.write(content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # a failed write does not name its file
