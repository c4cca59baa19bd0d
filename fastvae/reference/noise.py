"""Noise that depends on the position in a batch, in plain PyTorch: the noise that the fused operations draw.

Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011, in torch's counter layout (see
`fastvae.kernels.noise`). Normals: Box and Muller, 1958.
"""

from __future__ import annotations

import math
from math import prod

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def addressed_noise(like: Tensor, generator: torch.Generator | None, batch_offset: int) -> Tensor:
    """Standard normal noise with the shape and dtype of `like`, [B, ...], for the samples from number batch_offset on
    of a larger batch.

    One seed is drawn, for any size. The noise of a sample depends only on the seed and the sample's number, and is laid
    out in the order of the sample's strides.
    """
    batch, *sizes = like.shape
    event = prod(sizes)
    seed, offset = torch.randint(0, 2**63 - 1, (2,), device=like.device, generator=generator).unbind()
    position = batch_offset * event + torch.arange(batch * event, device=like.device)
    words = torch.stack(philox_words(seed, offset, position // 4))
    # Words 0 and 1 make the first two normals of four, words 2 and 3 the others.
    radius_word, angle_word = torch.where(position % 4 < 2, words[:2], words[2:])
    radius = torch.sqrt(-2.0 * torch.log(radius_word.to(like.dtype) * 2.0**-32 + 2.0**-33))
    signed = torch.where(angle_word < 2**31, angle_word, angle_word - 2**32)
    angle = signed.to(like.dtype) * (math.pi * 2.0**-31)
    noise = radius * torch.where(position % 2 == 0, torch.cos(angle), torch.sin(angle))
    outermost_first = sorted(range(1, like.ndim), key=like.stride, reverse=True)
    in_memory = noise.view(batch, *[like.shape[d] for d in outermost_first])
    return in_memory.permute(0, *[1 + outermost_first.index(d) for d in range(1, like.ndim)])


def philox_words(seed: Tensor, offset: Tensor, subsequence: Tensor) -> tuple[Tensor, ...]:
    """The four words for counters (offset / 4, subsequence) and the key `seed`: 32 bits each, in int64."""
    c0, c1, c2, c3 = offset >> 2 & _LOW, offset >> 34, subsequence & _LOW, subsequence >> 32
    k0, k1 = seed & _LOW, seed >> 32 & _LOW
    for _ in range(10):
        # A product may wrap around; its 64 bits are right all the same.
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32 & _LOW) ^ c1 ^ k0, p1 & _LOW, (p0 >> 32 & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = k0 + 0x9E3779B9 & _LOW, k1 + 0xBB67AE85 & _LOW
    return c0, c1, c2, c3
