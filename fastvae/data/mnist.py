"""MNIST: the four original files, found on disk or downloaded once and verified.

LeCun, Cortes, Burges, "The MNIST Database of Handwritten Digits".
"""

from __future__ import annotations

import hashlib
import http.client
import os
import urllib.request
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .idx import read_idx


class ImageDataset(NamedTuple):
    """Images uint8 [N, C, H, W], 0..255; labels int64 [N]. All on the CPU."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class DownloadError(RuntimeError):
    """No mirror delivered a file; the message lists each mirror with its reason."""


class PublishedFile(NamedTuple):
    """A published file: its name unpacked, the md5 of the packed ``name + ".gz"``, and the shape of its content."""

    name: str
    md5: str
    shape: tuple[int, ...]


MNIST_FILES = {
    "train_images": PublishedFile("train-images-idx3-ubyte", "f68b3c2dcbeaaa9fbdd348bbdeb94873", (60_000, 28, 28)),
    "train_labels": PublishedFile("train-labels-idx1-ubyte", "d53e105ee54ea40749a09fcbcd1e9432", (60_000,)),
    "test_images": PublishedFile("t10k-images-idx3-ubyte", "9fb629c4189551a2d022fa330f9573f3", (10_000, 28, 28)),
    "test_labels": PublishedFile("t10k-labels-idx1-ubyte", "ec29112dd5afa0611ce80d1b7f02629c", (10_000,)),
}

MNIST_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)


def default_data_dir() -> Path:
    """The folder ``mnist`` in ``$FASTVAE_DATA``, or in ``~/.cache/fastvae`` where that is unset or empty."""
    return Path(os.environ.get("FASTVAE_DATA") or "~/.cache/fastvae").expanduser() / "mnist"


def load_mnist(
    data_dir: str | os.PathLike[str] | None = None,
    *,
    download: bool = True,
    mirrors: Sequence[str] = MNIST_MIRRORS,
    timeout: float = 10.0,
) -> ImageDataset:
    """MNIST: 60,000 training and 10,000 test images, uint8 [N, 1, 28, 28], with int64 labels [N].

    The four files are looked for in ``data_dir`` (``None``: ``default_data_dir()``), packed
    (``train-images-idx3-ubyte.gz``) or unpacked (``train-images-idx3-ubyte``, ``train-images.idx3-ubyte``). Whatever is
    there is judged by its content, so repacked files are accepted. What is absent is downloaded into ``data_dir`` from
    the first of ``mirrors`` (base addresses) that delivers the published md5; ``timeout`` is in seconds, for each wait
    on the network.

    Raises ``ValueError`` for a malformed file, ``FileNotFoundError`` for absent files with ``download=False``,
    ``DownloadError`` when every mirror fails, ``OSError`` when the file cannot be written. A failed download leaves no
    file behind.
    """
    if isinstance(mirrors, str) or not mirrors:
        raise ValueError(f"mirrors must be a non-empty sequence of base addresses, got {mirrors!r}")
    if not timeout > 0:
        raise ValueError(f"timeout must be a positive number of seconds, got {timeout!r}")
    folder = default_data_dir() if data_dir is None else Path(data_dir).expanduser()
    found = {field: _find(folder, file.name) for field, file in MNIST_FILES.items()}
    absent = [MNIST_FILES[field].name for field, path in found.items() if path is None]
    if absent and not download:
        raise FileNotFoundError(f"{folder} lacks {', '.join(absent)} (packed or unpacked), and download=False")
    arrays = {
        field: read_idx(found[field] or _download(file, folder, mirrors, timeout), expected_shape=file.shape)
        for field, file in MNIST_FILES.items()
    }
    return ImageDataset(
        "mnist",
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


def _download(file: PublishedFile, folder: Path, mirrors: Sequence[str], timeout: float) -> Path:
    path = folder / f"{file.name}.gz"
    reasons = []
    for mirror in mirrors:
        address = f"{mirror.rstrip('/')}/{path.name}"
        try:
            with urllib.request.urlopen(address, timeout=timeout) as response:
                content: bytes = response.read()
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
    names = ", ".join(f"{published.name}.gz" for published in MNIST_FILES.values())
    raise DownloadError(
        f"cannot download {path.name}, every mirror failed:\n"
        + "".join(f"  {reason}\n" for reason in reasons)
        + f"Put the files into {folder} by hand, packed or unpacked ({names}), "
        "or pass data_dir= (a folder that holds them) or mirrors= (other base addresses)."
    )


def _write_atomically(path: Path, content: bytes) -> None:
    # A name of its own, so that processes downloading at the same time do not write into each other's file.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # a failed write does not name its file
    finally:
        temporary.unlink(missing_ok=True)
