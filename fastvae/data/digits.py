"""A default dataset that needs no network: scikit-learn's handwritten digits in MNIST's format."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .dataset import ImageDataset

_TRAIN_COUNT = 1500
_LARGEST_VALUE = 16.0  # each value counts the ink pixels of a 4x4 block
_SCALE = 3
_CONTRAST = 3.0


def load_digits() -> ImageDataset:
    """1,797 handwritten digits, uint8 [N, 1, 28, 28], 0..255, with int64 labels [N].

    The first 1,500 are the training set, and the last 297 the test set. The originals are 8x8 with values 0 to 16. They
    are enlarged 3 times by bicubic interpolation, to digits that are 24 pixels tall in an empty border. Because this
    blurs the strokes, the contrast around middle grey is then raised 3 times, x -> 1/2 + 3 (x - 1/2) clamped to [0, 1].
    The digits are then white on black with soft edges, as MNIST's are.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository (its
    test part). Raises ``ImportError`` if scikit-learn is missing.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError('load_digits needs scikit-learn: pip install "fastvae[examples]"') from error
    originals = datasets.load_digits()
    # float64, so that rounding falls the same way on every machine.
    small = torch.from_numpy(originals.images).to(torch.float64).unsqueeze(1) / _LARGEST_VALUE
    # The empty pixels come before the enlargement, so that strokes at the edge fade out instead of being cut. 10x10
    # becomes 30x30; no ink reaches its outermost pixels.
    padded = F.pad(small, (1, 1, 1, 1))
    enlarged = F.interpolate(padded, scale_factor=_SCALE, mode="bicubic", align_corners=False)[:, :, 1:-1, 1:-1]
    sharpened = (0.5 + _CONTRAST * (enlarged - 0.5)).clamp(0.0, 1.0)
    images = (255.0 * sharpened).round().to(torch.uint8)
    labels = torch.from_numpy(originals.target).to(torch.int64)
    return ImageDataset(
        "digits", images[:_TRAIN_COUNT], labels[:_TRAIN_COUNT], images[_TRAIN_COUNT:], labels[_TRAIN_COUNT:]
    )
