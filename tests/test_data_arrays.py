"""Images in NumPy's and IDX files of any name: what is found, what is refused, and what is not read into memory."""

from __future__ import annotations

import gzip
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvae.data import DATASETS, load_dataset, load_idx, load_npy, load_npz


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


TRAIN, TEST = noise(7, 5, 4), noise(3, 5, 4, seed=1)
TRAIN_LABELS, TEST_LABELS = np.arange(7), np.array([2, 0, 1], np.uint8)


def check(dataset, name: str, *, labels: bool = True) -> None:
    assert dataset.name == name
    for images, expected in ((dataset.train_images, TRAIN), (dataset.test_images, TEST)):
        assert images.dtype == torch.uint8
        assert np.array_equal(images.numpy(), expected[:, None])
    if labels:
        assert (dataset.train_labels.dtype, dataset.test_labels.dtype) == (torch.int64, torch.int64)
        assert dataset.train_labels.tolist() == TRAIN_LABELS.tolist()
        assert dataset.test_labels.tolist() == TEST_LABELS.tolist()
    else:
        assert dataset.train_labels is None and dataset.test_labels is None


# ------------------------------------------------------------------------------------------------------- NumPy's files

NAMES = [("train_images", "train_labels", "test_images", "test_labels"), ("x_train", "y_train", "x_test", "y_test")]


@pytest.mark.parametrize("names", NAMES, ids=str)
@pytest.mark.parametrize("labels", [True, False])
def test_npy_and_npz(names, labels, tmp_path):
    arrays = dict(zip(names, (TRAIN, TRAIN_LABELS, TEST, TEST_LABELS), strict=True))
    if not labels:
        del arrays[names[1]], arrays[names[3]]
    for name, array in arrays.items():
        np.save(tmp_path / name, array)
    np.savez_compressed(tmp_path / "some.npz", **arrays, val_images=TEST)
    check(load_npy(tmp_path), "npy", labels=labels)
    check(load_npz(tmp_path), "npz", labels=labels)
    check(load_npz(str(tmp_path / "some.npz")), "npz", labels=labels)


def test_a_single_file_is_split(tmp_path):
    images, labels = noise(25, 4, 4), np.arange(25)[:, None]
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "labels.npy", labels)
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    for dataset in (load_npy(tmp_path), load_npz(tmp_path), load_npy(tmp_path / "images.npy")):
        assert np.array_equal(dataset.train_images[:, 0], images[:23])
        assert np.array_equal(dataset.test_images[:, 0], images[23:])
    assert load_npy(tmp_path).train_labels.tolist() == list(range(23))
    assert load_npy(tmp_path).test_labels.tolist() == [23, 24]
    assert load_npy(tmp_path / "images.npy").train_labels is None
    np.save(tmp_path / "two.npy", images[:2])
    assert len(load_npy(tmp_path / "two.npy").test_images) == 1
    np.save(tmp_path / "one.npy", images[:1])
    with pytest.raises(ValueError, match=r"one\.npy has 1 image, expected two or more"):
        load_npy(tmp_path / "one.npy")


@pytest.mark.parametrize("shape", [(6, 5, 4), (6, 1, 5, 4), (6, 3, 5, 4), (6, 5, 4, 1), (6, 5, 4, 3)], ids=str)
@pytest.mark.parametrize("order", ["C", "F"])
def test_shapes(shape, order, tmp_path):
    images = noise(*shape)
    np.save(tmp_path / "a.npy", np.asarray(images, order=order))
    dataset = load_npy(tmp_path / "a.npy")
    found = torch.cat([dataset.train_images, dataset.test_images])
    expected = images[:, None] if len(shape) == 3 else images if shape[1] in (1, 3) else images.transpose(0, 3, 1, 2)
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4"])
def test_floats_become_the_nearest_level(dtype, tmp_path):
    values = np.linspace(0, 1, 6 * 200 * 300).reshape(6, 200, 300).astype(dtype)
    np.save(tmp_path / "a.npy", values)
    dataset = load_npy(tmp_path / "a.npy")
    found = torch.cat([dataset.train_images, dataset.test_images])[:, 0].double() / 255
    assert np.abs(found.numpy() - values.astype(np.float64)).max() <= 1 / 510 + 1e-12
    assert (found.min(), found.max()) == (0, 1)


LATE_NAN = np.zeros((5000, 30, 30), np.float32)  # in the last of several chunks
LATE_NAN[-1, -1, -1] = np.nan
REFUSED = {
    "no images": (noise(0, 4, 4), r"shape \[0, 4, 4\], expected at least one image"),
    "no pixels": (noise(4, 0, 4), r"shape \[4, 0, 4\], expected at least one image with at least one pixel"),
    "a vector": (noise(9), r"shape \[9\], expected \[N, H, W\], or \[N, C, H, W\] or \[N, H, W, C\], C 1 or 3"),
    "one grayscale image": (noise(9, 9), r"shape \[9, 9\], expected \[N, H, W\]"),
    "one RGB image": (noise(9, 9, 3), r"shape \[9, 9, 3\], expected \[N, H, W\]"),
    "four channels": (noise(5, 9, 9, 4), r"shape \[5, 9, 9, 4\], expected \[N, H, W\]"),
    "five dimensions": (noise(5, 1, 9, 9, 1), r"shape \[5, 1, 9, 9, 1\], expected \[N, H, W\]"),
    "ambiguous": (noise(5, 3, 9, 3), r"shape \[5, 3, 9, 3\], which is ambiguous"),
    "integers": (np.zeros((4, 4, 4), np.int64), "dtype int64, expected uint8, or floats"),
    "booleans": (np.zeros((4, 4, 4), bool), "dtype bool, expected uint8, or floats"),
    "complex": (np.zeros((4, 4, 4), complex), "dtype complex128, expected uint8, or floats"),
    "floats to 255": (np.full((4, 4, 4), 255.0), r"floats from 255 to 255, expected floats in \[0, 1\], or uint8"),
    "negative floats": (np.full((4, 4, 4), -1e-3), "floats from -0.001 to -0.001, expected floats"),
    "NaN": (LATE_NAN, "floats from nan to nan, expected floats"),
    "infinity": (np.full((4, 4, 4), np.inf), "floats from inf to inf, expected floats"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arrays_that_are_no_images(case, tmp_path):
    array, message = REFUSED[case]
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=rf"a\.npy has {message}"):
        load_npy(tmp_path / "a.npy")


def test_images_of_an_absurd_size(tmp_path):
    """10 GB an image, all of it a hole in the file: nothing is read."""
    path = tmp_path / "a.npy"
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (2, 10**5, 10**5)})
        try:
            file.truncate(file.tell() + 2 * 10**10)
        except OSError:
            pytest.skip("the file system has no such files")
    with pytest.raises(ValueError, match=r"a\.npy has .*: 10,000,000,000 pixels an image, expected at most 67,108,864"):
        load_npy(path)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.arange(6), r"shape \[6\], expected \[7\], a label for each image"),
        (np.eye(7, dtype=np.int64), r"shape \[7, 7\], expected \[7\]"),
        (np.array([0, 2**63, 1, 2, 3, 4, 2**64 - 1], np.uint64), f"the label {2**64 - 1}, expected integers below 2"),
        (np.arange(7.0), "dtype float64, expected integers"),
    ],
    ids=["too few", "one-hot", "too large", "floats"],
)
def test_labels_that_are_none(labels, message, tmp_path):
    np.savez(tmp_path / "a.npz", images=TRAIN, labels=labels)
    with pytest.raises(ValueError, match=rf"labels in .*a\.npz has {message}"):
        load_npz(tmp_path / "a.npz")


def test_test_images_of_another_shape(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=TRAIN, x_test=noise(3, 4, 4))
    with pytest.raises(ValueError, match=r"x_test in .* of shape \[1, 4, 4\], expected \[1, 5, 4\], .* x_train in"):
        load_npz(tmp_path)


def test_nothing_by_a_known_name(tmp_path):
    np.savez(tmp_path / "a.npz", TRAIN)
    with pytest.raises(ValueError, match=r"a\.npz has arrays named arr_0, expected train_images or x_train or images"):
        load_npz(tmp_path)
    with pytest.raises(ValueError, match="has arrays named nothing, expected train_images or x_train or images"):
        load_npy(tmp_path)
    np.savez(tmp_path / "b.npz", TRAIN)
    with pytest.raises(ValueError, match=r"has 2 files that end in \.npz, expected one, or name the file itself"):
        load_npz(tmp_path)
    for load in (load_npy, load_npz, load_idx):
        with pytest.raises(FileNotFoundError, match="absent"):
            load(tmp_path / "absent")


class Explosive:
    def __reduce__(self):
        return pytest.fail, ("a pickle was opened",)


def damaged_files() -> dict[str, bytes]:
    """Contents that are no array; each is tried as .npy and as .npz."""
    import io

    def saved(save, *arrays, **named) -> bytes:
        buffer = io.BytesIO()
        save(buffer, *arrays, **named)
        return buffer.getvalue()

    objects = np.array([Explosive()], dtype=object)
    npy, npz = saved(np.save, TRAIN), saved(np.savez, images=TRAIN)
    swollen = npy.replace(b"(7, 5, 4)", b"(9999999999999, 5, 4)")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("images.npy", swollen)
    flipped = bytearray(npz)
    flipped[len(npz) // 2] ^= 1
    return {
        "empty": b"",
        "text": b"1,2,3\n",
        "pickle": pickle.dumps(Explosive()),
        "npy of objects": saved(np.save, objects),
        "npz of objects": saved(np.savez, images=objects),
        "npy, half": npy[: len(npy) // 2],
        "npy, all but a byte": npy[:-1],
        "npy, header alone": npy[:128],
        "npy, half a header": npy[:60],
        "npy, magic alone": npy[:6],
        "npy, header damaged": npy[:12] + b"\xff(((" + npy[16:],
        "npy, shape of terabytes": swollen,
        "npy, shape beyond 2^64": npy.replace(b"(7, 5, 4)", b"(9999999999999, 9999999, 4)"),
        "npz, half": npz[: len(npz) // 2],
        "npz, all but a byte": npz[:-1],
        "npz, a bit flipped": bytes(flipped),
        "npz, shape of terabytes": archive.getvalue(),
        "gzip": gzip.compress(npy),
    }


DAMAGED = damaged_files()


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_named(case, tmp_path):
    for load, suffix in ((load_npy, ".npy"), (load_npz, ".npz")):
        path = tmp_path / f"a{suffix}"
        path.write_bytes(DAMAGED[case])
        with pytest.raises(ValueError, match=rf"a\{suffix} cannot be read as \{suffix}: \S"):
            load(path)


def test_an_npy_file_is_mapped_and_not_read(tmp_path):
    """A file of 1 TB, nearly all of it a hole."""
    path = tmp_path / "large.npy"
    shape = (10**6, 1024, 1024)
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        start = file.tell()
        try:
            file.truncate(start + 2**20 * shape[0])
        except OSError:
            pytest.skip("the file system has no such files")
        file.seek(start + 2**20 * (shape[0] - 1))
        file.write(b"\x05")
    dataset = load_npy(path)
    assert dataset.train_images.shape == (900_000, 1, 1024, 1024)
    assert dataset.test_images[-1, 0, 0, :2].tolist() == [5, 0]


# A process that may take 100 MB more for its data than it has after a small training; what is mapped for reading does
# not count. Trains on each of the files for two steps.
TRAINING = """
import resource, sys, torch
from fastvae.data import load_npy
from fastvae.models import ConvVAE
from fastvae.training import Listener, Training, train

class Twice(Listener):
    def __init__(self):
        self.asked = 0
    def should_stop(self):
        self.asked += 1
        return self.asked == 2

def run(images):
    model = ConvVAE(tuple(images.shape[1:]), latent_dim=2, channels=(2,))
    return train(model, images, images[:4], Training(epochs=1, batch_size=4), listeners=[Twice()])

sets = [load_npy(path).train_images for path in sys.argv[1:]]
for images in sets:
    run(images[:32])
with open("/proc/self/status") as file:
    (data,) = [int(line.split()[1]) << 10 for line in file if line.startswith("VmData:")]
resource.setrlimit(resource.RLIMIT_DATA, (data + (100 << 20), -1))
for images in sets:
    assert run(images)[-1].step == 2
    try:
        images.clone()
    except RuntimeError:
        print("a copy does not fit")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_training_does_not_copy_a_mapped_file(tmp_path):
    """Two of 300 MB, with the channels first and last."""
    paths = tmp_path / "first.npy", tmp_path / "last.npy"
    for path, shape in zip(paths, [(6000, 3, 128, 128), (6000, 128, 128, 3)], strict=True):
        np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    result = subprocess.run([sys.executable, "-c", TRAINING, *paths], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["a copy does not fit"] * 2


# ----------------------------------------------------------------------------------------------------------- IDX files


def write_idx(folder: Path, **arrays: np.ndarray) -> None:
    """By names with "_" for "-"; those that end in "_gz" are packed."""
    for name, array in arrays.items():
        content = idx_bytes(array.astype(np.uint8))
        if name.endswith("_gz"):
            content = gzip.compress(content)
        name = name.replace("_gz", ".gz").replace("_", "-")
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("packed", ["", "_gz"], ids=["plain", "gzip"])
@pytest.mark.parametrize("prefix", ["", "emnist_letters_"])
@pytest.mark.parametrize("test", ["test", "t10k"])
@pytest.mark.parametrize("labels", [True, False])
def test_idx(packed, prefix, test, labels, tmp_path):
    arrays = {"train_images_idx3_ubyte": TRAIN, f"{test}_images_idx3_ubyte": TEST}
    if labels:
        arrays |= {"train_labels_idx1_ubyte": TRAIN_LABELS, f"{test}_labels_idx1_ubyte": TEST_LABELS}
    write_idx(tmp_path, **{f"{prefix}{name}{packed}": array for name, array in arrays.items()})
    (tmp_path / "images-of-something.txt").write_text("")
    check(load_idx(tmp_path), "idx", labels=labels)
    (path,) = tmp_path.glob("*train-images*")
    check(load_idx(path), "idx", labels=labels)


def test_idx_of_one_pair_and_of_several(tmp_path):
    write_idx(tmp_path, images_idx3_ubyte=TRAIN, labels_idx1_ubyte_gz=TRAIN_LABELS)
    dataset = load_idx(tmp_path)
    assert (len(dataset.train_images), len(dataset.test_images)) == (6, 1)
    assert dataset.test_labels.tolist() == [6]
    write_idx(tmp_path, images_idx3_ubyte_gz=TRAIN)  # the same, packed
    assert len(load_idx(tmp_path).train_images) == 6
    write_idx(tmp_path, other_images_idx3_ubyte=TEST)
    with pytest.raises(ValueError, match="has images-idx3-ubyte, other-images-idx3-ubyte, expected one file of"):
        load_idx(tmp_path)
    assert len(load_idx(tmp_path / "other-images-idx3-ubyte").train_images) == 2


def test_idx_in_colour(tmp_path):
    write_idx(tmp_path, train_images_idx4_ubyte=noise(5, 4, 4, 3), train_labels_idx1_ubyte=np.arange(5))
    dataset = load_idx(tmp_path)
    assert dataset.train_images.shape == (4, 3, 4, 4)


def test_idx_without_files_and_damaged(tmp_path):
    with pytest.raises(ValueError, match="has no such file, expected one file of training images and at most one of"):
        load_idx(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(TRAIN)[:-1])
    with pytest.raises(ValueError, match="train-images-idx3-ubyte: truncated data"):
        load_idx(tmp_path)
    write_idx(tmp_path, train_images_idx3_ubyte=TRAIN, train_labels_idx1_ubyte=TEST_LABELS)
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte has shape \[3\], expected \[7\]"):
        load_idx(tmp_path)


# ------------------------------------------------------------------------------------------------------------- by name


def test_by_name(tmp_path):
    write_idx(tmp_path, train_images_idx3_ubyte=TRAIN, test_images_idx3_ubyte=TEST)
    np.save(tmp_path / "train_images", TRAIN)
    np.save(tmp_path / "test_images", TEST)
    np.savez(tmp_path / "a.npz", train_images=TRAIN, test_images=TEST)
    for name in ("idx", "npy", "npz"):
        check(load_dataset(name, tmp_path), name, labels=False)
    assert load_dataset("digits", image_size=None, strict=True).name == "digits"
    with pytest.raises(ValueError, match=f"name must be one of {', '.join(DATASETS)}, got 'cifar'"):
        load_dataset("cifar")
    for name in ("folder", "npy", "npz", "idx"):
        with pytest.raises(ValueError, match=f'the dataset "{name}" needs data_dir'):
            load_dataset(name)
    for name in ("mnist", "digits", "npy"):
        with pytest.raises(ValueError, match=f'image_size is for the dataset "folder" alone, got 64 for "{name}"'):
            load_dataset(name, tmp_path, image_size=64)
        with pytest.raises(ValueError, match=f'channels is for the dataset "folder" alone, got 3 for "{name}"'):
            load_dataset(name, tmp_path, channels=3)
