"""A folder of pictures: what is read, how it is resized, split and kept; and what becomes of damaged files."""

from __future__ import annotations

import io
import json
import os
import random
import re
import struct
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from fastvae.data import decoded as decoded_module
from fastvae.data import load_folder, pictures

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where decoded pictures go by default."""
    monkeypatch.setenv("FASTVAE_DATA", str(tmp_path / "cache"))
    return tmp_path / "cache" / "folders"


def picture(number: int = 0, size: tuple[int, int] = (12, 8), mode: str = "L") -> Image.Image:
    """Noise, another one for each number; size is (width, height)."""
    channels = {"L": (), "LA": (2,), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}[mode]
    values = np.random.default_rng(number).integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8)
    return Image.fromarray(values, mode)


def packed(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write(path: Path, content: bytes | Image.Image) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else packed(content))
    return path


def fill(root: Path, count: int = 30, **options) -> list[Path]:
    return [write(root / f"{number:03}.png", picture(number, **options)) for number in range(count)]


def every(dataset) -> torch.Tensor:
    return torch.cat([dataset.train_images, dataset.test_images])


def as_set(images: torch.Tensor) -> set[bytes]:
    return {image.permute(1, 2, 0).contiguous().numpy().tobytes() for image in images}


# ------------------------------------------------------------------------------------------------- what the images are


def test_pictures_of_one_size_are_read_as_they_are(tmp_path):
    fill(tmp_path / "own")
    dataset = load_folder(tmp_path / "own")
    assert dataset.name == "folder"
    assert dataset.train_labels is None and dataset.test_labels is None
    assert (dataset.class_names, dataset.skipped) == ((), ())
    images = every(dataset)
    assert images.dtype == torch.uint8
    assert images.shape == (30, 1, 8, 12)
    assert as_set(images) == {picture(number).tobytes() for number in range(30)}


def test_one_colour_picture_makes_all_rgb_and_another_size_makes_all_64(tmp_path):
    """The last in order decides for all, whichever it is."""
    paths = fill(tmp_path / "own", 12)
    plain = load_folder(tmp_path / "own")
    assert every(plain).shape == (12, 1, 8, 12)
    for path in paths:
        original = path.read_bytes()
        write(path, picture(99, mode="RGB"))
        dataset = load_folder(tmp_path / "own")
        assert every(dataset).shape == (12, 3, 8, 12)
        assert picture(99, mode="RGB").tobytes() in as_set(every(dataset))
        write(path, picture(99, size=(13, 8)))
        assert every(load_folder(tmp_path / "own")).shape == (12, 1, 64, 64)
        path.write_bytes(original)
    assert every(load_folder(tmp_path / "own", image_size=5)).shape == (12, 1, 5, 5)


def test_the_shape_that_a_model_wants(tmp_path):
    """Grayscale pictures for a model of colours, and the other way round."""
    for mode in ("L", "RGB"):
        fill(tmp_path / mode, 3, size=(9, 7), mode=mode)
        for channels in (1, 3):
            dataset = load_folder(tmp_path / mode, image_size=(4, 6), channels=channels)
            assert every(dataset).shape == (3, channels, 4, 6)
            same = load_folder(tmp_path / mode, channels=channels)
            assert every(same).shape == (3, channels, 7, 9)
        if mode == "L":
            assert torch.equal(every(same), every(load_folder(tmp_path / mode)).expand(-1, 3, -1, -1))
        else:
            weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)  # ITU-R 601-2 luma, as Pillow has it
            luma = (every(same) * weights).sum(1, keepdim=True)
            assert (every(load_folder(tmp_path / mode, channels=1)) - luma).abs().max() < 1


@pytest.mark.parametrize(("size", "expected"), [((128, 3), (3, 128)), ((129, 3), (64, 64)), ((3, 129), (64, 64))])
def test_a_size_that_all_share_is_taken_up_to_128(size, expected, tmp_path):
    fill(tmp_path, 2, size=size)
    assert every(load_folder(tmp_path)).shape[2:] == expected


def test_the_middle_is_kept_and_resized_without_aliasing(tmp_path):
    # Wide: black, a grey square of one-pixel stripes, black. Tall: its transpose.
    stripes = np.zeros((40, 100), np.uint8)
    stripes[:, 30:70] = 255 * (np.arange(40) % 2)
    for name, values in (("wide.png", stripes), ("tall.png", stripes.T.copy())):
        write(tmp_path / name, Image.fromarray(values))
    images = every(load_folder(tmp_path, image_size=10)).double()
    # Neither black nor stripes: half of the pixels are white, but at the edges, where the filter has half its support.
    assert (images[..., 1:-1, 1:-1] - 127.5).abs().max() < 6
    assert (images - 127.5).abs().max() < 20


def test_a_small_picture_is_enlarged(tmp_path):
    for number, value in enumerate((40, 200)):
        write(tmp_path / f"{number}.png", Image.new("L", (1, 1), value))
    images = every(load_folder(tmp_path, image_size=3))
    assert sorted(images.unique().tolist()) == [40, 200]


KINDS = {
    # name: (what is written, the value of its pixels)
    "grayscale": (Image.new("L", (4, 4), 77), 77),
    "one bit": (Image.new("1", (4, 4), 1), 255),
    "16 bits": (Image.fromarray(np.full((4, 4), 40_000, np.uint16)), 156),  # 40000 / 257 = 155.6
    "16 bits, black": (Image.fromarray(np.zeros((4, 4), np.uint16)), 0),
    "grayscale, half transparent": (Image.new("LA", (4, 4), (0, 127)), 128),
    "RGB": (Image.new("RGB", (4, 4), (1, 2, 3)), (1, 2, 3)),
    "RGBA, half transparent": (Image.new("RGBA", (4, 4), (255, 0, 0, 127)), (255, 128, 128)),
    "RGBA, all transparent": (Image.new("RGBA", (4, 4), (9, 9, 9, 0)), (255, 255, 255)),
    "palette": (Image.new("RGB", (4, 4), (10, 200, 30)).quantize(4), (10, 200, 30)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_png(kind, tmp_path):
    image, expected = KINDS[kind]
    write(tmp_path / "a.png", image)
    write(tmp_path / "b.png", image)
    images = every(load_folder(tmp_path))
    assert images.shape == (2, len(np.atleast_1d(expected)), 4, 4)
    assert (images == torch.tensor(expected).view(-1, 1, 1)).all()


FORMATS = {
    # ending: (Pillow's name, options)
    "bmp": ("BMP", {}), "dib": ("DIB", {}), "tif": ("TIFF", {}), "TIFF": ("TIFF", {"compression": "tiff_lzw"}),
    "webp": ("WEBP", {"lossless": True}), "gif": ("GIF", {}), "jp2": ("JPEG2000", {}), "pgm": ("PPM", {}),
    "ppm": ("PPM", {}), "tga": ("TGA", {}), "pcx": ("PCX", {}), "sgi": ("SGI", {}), "jfif": ("JPEG", {}),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_every_format_that_pillow_reads(mode, tmp_path):
    """BMP, TIFF, WebP, GIF and more, in one folder, and none of them is left out."""
    value = 77 if mode == "L" else (10, 200, 30)
    for ending, (kind, options) in FORMATS.items():
        write(tmp_path / f"{kind}.{ending}", packed(Image.new(mode, (16, 16), value), kind, **options))
    write(tmp_path / "wrong.png", packed(Image.new(mode, (16, 16), value), "BMP"))
    dataset = load_folder(tmp_path, channels=len(mode) if mode == "RGB" else 1, strict=True)
    images = every(dataset).double()
    assert images.shape == (len(FORMATS) + 1, len(np.atleast_1d(value)), 16, 16)
    assert (images - torch.tensor(value).view(-1, 1, 1)).abs().max() <= 3  # JPEG's


def test_kinds_of_tiff(tmp_path):
    """16 bits, and floats in [0, 1]."""
    sixteen = Image.fromarray(np.full((4, 4), 40_000, np.uint16))
    floats = Image.fromarray(np.full((4, 4), 0.61, np.float32))
    for name, image in (("a.tif", sixteen), ("b.tif", floats)):
        write(tmp_path / name, packed(image, "TIFF"))
    assert every(load_folder(tmp_path)).unique().tolist() == [156]  # 40000 / 257 = 155.6, 255 * 0.61 = 155.55


@pytest.mark.parametrize("kind", ["L", "RGB", "P"])
def test_a_transparent_colour_is_white(kind, tmp_path):
    image = Image.new("RGB", (4, 4), (10, 20, 30))
    image = image.quantize(4) if kind == "P" else image.convert(kind)
    for name in ("a.png", "b.png"):
        write(tmp_path / name, packed(image, transparency=image.getpixel((0, 0))))
    images = every(load_folder(tmp_path))
    assert images.shape[1] == (1 if kind == "L" else 3)
    assert (images == 255).all()


def test_kinds_of_jpeg(tmp_path):
    for mode, value, expected in (
        ("L", 90, 90),
        ("RGB", (200, 60, 20), (200, 60, 20)),
        ("CMYK", (0, 255, 255, 0), 255),
    ):
        image = Image.new(mode, (16, 16), value)
        for name in ("a.jpg", "b.JPEG"):
            write(tmp_path / mode / name, packed(image, "JPEG", quality=95))
        found = every(load_folder(tmp_path / mode)).double().mean((0, 2, 3))
        expected = (255, 0, 0) if mode == "CMYK" else np.atleast_1d(expected)
        assert np.abs(found.numpy() - expected).max() < 4


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_pictures_stand_upright(kind, orientation, tmp_path):
    """White on the left as seen; what is stored is turned, and EXIF says so."""
    seen = np.zeros((16, 32), np.uint8)
    seen[:, :16] = 255
    turned = np.rot90(seen, {1: 0, 3: 2, 6: 1, 8: 3}[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a", "b"):
        content = packed(Image.fromarray(np.ascontiguousarray(turned)), kind, exif=exif)
        write(tmp_path / f"{name}.{kind.lower()}", content)
    images = every(load_folder(tmp_path)).double()
    assert images.shape == (2, 1, 16, 32)
    assert images[..., :15].min() > 250 and images[..., 17:].max() < 5


# ---------------------------------------------------------------------------------------------------- sets and classes


def test_the_split_hangs_on_the_name_alone(tmp_path):
    paths = fill(tmp_path / "own", 200)
    before = load_folder(tmp_path / "own")
    assert 10 <= len(before.test_images) <= 30
    assert len(before.train_images) + len(before.test_images) == 200
    assert not as_set(before.train_images) & as_set(before.test_images)
    for number in range(200, 230):
        write(tmp_path / "own" / f"more{number}.png", picture(number))
    after = load_folder(tmp_path / "own")
    assert as_set(before.train_images) < as_set(after.train_images)
    assert as_set(before.test_images) < as_set(after.test_images)
    # Neither where the folder is nor what is in the files counts.
    (tmp_path / "own").rename(tmp_path / "moved")
    for path in paths:
        write(tmp_path / "moved" / path.name, Image.new("L", (12, 8), int(path.stem)))
    for number in range(200, 230):
        (tmp_path / "moved" / f"more{number}.png").unlink()
    moved = load_folder(tmp_path / "moved")
    original = {picture(number).tobytes(): number for number in range(200)}
    for first, second in ((before.train_images, moved.train_images), (before.test_images, moved.test_images)):
        assert [original[image.numpy().tobytes()] for image in first] == second[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("count", [2, 3, 5])
def test_each_set_has_an_image(count, tmp_path):
    for trial in range(4):
        root = tmp_path / str(trial)
        for number in range(count):
            write(root / f"{trial}{number}.png", picture(number))
        dataset = load_folder(root)
        assert len(dataset.test_images) >= 1 and len(dataset.train_images) >= 1
        assert len(every(dataset)) == count


def test_sub_folders_are_classes(tmp_path):
    names = ["cat", "Dog", "ant"]
    for number in range(60):
        write(tmp_path / names[number % 3] / "deeper" / f"{number}.png", Image.new("L", (4, 4), number))
    dataset = load_folder(tmp_path)
    assert dataset.class_names == ("Dog", "ant", "cat")
    for images, labels in (
        (dataset.train_images, dataset.train_labels),
        (dataset.test_images, dataset.test_labels),
    ):
        assert labels.dtype == torch.int64
        assert [dataset.class_names[label] for label in labels] == [names[int(it[0, 0, 0]) % 3] for it in images]
    assert set(dataset.train_labels[:12].tolist()) == {0, 1, 2}  # the first ones are of all classes
    write(tmp_path / "of-no-class.png", picture())
    assert load_folder(tmp_path).train_labels is None or load_folder(tmp_path).test_labels is None


def test_train_and_test(tmp_path):
    for number in range(8):
        write(tmp_path / "train" / "good" / f"{number}.png", Image.new("L", (4, 4), number))
        write(tmp_path / "test" / ("good", "bad")[number % 2] / f"{number}.png", Image.new("L", (4, 4), 100 + number))
    write(tmp_path / "val" / "a.png", Image.new("L", (4, 4), 200))
    write(tmp_path / "b.png", Image.new("L", (4, 4), 201))
    dataset = load_folder(tmp_path)
    assert sorted(dataset.train_images[:, 0, 0, 0].tolist()) == list(range(8))
    assert sorted(dataset.test_images[:, 0, 0, 0].tolist()) == list(range(100, 108))
    assert dataset.class_names == ("bad", "good")
    assert dataset.train_labels.tolist() == [1] * 8
    assert dataset.test_labels.tolist() == [1 - int(it[0, 0, 0]) % 2 for it in dataset.test_images]
    write(tmp_path / "train" / "c.png", picture(size=(4, 4)))
    assert load_folder(tmp_path).train_labels is None
    assert load_folder(tmp_path).test_labels is not None


@pytest.mark.parametrize("name", ["train", "test"])
def test_one_set_alone_is_refused(name, tmp_path):
    write(tmp_path / name / "a.png", picture())
    with pytest.raises(ValueError, match=f'has a folder "{name}", expected both "train" and "test", or neither'):
        load_folder(tmp_path)


def test_an_empty_set_is_refused(tmp_path):
    write(tmp_path / "train" / "a.png", picture())
    (tmp_path / "test").mkdir()
    with pytest.raises(ValueError, match="has 1 training and 0 test images"):
        load_folder(tmp_path)


def test_hidden_files_are_left_alone(tmp_path):
    fill(tmp_path / "own", 3)
    for name in (".hidden.png", "._000.png", ".git/a.png", "Thumbs.db", "desktop.ini"):
        write(tmp_path / "own" / name, b"nothing")
    dataset = load_folder(tmp_path / "own", strict=True)
    assert len(every(dataset)) == 3 and dataset.skipped == ()


def test_runs_are_left_alone(tmp_path):
    """A run that was started in the folder of pictures has put its own there."""
    fill(tmp_path / "own", 3)
    for name in ("metrics.csv", "checkpoint.pt", "loss.png", "generated/generated.png"):
        write(tmp_path / "own" / "runs" / "folder-1" / name, picture(9))
    dataset = load_folder(tmp_path / "own", strict=True)
    assert len(every(dataset)) == 3 and dataset.skipped == () and dataset.class_names == ()


def test_what_is_no_picture_is_named(tmp_path):
    """Also a format that Pillow opens without decoding it."""
    fill(tmp_path / "own", 3)
    names = ["000.png.part", "a/list.csv", "drawing.eps", "notes.txt", "picture"]
    for name in names:
        write(tmp_path / "own" / name, b"nothing")
    dataset = load_folder(tmp_path / "own")
    assert len(every(dataset)) == 3
    assert [item.path for item in dataset.skipped] == names
    assert dataset.skipped[0].reason == ".part is no ending of a picture that Pillow reads"
    assert dataset.skipped[4].reason == "its name has no ending of a picture that Pillow reads"
    with pytest.raises(ValueError, match=r"own/000\.png\.part is not read: \.part is no ending .* \(strict\)"):
        load_folder(tmp_path / "own", strict=True)
    # Beside "train" and "test" nothing is meant to be read.
    for name in ("train", "test"):
        fill(tmp_path / "sets" / name, 2)
    for name in ("val/a.png", "notes.txt"):
        write(tmp_path / "sets" / name, b"nothing")
    assert load_folder(tmp_path / "sets", strict=True).skipped == ()
    write(tmp_path / "sets" / "test" / "list.csv", b"nothing")
    assert [item.path for item in load_folder(tmp_path / "sets").skipped] == ["test/list.csv"]


# ---------------------------------------------------------------------------------------------------------- no picture


def test_no_folder_and_no_picture(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        load_folder(tmp_path / "absent")
    with pytest.raises(NotADirectoryError, match=r"file\.png is no folder"):
        load_folder(write(tmp_path / "file.png", picture()))
    write(tmp_path / "own" / "notes.txt", b"")
    with pytest.raises(ValueError, match=r"own has no picture: none of its 1 files is named like one, \.png for"):
        load_folder(tmp_path / "own")
    write(tmp_path / "own" / "a.png", b"nothing")
    with pytest.raises(
        ValueError, match=r"no picture that can be read, of 1 files; the first, a\.png: not a picture that"
    ):
        load_folder(tmp_path / "own")
    write(tmp_path / "own" / "b.png", picture())
    with pytest.raises(ValueError, match="has 1 training and 0 test images that can be read"):
        load_folder(tmp_path / "own")


def test_an_absurd_size(tmp_path):
    fill(tmp_path, 3)
    with pytest.raises(ValueError, match=r"image_size must be of at most 67,108,864 pixels, got 1000000 x 1000000"):
        load_folder(tmp_path, image_size=10**6)


@pytest.mark.parametrize("size", [0, -1, (8, 0), (3, 8, 8)])
def test_a_bad_size(size, tmp_path):
    fill(tmp_path, 3)
    with pytest.raises(ValueError, match=rf"image_size must be a positive number of .*, got {re.escape(str(size))}"):
        load_folder(tmp_path, image_size=size)


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_bad_channels(channels, tmp_path):
    fill(tmp_path, 3)
    with pytest.raises(ValueError, match=f"channels must be 1 or 3, got {channels}"):
        load_folder(tmp_path, channels=channels)


def test_without_pillow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r'pip install "fastvae\[examples\]"'):
        load_folder(tmp_path)


# -------------------------------------------------------------------------------------------------------- damaged files


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_of(width: int, height: int, data: bytes = b"", extra: bytes = b"") -> bytes:
    """8-bit grayscale, with whatever it is given for the compressed rows."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


GOOD = packed(picture(1000))
GOOD_JPEG = packed(picture(1000, size=(40, 30), mode="RGB"), "JPEG")
DAMAGED = {
    "empty": (b"", "the file is empty"),
    "text": (b"<html>404 not found</html>", "not a picture that Pillow reads"),
    "zeros": (bytes(1000), "not a picture that Pillow reads"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not a picture that Pillow"),
    "TIFF, half": (packed(picture(1000), "TIFF")[:60], ""),
    "WebP, half": (packed(picture(1000), "WEBP")[:60], ""),
    "BMP, half": (packed(picture(1000), "BMP")[:-50], "truncated"),
    "integers of 32 bits": (
        packed(Image.fromarray(np.full((8, 12), 70_000, np.int32)), "TIFF"),
        "its pixels are integers with a sign or of 32 bits, expected 8 or 16 bits without a sign",
    ),
    "floats": (
        packed(Image.fromarray(np.linspace(0, 2, 96, dtype=np.float32).reshape(8, 12)), "TIFF"),
        "its pixels are floats from 0 to 2, expected floats in [0, 1], or 8 or 16 bits",
    ),
    "NaN": (packed(Image.fromarray(np.full((8, 12), np.nan, np.float32)), "TIFF"), "its pixels are floats from nan"),
    "PNG, signature alone": (GOOD[:8], ""),
    "PNG, half a header": (GOOD[:20], ""),
    "PNG, header alone": (GOOD[:33], ""),
    "PNG, half": (GOOD[: len(GOOD) // 2], "truncated"),
    "PNG, rows not compressed": (png_of(12, 8, bytes(104)), ""),
    "PNG, no pixels": (png_of(0, 8, zlib.compress(b"")), ""),
    "PNG, no rows": (png_of(12, 8), ""),
    "PNG, header damaged": (GOOD[:20] + b"\xff" + GOOD[21:], ""),
    "PNG, 100 million pixels": (png_of(10_000, 10_000, zlib.compress(bytes(10_001))), "more than 89,478,485 pixels"),
    "PNG, 4 billion pixels": (png_of(65_535, 65_535, zlib.compress(bytes(65_536))), "more than 89,478,485 pixels"),
    "PNG, text bomb": (
        png_of(12, 8, zlib.compress(bytes(13 * 8)), chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200 << 20), 1))),
        "too large",
    ),
    "JPEG, magic alone": (b"\xff\xd8\xff\xe0", ""),
    "JPEG, magic and noise": (b"\xff\xd8\xff\xe0" + random.Random(0).randbytes(500), ""),
    "JPEG, half": (GOOD_JPEG[: len(GOOD_JPEG) // 2], "truncated"),
    "JPEG, header alone": (GOOD_JPEG[:300], ""),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_named_and_skipped(case, tmp_path):
    content, reason = DAMAGED[case]
    fill(tmp_path / "own", 9)
    expected = as_set(every(load_folder(tmp_path / "own")))
    bad = write(tmp_path / "own" / "bad.jpg", content)
    for _ in range(2):  # the second time from what was kept
        dataset = load_folder(tmp_path / "own")
        ((path, found),) = dataset.skipped
        assert path == "bad.jpg"
        assert reason in found and found and "\n" not in found and str(tmp_path) not in found
        assert as_set(every(dataset)) == expected
        with pytest.raises(ValueError) as raised:
            load_folder(tmp_path / "own", strict=True)
        assert str(raised.value) == f"{bad} is not read: {found} (strict)"


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_every_truncation_and_many_flipped_bytes(kind, tmp_path):
    """A file is read or it raises an error that can be caught; what is cut off is read only if no pixel is missing."""
    content = packed(picture(3, size=(6, 5)), kind)
    path = tmp_path / f"a.{kind.lower()}"
    write(path, content)
    whole = pictures.read_picture(path).tobytes()
    cut = [content[:length] for length in range(0, len(content), 1 if kind == "PNG" else 3)]
    generator = random.Random(0)
    flipped = []
    for _ in range(150):
        damaged = bytearray(content)
        damaged[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        flipped.append(bytes(damaged))
    read = 0
    for damaged in cut:
        path.write_bytes(damaged)
        try:
            assert pictures.read_picture(path).tobytes() == whole
            read += 1
        except (OSError, ValueError, SyntaxError):
            pass
    assert read <= 20  # a PNG's last checksums, 20 bytes, hold no pixels
    for damaged in flipped:
        path.write_bytes(damaged)
        try:
            image = pictures.read_picture(path)
        except Exception:
            continue
        assert image.mode in ("L", "RGB")
        assert pictures.fit(image, "L", 4, 4).shape == (4, 4)


def test_damage_decides_nothing(tmp_path):
    """A colour picture of another size that is cut off makes the others neither RGB nor 64 x 64, nor moves them."""
    fill(tmp_path / "own", 40)
    before = load_folder(tmp_path / "own")
    content = packed(picture(0, size=(90, 70), mode="RGB"))
    for number in range(10):
        write(tmp_path / "own" / f"bad{number}.png", content[:-40])
    after = load_folder(tmp_path / "own")
    assert len(after.skipped) == 10
    assert torch.equal(after.train_images, before.train_images) and torch.equal(after.test_images, before.test_images)


def test_a_damaged_file_keeps_the_number_of_its_class(tmp_path):
    for name in ("a", "b"):
        fill(tmp_path / name, 5)
    write(tmp_path / "aa" / "bad.png", b"nothing")
    dataset = load_folder(tmp_path)
    assert dataset.class_names == ("a", "aa", "b")
    assert set(dataset.train_labels.tolist()) <= {0, 2}


@pytest.mark.skipif(os.name != "posix", reason="pipes and links are those of POSIX")
def test_what_is_no_regular_file(tmp_path):
    """Nothing hangs: not a pipe without a writer, not a link to itself or to a folder above."""
    root = tmp_path / "own"
    fill(root, 9)
    os.mkfifo(root / "pipe.png")
    (root / "null.png").symlink_to("/dev/null")
    (root / "dangling.png").symlink_to(root / "absent.png")
    (root / "itself.png").symlink_to(root / "itself.png")
    (root / "loop").symlink_to(root)
    (root / "deep").mkdir()
    (root / "deep" / "up").symlink_to(tmp_path)
    (root / "folder.png").mkdir()
    write(root / "folder.png" / "inner.png", picture(9))
    write(tmp_path / "elsewhere" / "linked.png", picture(10))
    dataset = load_folder(root)
    assert {item.path: item.reason for item in dataset.skipped} == {
        "pipe.png": "not a regular file",
        "null.png": "not a regular file",
        "dangling.png": "No such file or directory",
        "itself.png": "Too many levels of symbolic links",
    }
    # Links to files and folders are followed, each folder once.
    assert as_set(every(dataset)) == {picture(number).tobytes() for number in range(11)}
    assert len(every(dataset)) == 11


def test_what_may_not_be_read(tmp_path, monkeypatch):
    """Files and folders without permission, and without asking the file system, for root may read everything."""
    root = tmp_path / "own"
    fill(root, 9)
    closed = write(root / "closed.png", picture(9))
    write(root / "shut" / "inner.png", picture(10))
    original_scandir, original_open = os.scandir, Image.open

    def scandir(path):
        if Path(path).name == "shut":
            raise PermissionError(13, "Permission denied", str(path))
        return original_scandir(path)

    def open_image(path, **options):
        if path == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return original_open(path, **options)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(Image, "open", open_image)
    dataset = load_folder(root)
    assert set(dataset.skipped) == {("closed.png", "Permission denied"), ("shut", "Permission denied")}
    assert len(every(dataset)) == 9
    with pytest.raises(ValueError, match=r"own/shut is not read: Permission denied \(strict\)"):
        load_folder(root, strict=True)
    with pytest.raises(PermissionError, match="shut"):
        load_folder(root / "shut")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have names in Unicode")
def test_names_of_any_bytes(tmp_path):
    root = tmp_path / "own"
    fill(root, 5)
    for name, content in ((b"\xff\xfe.png", GOOD), (b"\xff\xfd.png", b"nothing"), (b"a\nb.png", b"nothing")):
        with open(os.path.join(os.fsencode(root), name), "wb") as file:
            file.write(content)
    for _ in range(2):
        dataset = load_folder(root)
        assert {os.fsencode(item.path) for item in dataset.skipped} == {b"\xff\xfd.png", b"a\nb.png"}
        assert len(every(dataset)) == 6


# ------------------------------------------------------------------------------------------------------- what is kept


@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that were decoded, in order."""
    names = []
    original = decoded_module.read_picture

    def read(path):
        names.append(path.name)
        return original(path)

    monkeypatch.setattr(decoded_module, "read_picture", read)
    return names


def test_pictures_are_decoded_once(tmp_path, cache, decoded):
    paths = fill(tmp_path / "own", 10)
    first = load_folder(tmp_path / "own")
    assert sorted(decoded) == [path.name for path in paths]
    assert sorted(path.suffix for path in cache.iterdir()) == [".bytes", ".json"]
    decoded.clear()
    second = load_folder(tmp_path / "own")
    assert decoded == []
    assert torch.equal(first.train_images, second.train_images)
    for change in (
        lambda: write(tmp_path / "own" / "more.png", picture(10)),
        lambda: paths[0].unlink(),
        lambda: paths[1].rename(paths[0]),
        lambda: write(paths[2], picture(11)),
        lambda: os.utime(paths[3], (1, 1)),
        lambda: paths[4].chmod(0o600),
    ):
        change()
        load_folder(tmp_path / "own")
        assert decoded
        decoded.clear()
        load_folder(tmp_path / "own")
        assert decoded == []
    load_folder(tmp_path / "own", image_size=6)
    assert decoded


OTHER_JSON = {
    "other json": json.dumps({"shape": 3}),
    "a list": "[]",
    "deep json": "[" * 100_000,
    "no text": b"\xff\xfe",
}
DAMAGES = [
    "no bytes",
    "cut bytes",
    "a flipped bit",
    "no json",
    "cut json",
    "another shape",
    "another reason",
    *OTHER_JSON,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_whole_is_made_again(damage, tmp_path, cache, decoded):
    fill(tmp_path / "own", 10)
    write(tmp_path / "own" / "bad.png", b"nothing")
    before = load_folder(tmp_path / "own")
    first, skipped = every(before).clone(), before.skipped
    del before
    (bytes_path,), (json_path,) = cache.glob("*.bytes"), cache.glob("*.json")
    if damage == "no bytes":
        bytes_path.unlink()
    elif damage == "cut bytes":
        bytes_path.write_bytes(bytes_path.read_bytes()[:-1])
    elif damage == "no json":
        json_path.unlink()
    elif damage == "cut json":
        json_path.write_bytes(json_path.read_bytes()[:-1])
    elif damage == "a flipped bit":
        content = bytearray(bytes_path.read_bytes())
        content[len(content) // 2] ^= 4
        bytes_path.write_bytes(content)
    elif damage == "another shape":
        json_path.write_text(json_path.read_text().replace("[10, 8, 12, 1]", "[10, 12, 8, 1]"))
    elif damage == "another reason":
        json_path.write_text(json_path.read_text().replace("bad.png", "000.png"))
    else:
        content = OTHER_JSON[damage]
        json_path.write_bytes(content if isinstance(content, bytes) else content.encode())
    decoded.clear()
    after = load_folder(tmp_path / "own")
    assert torch.equal(every(after), first) and after.skipped == skipped
    assert decoded
    decoded.clear()
    load_folder(tmp_path / "own")
    assert decoded == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()], ids=repr)
def test_an_interrupt_leaves_no_file(error, tmp_path, cache, monkeypatch):
    fill(tmp_path / "own", 5)

    def stop(*_):
        raise error

    monkeypatch.setattr(decoded_module, "fit", stop)
    with pytest.raises(type(error)):
        load_folder(tmp_path / "own")
    assert list(cache.iterdir()) == []


def test_a_full_disk_is_named(tmp_path, cache, monkeypatch):
    fill(tmp_path / "own", 5)
    write(tmp_path / "cache" / "folders", b"in the way")
    with pytest.raises(OSError, match=r"\(see the variable FASTVAE_DATA\): '.*/cache/folders'"):
        load_folder(tmp_path / "own")
    assert len(every(load_folder(tmp_path / "own", cache_dir=tmp_path / "other"))) == 5


def test_memory_does_not_grow_with_the_number_of_pictures(tmp_path):
    """300 pictures of 128 x 128 x 3, 14 MB, from one file of 64 x 64 by many names: mapped, and decoded one by one."""
    first = write(tmp_path / "own" / "000.png", picture(0, size=(64, 64), mode="RGB"))
    for number in range(1, 300):
        os.link(first, tmp_path / "own" / f"{number:03}.png")
    load_folder(tmp_path / "own", image_size=8)  # whatever is loaded at first
    tracemalloc.start()
    try:
        dataset = load_folder(tmp_path / "own", image_size=128)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert every(dataset).shape == (300, 3, 128, 128)
    assert peak < 4 << 20  # a picture at a time, and blocks of a megabyte where the checksum is computed
    # The loop's own format: no copy is made of all images.
    images = dataset.train_images
    assert images.contiguous(memory_format=torch.channels_last).data_ptr() == images.data_ptr()
