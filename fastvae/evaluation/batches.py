"""Images in batches, with noise that is the same each time and leaves the random numbers of training where they were.

Partial batches are kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Bounds the memory: at 28x28, the largest activations (32 channels in float32) take 51 MB.
BATCH = 512


def seeded_generator(images: Tensor, seed: int = 0) -> torch.Generator:
    """A generator of its own, on the images' device."""
    return torch.Generator(images.device).manual_seed(seed)


def check_images(images: Tensor) -> None:
    """Raise ``ValueError`` if there are no images."""
    if images.shape[0] == 0:
        raise ValueError(f"images must hold at least one image, got shape {list(images.shape)}")
