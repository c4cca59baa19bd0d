"""3x3 convolutions of stride 2 with "same" padding, and their adjoints: the layers that halve and double an image.

"Same" padding means out = ceil(in / 2). That takes total = (out - 1) * 2 + 3 - in more pixels, 1 for an even size and
2 for an odd one: floor(total / 2) before the image and the rest after it. So an even size is padded below and to the
right only. PyTorch's ``padding=1``, and ``padding=1, output_padding=1``, would shift such an image by one pixel.

Source: MathWorks, Deep Learning Toolbox, convolution2dLayer ("same" padding), transposedConv2dLayer ("same" cropping).
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

KERNEL = 3
STRIDE = 2


class Padding(NamedTuple):
    """Of one dimension: ``both`` pixels before and after it, and ``extra`` (0 or 1) more after it."""

    both: int
    extra: int


def same_padding(size: int) -> Padding:
    """What a dimension of ``size`` pixels is padded with."""
    total = (halved(size) - 1) * STRIDE + KERNEL - size
    return Padding(total // 2, total % 2)


def halved(size: int) -> int:
    """ceil(size / 2), the size after a convolution."""
    return -(-size // STRIDE)


# PyTorch's convolutions pad and crop symmetrically; the extra pixel has three exact forms. Forward and backward in ms,
# of the default network's second convolution (32,14,14) and second transposed convolution (64,14,14), float32,
# channels_last, batch 128, one thread of a Xeon with AVX-512, torch 2.13.0, the best of 15:
#     convolution:  padded images 16, a zero-padded 4x4 kernel 19
#     transposed:   padded images 79, a zero-padded 4x4 kernel 94, the full output cropped by slicing 130


class Downsample(nn.Conv2d):
    """[B, in, H, W] -> [B, out, ceil(H / 2), ceil(W / 2)]: a 3x3 convolution of stride 2 with "same" padding."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, KERNEL, STRIDE)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = same_padding(x.shape[2]), same_padding(x.shape[3])
        x = F.pad(x, (0, columns.extra, 0, rows.extra))
        return F.conv2d(x, self.weight, self.bias, STRIDE, padding=(rows.both, columns.both))


class Upsample(nn.ConvTranspose2d):
    """[B, in, ceil(H / 2), ceil(W / 2)] -> [B, out, H, W]: the adjoint of `Downsample` on images of ``size`` (H, W)."""

    def __init__(self, in_channels: int, out_channels: int, size: tuple[int, int]) -> None:
        super().__init__(in_channels, out_channels, KERNEL, STRIDE)
        self.size = size

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        rows, columns = same_padding(self.size[0]), same_padding(self.size[1])
        # The full output, 2 * ceil(H / 2) + 1 rows, is to lose `both` rows before and `both + extra` after. A zero row
        # before the input (a quarter of the output's pixels) puts STRIDE rows before the output: then it loses
        # `both + STRIDE * extra` on either side, less the `extra` rows of output_padding, which are kept at its end.
        x = F.pad(x, (columns.extra, 0, rows.extra, 0))
        return F.conv_transpose2d(
            x,
            self.weight,
            self.bias,
            STRIDE,
            padding=(rows.both + STRIDE * rows.extra, columns.both + STRIDE * columns.extra),
            output_padding=(rows.extra, columns.extra),
        )

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, size={self.size}"
