"""How tensors may lie in memory, and what a test asks of memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def poison(x: Tensor) -> Tensor:
    """What lies in the gaps of a sliced tensor: whoever reads it gets a wrong result."""
    return torch.full_like(x, 255 if x.dtype is torch.uint8 else math.nan)


def channels_last(x: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats.get(x.ndim, torch.contiguous_format))


def overlapping(x: Tensor) -> Tensor:
    """Rows that begin one element after each other, as a sliding window has them."""
    if x.numel() == 0:
        return x
    needed = x[0].numel() + x.shape[0] - 1
    return x.flatten()[:needed].clone().as_strided(x.shape, (1, *x.contiguous().stride()[1:]))


def strided(x: Tensor, order: Sequence[int], steps: Sequence[int], expanded: Sequence[bool]) -> Tensor:
    """The dimensions lie in memory in `order`, their elements `steps` apart, and those that are `expanded` once."""
    once = x[tuple(slice(0, 1) if single else slice(None) for single in expanded)]
    stored = poison(x.new_empty([once.shape[d] * steps[d] for d in order]))
    view = stored.permute([order.index(d) for d in range(x.ndim)])[tuple(slice(None, None, step) for step in steps)]
    view.copy_(once)
    return view.expand(x.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": channels_last,
    "sliced_batch": lambda x: torch.stack([poison(x), x], 1).flatten(0, 1)[1::2],
    "sliced_inner": lambda x: torch.cat([poison(x), x], -1)[..., x.shape[-1] :],
    "transposed": lambda x: x.transpose(1, -1).contiguous().transpose(1, -1),
    "batch_innermost": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "expanded_batch": lambda x: x[:1].expand_as(x),
    "expanded_inner": lambda x: x[..., :1].expand_as(x),
    "overlapping": overlapping,
}


def memory(tensor: Tensor) -> Tensor:
    """Every byte of the tensor's storage, the gaps between its elements too."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def assert_strides_of(tensor: Tensor, gradient: Tensor) -> None:
    """The gradient has the strides that torch gives to what is made like `tensor`: its own, if it is dense."""
    overlaps = memory(tensor).numel() < tensor.numel() * tensor.itemsize
    if tensor.numel() and not overlaps:
        strides = zip(gradient.stride(), torch.empty_like(tensor).stride(), tensor.shape, strict=True)
        assert all(own == like for own, like, length in strides if length > 1), gradient.stride()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal strides and bytes, NaN included."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.stride() == b.stride() and torch.equal(a.detach().view(integer), b.detach().view(integer))
