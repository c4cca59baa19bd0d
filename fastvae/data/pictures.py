"""A picture of any size and kind, brought to bytes of a given size. Pillow does the reading."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import PIL.Image

_FORMATS = ("PNG", "JPEG")
_GREY_MODES = ("1", "L", "LA", "La")


def require_pillow() -> None:
    """Raise ``ImportError`` where Pillow is missing."""
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError('folders of images need Pillow: pip install "fastvae[examples]"') from error


def read_picture(path: Path) -> PIL.Image.Image:
    """A PNG or JPEG file as a Pillow image of mode "L" (grayscale) or "RGB", 8 bits, upright.

    Its EXIF orientation is applied. What is transparent is laid over white. 16 bits become 8, round(x / 257). Palettes
    and CMYK become RGB. Of several frames the first is read.

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
            with Image.open(path, formats=_FORMATS) as file:
                file.load()
                image: Image.Image = ImageOps.exif_transpose(file)
        except UnidentifiedImageError:
            raise ValueError("neither a PNG nor a JPEG image") from None  # its message is a path
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise ValueError(f"more than {Image.MAX_IMAGE_PIXELS:,} pixels") from error
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


def fit(image: PIL.Image.Image, mode: str, height: int, width: int) -> NDArray[np.uint8]:
    """The picture's bytes in "L", [height, width], or "RGB", [height, width, 3].

    What lies beyond the aspect ratio asked for is cut off, equally on both sides; the rest is resized with Lanczos's
    filter, which is widened when it shrinks (antialiased).
    """
    from PIL import Image

    image = image.convert(mode)
    kept_width = min(image.width, image.height * width / height)
    kept_height = min(image.height, image.width * height / width)
    left, top = (image.width - kept_width) / 2, (image.height - kept_height) / 2
    box = (left, top, left + kept_width, top + kept_height)
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box=box))
