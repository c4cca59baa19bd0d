"""Datasets: the IDX reader, MNIST's download and verification, the bundled digits. No test uses the network."""

from __future__ import annotations

import errno
import gzip
import hashlib
import http.client
import io
import os
import re
import struct
import subprocess
import sys
import tracemalloc
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvae import files
from fastvae.data import (
    FASHION_MNIST_MIRRORS,
    KMNIST_MIRRORS,
    DownloadError,
    ImageDataset,
    default_data_dir,
    load_dataset,
    load_digits,
    load_fashion_mnist,
    load_kmnist,
    load_mnist,
    mnist,
    read_idx,
)

REPOSITORY = Path(__file__).resolve().parents[1]
MNIST_FOLDER = REPOSITORY.parent / "shared" / "data" / "mnist"
needs_mnist = pytest.mark.skipif(not MNIST_FOLDER.is_dir(), reason=f"the MNIST files are not in {MNIST_FOLDER}")

SMALL_SHAPES = {
    "train_images": (5, 28, 28),
    "train_labels": (5,),
    "test_images": (3, 28, 28),
    "test_labels": (3,),
}


def idx_bytes(array: np.ndarray, element_type: int = 0x08) -> bytes:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, element_type, array.ndim, *array.shape)
    return header + array.tobytes()


def random_bytes(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


# ---------------------------------------------------------------------------------------------------------- read_idx


@pytest.mark.parametrize("shape", [(7,), (3, 28, 28), (2, 3, 4, 5)])
@pytest.mark.parametrize(
    ("name", "packed"), [("a-idx", False), ("a-idx.gz", True), ("gzip-under-a-plain-name", True)], ids=str
)
def test_read_idx_round_trip(tmp_path: Path, shape: tuple[int, ...], name: str, packed: bool) -> None:
    array = random_bytes(shape)
    content = idx_bytes(array)
    path = write(tmp_path / name, gzip.compress(content) if packed else content)
    result = read_idx(path, expected_shape=shape)
    assert result.dtype == np.uint8
    assert result.shape == shape
    assert np.array_equal(result, array)
    assert result.flags.writeable  # torch.from_numpy warns about anything else
    assert np.array_equal(read_idx(str(path)), array)


def test_read_idx_reads_more_than_one_chunk(tmp_path: Path) -> None:
    array = random_bytes((3, 1000, 1000))
    assert np.array_equal(read_idx(write(tmp_path / "large", idx_bytes(array))), array)


ARRAY = random_bytes((4, 3, 2))
GOOD = idx_bytes(ARRAY)
MALFORMED = {
    "empty": (b"", "truncated header: 0 bytes, expected at least 4"),
    "half a magic number": (GOOD[:3], "truncated header: 3 bytes, expected at least 4"),
    "wrong magic number": (b"\x89PNG" + GOOD[4:], "wrong magic number 0x89504e47, expected an IDX file"),
    "wrong second byte": (b"\0\x01" + GOOD[2:], "wrong magic number 0x00010803, expected an IDX file"),
    "signed bytes": (idx_bytes(ARRAY, 0x09), r"element type 0x09 \(signed byte\), expected 0x08 \(unsigned byte\)"),
    "floats": (idx_bytes(ARRAY.astype(">f4"), 0x0D), r"element type 0x0d \(float32\), expected 0x08"),
    "unknown type": (idx_bytes(ARRAY, 0x42), r"element type 0x42 \(unknown\), expected 0x08"),
    "no dimension": (b"\0\0\x08\0", "0 dimensions, expected 1 to 32"),
    "too many dimensions": (b"\0\0\x08\x21" + 33 * b"\0\0\0\1" + b"x", "33 dimensions, expected 1 to 32"),
    "truncated sizes": (GOOD[:11], "truncated header: 11 bytes, expected 16 for 3 dimensions"),
    "empty dimension": (
        b"\0\0\x08\x02\0\0\0\0\xff\xff\xff\xff",
        r"\(0, 4294967295\), expected every size to be at least 1",
    ),
    "no data": (GOOD[:16], r"truncated data: 0 bytes, expected 24 for shape \(4, 3, 2\)"),
    "truncated data": (GOOD[:-1], r"truncated data: 23 bytes, expected 24 for shape \(4, 3, 2\)"),
    "trailing byte": (GOOD + b"\0", r"trailing bytes after the data, expected exactly 24 bytes for shape \(4, 3, 2\)"),
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("case", MALFORMED)
def test_read_idx_malformed(tmp_path: Path, case: str, packed: bool) -> None:
    content, message = MALFORMED[case]
    path = write(tmp_path / "some-file", gzip.compress(content) if packed else content)
    with pytest.raises(ValueError, match=rf"some-file: .*{message}"):
        read_idx(path)


@pytest.mark.parametrize("wrong", [(3, 3, 2), (4, 3), (4, 3, 2, 1), (24,)])
def test_read_idx_wrong_shape(tmp_path: Path, wrong: tuple[int, ...]) -> None:
    path = write(tmp_path / "some-file", GOOD)
    with pytest.raises(ValueError) as raised:
        read_idx(path, expected_shape=wrong)
    assert str(raised.value) == f"{path}: header names shape (4, 3, 2), expected {wrong}"


def test_read_idx_name_says_gzip_but_content_is_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"some-file\.gz: not a gzip file: begins with b'\\x00\\x00', expected"):
        read_idx(write(tmp_path / "some-file.gz", GOOD))


def test_read_idx_every_truncation_of_a_gzip_stream(tmp_path: Path) -> None:
    packed = gzip.compress(GOOD)
    for length in range(2, len(packed)):
        path = write(tmp_path / "some-file.gz", packed[:length])
        with pytest.raises(ValueError, match=r"some-file\.gz: corrupt gzip stream \(.+\), expected a complete one"):
            read_idx(path)


@pytest.mark.parametrize("position", [2, -8, -1], ids=["method", "crc", "length"])
def test_read_idx_corrupt_gzip(tmp_path: Path, position: int) -> None:
    packed = bytearray(gzip.compress(GOOD))
    packed[position] ^= 0xFF
    with pytest.raises(ValueError, match=r"some-file\.gz: corrupt gzip stream"):
        read_idx(write(tmp_path / "some-file.gz", bytes(packed)))


def test_read_idx_corrupt_deflate_block(tmp_path: Path) -> None:
    packed = gzip.compress(GOOD)
    with pytest.raises(ValueError, match=r"corrupt gzip stream \(Error -3"):
        read_idx(write(tmp_path / "some-file.gz", packed[:10] + b"\xff" * 8 + packed[18:]))


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_read_idx_does_not_allocate_what_a_false_header_asks_for(tmp_path: Path, packed: bool) -> None:
    content = struct.pack(">BBBBI", 0, 0, 8, 1, 2**32 - 1) + b"x" * 10
    path = write(tmp_path / "some-file", gzip.compress(content) if packed else content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"truncated data: .*[0-9] bytes, expected 4294967295"):
            read_idx(path)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_read_idx_inflates_no_more_than_its_header_promises(tmp_path: Path) -> None:
    """16 MB of zeros in 16 kB: behind a header of 6 bytes, and behind one that promises more than such a file holds."""
    for count, message in ((6, "trailing bytes after the data, expected exactly 6 bytes"), (2**32 - 1, "at most")):
        content = struct.pack(">BBBBI", 0, 0, 8, 1, count) + bytes(16 << 20)
        path = write(tmp_path / "bomb.gz", gzip.compress(content))
        del content
        tracemalloc.start()
        try:
            with pytest.raises(ValueError, match=rf"bomb\.gz: .*{message}"):
                read_idx(path)
            assert tracemalloc.get_traced_memory()[1] < 4 << 20
        finally:
            tracemalloc.stop()


def test_read_idx_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        read_idx(tmp_path / "nothing-here")


# --------------------------------------------------------------------------------------------------------- load_mnist


class Published:
    """A small dataset in place of MNIST: five training and three test images, and folders that serve as mirrors."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.arrays = {field: random_bytes(shape, seed) for seed, (field, shape) in enumerate(SMALL_SHAPES.items())}
        self.packed = {field: gzip.compress(idx_bytes(array), mtime=0) for field, array in self.arrays.items()}
        self.files = {
            field: mnist.PublishedFile(original.name, hashlib.md5(self.packed[field]).hexdigest(), SMALL_SHAPES[field])
            for field, original in mnist.MNIST_FILES.items()
        }

    def mirror(self, name: str, *, without: str = "", corrupt: str = "") -> str:
        for field, file in self.files.items():
            content = self.packed[field]
            if field == corrupt:
                content = content[:-1] + bytes([content[-1] ^ 1])
            if field != without:
                write(self.folder / name / f"{file.name}.gz", content)
        return (self.folder / name).as_uri() + "/"

    def check(self, dataset: ImageDataset) -> None:
        assert dataset.name == "mnist"
        for field, array in self.arrays.items():
            tensor = getattr(dataset, field)
            if field.endswith("images"):
                assert tensor.dtype == torch.uint8
                assert tensor.shape == (len(array), 1, 28, 28)
            else:
                assert tensor.dtype == torch.int64
                assert tensor.shape == (len(array),)
            assert np.array_equal(tensor.numpy().reshape(array.shape), array)


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Published:
    result = Published(tmp_path / "published")
    monkeypatch.setattr(mnist, "MNIST_FILES", result.files)
    return result


def forbid_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **keywords: object) -> None:
        pytest.fail(f"urlopen was called with {arguments}")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


SPELLINGS = {
    "packed": lambda name: f"{name}.gz",
    "unpacked": lambda name: name,
    "unpacked, other spelling": lambda name: name.replace("-idx", ".idx"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("download", [False, True])
def test_files_on_disk_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: Published, spelling: str, download: bool
) -> None:
    forbid_network(monkeypatch)
    for field, file in published.files.items():
        content = idx_bytes(published.arrays[field])
        if spelling == "packed":
            content = gzip.compress(content, compresslevel=1, mtime=1)  # repacked by hand: another md5
            assert hashlib.md5(content).hexdigest() != file.md5
        write(tmp_path / "data" / SPELLINGS[spelling](file.name), content)
    published.check(load_mnist(tmp_path / "data", download=download))


def test_a_folder_of_the_same_name_is_no_file(tmp_path: Path, published: Published) -> None:
    (tmp_path / "data" / "train-images-idx3-ubyte").mkdir(parents=True)
    published.check(load_mnist(tmp_path / "data", mirrors=[published.mirror("one")]))


def test_malformed_file_on_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: Published) -> None:
    forbid_network(monkeypatch)
    for field, file in published.files.items():
        write(tmp_path / f"{file.name}.gz", published.packed[field])
    write(tmp_path / "t10k-images-idx3-ubyte.gz", published.packed["train_images"])
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte\.gz: .*\(5, 28, 28\), expected \(3, 28, 28\)"):
        load_mnist(tmp_path)


def test_absent_files_without_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: Published) -> None:
    forbid_network(monkeypatch)
    write(tmp_path / "train-labels-idx1-ubyte.gz", published.packed["train_labels"])
    with pytest.raises(FileNotFoundError) as raised:
        load_mnist(tmp_path, download=False)
    message = str(raised.value)
    assert str(tmp_path) in message
    for name in ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        assert name in message
    assert "train-labels-idx1-ubyte" not in message


@pytest.mark.parametrize("slash", ["", "/"])
def test_download_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: Published, slash: str) -> None:
    mirror = published.mirror("one").rstrip("/") + slash
    folder = tmp_path / "absent" / "data"
    published.check(load_mnist(folder, mirrors=[mirror]))
    assert names_in(folder) == sorted(f"{file.name}.gz" for file in published.files.values())
    for field, file in published.files.items():
        assert (folder / f"{file.name}.gz").read_bytes() == published.packed[field]
    forbid_network(monkeypatch)
    published.check(load_mnist(folder, mirrors=[mirror]))


def test_only_the_absent_file_is_downloaded(tmp_path: Path, published: Published) -> None:
    for field, file in published.files.items():
        if field != "test_labels":
            write(tmp_path / "data" / file.name, idx_bytes(published.arrays[field]))
    published.check(load_mnist(tmp_path / "data", mirrors=[published.mirror("one")]))
    assert names_in(tmp_path / "data") == [
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte.gz",
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
    ]


@pytest.mark.parametrize("fault", ["corrupt", "without"])
@pytest.mark.parametrize("field", SMALL_SHAPES)
def test_next_mirror_after_a_failure(tmp_path: Path, published: Published, fault: str, field: str) -> None:
    bad = published.mirror("bad", **{fault: field})
    published.check(load_mnist(tmp_path / "data", mirrors=[bad, published.mirror("good")]))
    assert names_in(tmp_path / "data") == sorted(f"{file.name}.gz" for file in published.files.values())
    with pytest.raises(DownloadError):  # the fault is real
        load_mnist(tmp_path / "other", mirrors=[bad])


def test_every_mirror_fails(tmp_path: Path, published: Published) -> None:
    corrupt = published.mirror("corrupt", corrupt="train_images")
    empty = (tmp_path / "empty").as_uri() + "/"
    folder = tmp_path / "data"
    with pytest.raises(DownloadError) as raised:
        load_mnist(folder, mirrors=[corrupt, empty, "not-an-address"])
    name, packed = "train-images-idx3-ubyte.gz", published.packed["train_images"]
    found = hashlib.md5(packed[:-1] + bytes([packed[-1] ^ 1])).hexdigest()
    lines = str(raised.value).splitlines()
    assert lines[0] == f"cannot download {name}, every mirror failed:"
    expected = published.files["train_images"].md5
    assert lines[1] == f"  {corrupt}{name}: md5 of the {len(packed)} bytes received is {found}, expected {expected}"
    assert lines[2].startswith(f"  {empty}{name}: URLError: ")
    assert lines[3].startswith(f"  not-an-address/{name}: ValueError: unknown url type")
    assert f"Put the files into {folder} by hand" in lines[4]
    assert "data_dir=" in lines[4] and "mirrors=" in lines[4]
    for file in published.files.values():
        assert f"{file.name}.gz" in lines[4]
    assert names_in(folder) == []


@pytest.mark.parametrize(
    "error", [TimeoutError("timed out"), http.client.IncompleteRead(b"abc", 5), ConnectionResetError()]
)
def test_network_errors_while_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: Published, error: Exception
) -> None:
    class Broken(io.BytesIO):
        def read(self, *arguments: object) -> bytes:
            raise error

    monkeypatch.setattr(urllib.request, "urlopen", lambda address, timeout: Broken())
    with pytest.raises(DownloadError, match=type(error).__name__):
        load_mnist(tmp_path / "data", mirrors=["https://mirror.invalid/"])
    assert names_in(tmp_path / "data") == []


def test_a_mirror_that_sends_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: Published) -> None:
    class Endless(io.BytesIO):
        def read(self, size: int = -1) -> bytes:
            assert 0 <= size < 1 << 20
            return bytes(size)

    monkeypatch.setattr(urllib.request, "urlopen", lambda address, timeout: Endless())
    with pytest.raises(DownloadError, match="md5 of the"):
        load_mnist(tmp_path / "data", mirrors=["https://mirror.invalid/"])


@pytest.mark.parametrize(("keywords", "expected"), [({}, 10.0), ({"timeout": 2.5}, 2.5)])
def test_timeout_and_mirrors_reach_urlopen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keywords: dict[str, float], expected: float
) -> None:
    calls: list[tuple[str, float]] = []

    def refuse(address: str, *, timeout: float) -> None:
        calls.append((address, timeout))
        raise TimeoutError("timed out")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(DownloadError):
        load_mnist(tmp_path, **keywords)
    assert calls == [
        ("https://ossci-datasets.s3.amazonaws.com/mnist/train-images-idx3-ubyte.gz", expected),
        ("https://storage.googleapis.com/cvdf-datasets/mnist/train-images-idx3-ubyte.gz", expected),
    ]


def test_interrupt_while_receiving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: Published) -> None:
    def interrupt(address: str, *, timeout: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(urllib.request, "urlopen", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_mnist(tmp_path / "data", mirrors=["https://mirror.invalid/"])
    assert names_in(tmp_path / "data") == []


WRITE_FAILURES = {
    "full disk": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),  # as write raises it: without a file name
    "interrupt": KeyboardInterrupt(),
}


@pytest.mark.parametrize("failure", WRITE_FAILURES)
def test_failure_while_writing_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: Published, failure: str
) -> None:
    folder = tmp_path / "data"
    during: list[list[str]] = []

    class FailingFile(io.FileIO):
        def write(self, content: bytes) -> int:
            super().write(content[:10])
            during.append(names_in(folder))
            raise WRITE_FAILURES[failure]

    monkeypatch.setattr(files, "open", FailingFile, raising=False)
    with pytest.raises(type(WRITE_FAILURES[failure])) as raised:
        load_mnist(folder, mirrors=[published.mirror("one"), published.mirror("two")])
    # One attempt, for the next mirror cannot mend a disk; a partial file existed, beside the final name.
    ((partial,),) = during
    assert partial != "train-images-idx3-ubyte.gz"
    assert names_in(folder) == []
    if failure == "full disk":
        assert isinstance(raised.value, OSError)
        assert raised.value.errno == errno.ENOSPC
        assert raised.value.filename == str(folder / "train-images-idx3-ubyte.gz")
        assert str(folder / "train-images-idx3-ubyte.gz") in str(raised.value)


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied"), KeyboardInterrupt()], ids=repr)
def test_failure_while_replacing_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: Published, error: BaseException
) -> None:
    complete: list[bytes] = []

    def fail(source: Path, destination: Path) -> None:
        assert source.parent == destination.parent  # os.replace is atomic only within one file system
        complete.append(source.read_bytes())
        raise error

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(type(error)):
        load_mnist(tmp_path / "data", mirrors=[published.mirror("one")])
    assert complete == [published.packed["train_images"]]
    assert names_in(tmp_path / "data") == []


def test_files_before_a_failure_are_kept(tmp_path: Path, published: Published) -> None:
    with pytest.raises(DownloadError, match="t10k-images"):
        load_mnist(tmp_path / "data", mirrors=[published.mirror("one", corrupt="test_images")])
    assert names_in(tmp_path / "data") == ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"]


@pytest.mark.skipif(os.name != "posix", reason="file modes are those of POSIX")
def test_downloaded_files_have_the_usual_mode(tmp_path: Path, published: Published) -> None:
    # A folder may be shared: temporary files readable by their owner alone would lock the others out.
    load_mnist(tmp_path / "data", mirrors=[published.mirror("one")])
    usual = write(tmp_path / "usual", b"").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "data").iterdir()} == {usual}


@pytest.mark.parametrize("mirrors", ["https://mirror.invalid/", [], ()], ids=repr)
def test_bad_mirrors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mirrors: object) -> None:
    forbid_network(monkeypatch)
    with pytest.raises(ValueError, match="mirrors must be a non-empty sequence of base addresses, got"):
        load_mnist(tmp_path, mirrors=mirrors)


@pytest.mark.parametrize("timeout", [0, -1.0, float("nan")])
def test_bad_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timeout: float) -> None:
    forbid_network(monkeypatch)
    with pytest.raises(ValueError, match=f"timeout must be a positive number of seconds, got {timeout}"):
        load_mnist(tmp_path, timeout=timeout)


def test_default_data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: Published) -> None:
    monkeypatch.setenv("FASTVAE_DATA", str(tmp_path / "elsewhere"))
    assert default_data_dir() == tmp_path / "elsewhere" / "mnist"
    published.check(load_mnist(mirrors=[published.mirror("one")]))
    assert len(names_in(tmp_path / "elsewhere" / "mnist")) == 4
    monkeypatch.setenv("FASTVAE_DATA", "~/here")
    assert default_data_dir() == Path.home() / "here" / "mnist"
    for unset in (lambda: monkeypatch.setenv("FASTVAE_DATA", ""), lambda: monkeypatch.delenv("FASTVAE_DATA")):
        unset()
        assert default_data_dir() == Path.home() / ".cache" / "fastvae" / "mnist"


# ------------------------------------------------------------------------------------- the sets in MNIST's format

OTHERS = {
    "fashion-mnist": (load_fashion_mnist, "FASHION_MNIST_FILES", FASHION_MNIST_MIRRORS),
    "kmnist": (load_kmnist, "KMNIST_FILES", KMNIST_MIRRORS),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_set_is_downloaded_into_a_folder_of_its_own(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, table, _ = OTHERS[name]
    monkeypatch.setenv("FASTVAE_DATA", str(tmp_path / "elsewhere"))
    published = Published(tmp_path / "published")
    mirror = published.mirror("one")
    expected = getattr(mnist, table)["train_images"].md5
    with pytest.raises(DownloadError, match=rf"md5 of the \d+ bytes received is \w+, expected {expected}"):
        load(mirrors=[mirror])  # not the published files
    monkeypatch.setattr(mnist, table, published.files)
    dataset = load(mirrors=[published.mirror("bad", corrupt="test_images"), mirror])
    assert dataset.name == name
    published.check(dataset._replace(name="mnist"))
    assert names_in(tmp_path / "elsewhere") == [name]
    assert names_in(tmp_path / "elsewhere" / name) == sorted(f"{file.name}.gz" for file in published.files.values())
    forbid_network(monkeypatch)
    published.check(load_dataset(name)._replace(name="mnist"))
    published.check(load_dataset(name, tmp_path / "elsewhere" / name)._replace(name="mnist"))


@pytest.mark.parametrize("name", OTHERS)
def test_addresses_and_checksums_of_another_set(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, table, mirrors = OTHERS[name]
    asked: list[str] = []

    def refuse(address: str, *, timeout: float) -> None:
        asked.append(address)
        raise TimeoutError("timed out")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(DownloadError):
        load(tmp_path)
    assert asked == [f"{mirror}train-images-idx3-ubyte.gz" for mirror in mirrors]
    tables = [mnist.MNIST_FILES, mnist.FASHION_MNIST_FILES, mnist.KMNIST_FILES]
    assert len({file.md5 for files in tables for file in files.values()}) == 12
    assert all(re.fullmatch("[0-9a-f]{32}", file.md5) for file in getattr(mnist, table).values())
    assert [file._replace(md5="") for file in getattr(mnist, table).values()] == [
        file._replace(md5="") for file in mnist.MNIST_FILES.values()
    ]


@needs_mnist
def test_md5_table_is_that_of_the_published_files() -> None:
    assert set(mnist.MNIST_FILES) == {
        "train_images",
        "train_labels",
        "test_images",
        "test_labels",
    }
    for file in mnist.MNIST_FILES.values():
        content = (MNIST_FOLDER / f"{file.name}.gz").read_bytes()
        assert hashlib.md5(content).hexdigest() == file.md5, file.name


@needs_mnist
def test_the_real_mnist(monkeypatch: pytest.MonkeyPatch) -> None:
    forbid_network(monkeypatch)
    dataset = load_mnist(MNIST_FOLDER)
    for images, labels, count in (
        (dataset.train_images, dataset.train_labels, 60_000),
        (dataset.test_images, dataset.test_labels, 10_000),
    ):
        assert images.shape == (count, 1, 28, 28)
        assert images.dtype == torch.uint8
        assert (images.min(), images.max()) == (0, 255)
        assert labels.shape == (count,)
        assert labels.dtype == torch.int64
        assert labels.unique().tolist() == list(range(10))
    # The figures that everyone normalises MNIST with, and the first labels of each part.
    pixels = dataset.train_images.double() / 255
    assert pixels.mean().item() == pytest.approx(0.1307, abs=5e-5)
    assert pixels.std().item() == pytest.approx(0.3081, abs=5e-5)
    assert dataset.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert dataset.test_labels[:5].tolist() == [7, 2, 1, 0, 4]


@needs_mnist
def test_the_real_mnist_through_a_mirror(tmp_path: Path) -> None:
    dataset = load_mnist(tmp_path, mirrors=[MNIST_FOLDER.as_uri()])
    assert len(dataset.train_images) == 60_000
    assert len(names_in(tmp_path)) == 4


# -------------------------------------------------------------------------------------------------------- load_digits


def test_digits_format_and_split() -> None:
    originals = pytest.importorskip("sklearn.datasets").load_digits()
    dataset = load_digits()
    assert dataset.name == "digits"
    for images, labels, count in (
        (dataset.train_images, dataset.train_labels, 1500),
        (dataset.test_images, dataset.test_labels, 297),
    ):
        assert images.shape == (count, 1, 28, 28)
        assert images.dtype == torch.uint8
        assert (images.min(), images.max()) == (0, 255)
        assert labels.shape == (count,)
        assert labels.dtype == torch.int64
    assert dataset.train_labels.tolist() == originals.target[:1500].tolist()
    assert dataset.test_labels.tolist() == originals.target[-297:].tolist()


def cubic_enlargement(size: int, enlarged: int) -> np.ndarray:
    """Matrix [enlarged, size] of cubic convolution (R. Keys, 1981) with a = -0.75; zeros beyond the edges."""
    centres = (np.arange(enlarged) + 0.5) * size / enlarged - 0.5
    distance = np.abs(centres[:, None] - np.arange(size))
    near = (1.25 * distance - 2.25) * distance**2 + 1
    far = -0.75 * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0.0))


def test_digits_are_the_originals_enlarged_and_sharpened() -> None:
    originals = pytest.importorskip("sklearn.datasets").load_digits().images / 16
    dataset = load_digits()
    images = torch.cat((dataset.train_images, dataset.test_images)).double().squeeze(1)
    # From a 10x10 frame whose outermost pixels are zero, so their columns drop out, to 30x30.
    matrix = cubic_enlargement(10, 30)[:, 1:-1]
    expected = 255 * (0.5 + 3 * (matrix @ originals @ matrix.T - 0.5)).clip(0, 1)
    assert expected[:, [0, -1]].max() == expected[:, :, [0, -1]].max() == 0  # nothing is lost with the outermost pixels
    assert np.abs(images.numpy() - expected[:, 1:-1, 1:-1]).max() <= 0.5 + 1e-9  # rounded to nearest
    # The outermost pixels are empty, and the digits' middle lies in the middle of the frame.
    border = images.clone()
    border[:, 1:-1, 1:-1] = 0
    assert border.max() == 0
    rows = images.sum(dim=(0, 2))
    assert (rows * torch.arange(28.0)).sum() / rows.sum() == pytest.approx(13.5, abs=1.0)


def test_digits_are_the_same_under_another_default_dtype() -> None:
    pytest.importorskip("sklearn")
    expected = load_digits()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(load_digits().train_images, expected.train_images)
    finally:
        torch.set_default_dtype(torch.float32)


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r'pip install "fastvae\[examples\]"'):
        load_digits()


def test_import_needs_neither_scikit_learn_nor_triton() -> None:
    program = (
        "import sys; sys.modules['sklearn'] = sys.modules['triton'] = sys.modules['PIL'] = None; import fastvae.data; "
        "print(sorted(m for m in sys.modules if m.startswith(('sklearn.', 'triton.', 'matplotlib'))))"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
