"""A default dataset without a network: scikit-learn's handwritten digits, brought to MNIST's format."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .mnist import ImageDataset

_TRAIN_COUNT = 1500
_LARGEST_VALUE = 16.0  # each value counts the ink pixels of a 4x4 block
_MARGIN = 2


def load_digits() -> ImageDataset:
    """1,797 handwritten digits, uint8 [N, 1, 28, 28], 0..255, with int64 labels [N].

    The first 1,500 are the training set, the last 297 the test set. The originals are 8x8, 0..16, and their digits fill
    all 8 rows; they get 2 empty pixels on each side and are enlarged bicubically from 12x12 to 28x28, scaled by 255/16,
    clamped and rounded. So the digits are about 19 pixels tall, with an empty border, as MNIST's 20.

    Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository (its
    test part). Raises ``ImportError`` where scikit-learn is missing.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError('load_digits needs scikit-learn: pip install "fastvae[examples]"') from error
    originals = datasets.load_digits()
    # float64, so that rounding falls the same way on every machine.
    small = torch.from_numpy(originals.images).to(torch.float64).unsqueeze(1) * (255.0 / _LARGEST_VALUE)
    # The empty pixels come before the enlargement, so that strokes at the edge fade out instead of being cut.
    padded = F.pad(small, (_MARGIN, _MARGIN, _MARGIN, _MARGIN))
    enlarged = F.interpolate(padded, size=(28, 28), mode="bicubic", align_corners=False)
    images = enlarged.clamp(0.0, 255.0).round().to(torch.uint8)
    labels = torch.from_numpy(originals.target).to(torch.int64)
    return ImageDataset(
        "digits", images[:_TRAIN_COUNT], labels[:_TRAIN_COUNT], images[_TRAIN_COUNT:], labels[_TRAIN_COUNT:]
    )
