"""Convert a picture of any size and kind to bytes of a given size. Pillow reads the files."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import PIL.Image

# What Pillow opens and leaves to another program, or to code that it does not bring.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
_GREY_MODES = ("1", "L", "LA", "La")
# Its readers bring grayscale of more than 8 bits to 16, in a mode of 32.
_SIXTEEN_BITS_IN_32 = ("PNG", "PPM")


def require_pillow() -> None:
    """Raise ``ImportError`` where Pillow is missing."""
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError('folders of images need Pillow: pip install "fastvae[examples]"') from error


@functools.cache
def picture_endings() -> Mapping[str, str]:
    """The file name endings, such as ".png", that this version of Pillow reads, and the format of each."""
    from PIL import Image

    endings = Image.registered_extensions()  # loads every format
    formats = {*Image.OPEN, "MPO"} - _NOT_DECODED  # the reader of JPEG reads MPO too
    return {ending: name for ending, name in endings.items() if name in formats}


def _formats(path: Path) -> list[str]:
    """What the file may be: a format whose first bytes are known, whatever its name, or else the one of its name."""
    from PIL import Image

    own = picture_endings().get(path.suffix.lower())
    return [
        name
        for name, (_, begins) in Image.OPEN.items()
        if name not in _NOT_DECODED and (begins is not None or name == own)
    ]


def read_picture(path: Path) -> PIL.Image.Image:
    """Read a file of any format that Pillow reads, as an upright Pillow image of mode "L" (grayscale) or "RGB", 8 bits.

    The EXIF orientation is applied. Transparent parts are shown on white. 16-bit values become round(x / 257). Floats
    must lie in [0, 1] and become round(255 x). Palettes and CMYK become RGB. If there are several frames, the first is
    read.

    Raises ``OSError``, ``ValueError`` (also above ``PIL.Image.MAX_IMAGE_PIXELS``, Pillow's limit of 89 million pixels),
    and for damaged files errors of many kinds.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not path.is_file():  # to open a pipe would wait for its writer
        path.stat()
        raise ValueError("not a regular file")
    if path.stat().st_size == 0:
        raise ValueError("the file is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what can be read all the same, as damaged EXIF data
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path, formats=_formats(path)) as file:
                file.load()
                kind = file.format
                image: Image.Image = ImageOps.exif_transpose(file)
        except UnidentifiedImageError:
            raise ValueError("not a picture that Pillow reads") from None  # its message is a path
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise ValueError(f"more than {Image.MAX_IMAGE_PIXELS:,} pixels") from error
    if image.mode == "F":
        return Image.fromarray(_levels(np.asarray(image)))
    if image.mode == "I" and kind not in _SIXTEEN_BITS_IN_32:
        raise ValueError("its pixels are integers with a sign or of 32 bits, expected 8 or 16 bits without a sign")
    if image.mode.startswith("I"):
        values = np.asarray(image).clip(0, 65535).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    mode = "L" if image.mode in _GREY_MODES else "RGB"
    if not image.has_transparency_data:
        return image.convert(mode)
    image = image.convert("LA" if mode == "L" else "RGBA")
    opaque = Image.new(mode, image.size, "white")
    opaque.paste(image.convert(mode), mask=image.getchannel("A"))
    return opaque


def _levels(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 1):  # NaN is neither
        raise ValueError(f"its pixels are floats from {low:g} to {high:g}, expected floats in [0, 1], or 8 or 16 bits")
    return np.rint(255 * values.astype(np.float64)).astype(np.uint8)


def fit(image: PIL.Image.Image, mode: str, height: int, width: int) -> NDArray[np.uint8]:
    """The picture's bytes: [height, width] for "L", [height, width, 3] for "RGB".

    The picture is cropped to the aspect ratio, equally on both sides, and then resized with Lanczos's filter, which is
    widened if the picture shrinks (antialiasing).
    """
    from PIL import Image

    image = image.convert(mode)
    kept_width = min(image.width, image.height * width / height)
    kept_height = min(image.height, image.width * height / width)
    left, top = (image.width - kept_width) / 2, (image.height - kept_height) / 2
    box = (left, top, left + kept_width, top + kept_height)
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box=box))
