"""Which layouts a kernel reads directly, and which are copied first.

A kernel reads a tensor [B, ...] as rows, one per sample, at distance stride(0). Each row is dense in some order of its
dimensions: contiguous, channels_last, a slice of the batch, or mu and logvar as halves of one [B, 2K]. The tensors of
one call must have the same order. Any other tensor is copied once, by one `Tensor.copy_`, before the launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from math import prod
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

Strides = tuple[int, ...]
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def remembered(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """`function` with its results kept. A result that depends only on shapes and strides is computed once per layout,
    not at every call.
    """
    kept = lru_cache(maxsize=4096)(function)

    @wraps(function)
    def call(*arguments: Parameters.args, **named: Parameters.kwargs) -> Result:
        try:
            return kept(*arguments, **named)
        except TypeError:  # the symbolic sizes of torch.compile have no hash
            return function(*arguments, **named)

    return call


def event_size(tensor: Tensor) -> int:
    """Elements per sample."""
    return prod(tensor.shape[1:])


def has_dense_rows(tensor: Tensor) -> bool:
    """Whether each sample has the strides of a contiguous tensor, in some order of its dimensions."""
    return tensor.is_contiguous() or _rows_are_dense(tensor.shape, tensor.stride())


@remembered
def _rows_are_dense(shape: torch.Size, strides: Strides) -> bool:
    expected = 1
    for stride, length in sorted(zip(strides[1:], shape[1:], strict=True)):
        if length != 1:
            if stride != expected:
                return False
            expected *= length
    return True


def dense_strides(tensor: Tensor) -> Strides:
    """The strides of a dense tensor with the batch outermost and the other dimensions in the order of `tensor`'s
    strides.
    """
    return dense_strides_of(tensor.shape, tensor.stride(), tensor.is_contiguous())


@remembered
def dense_strides_of(shape: torch.Size, strides: Strides, contiguous: bool = False) -> Strides:
    """`dense_strides` of a tensor of this shape, in the order of these strides."""
    if contiguous:
        # Not stride(0), which says nothing where the batch is 1.
        return (prod(shape[1:]), *strides[1:]) if shape else ()
    dense = [0] * len(shape)
    size = 1
    for d in sorted(range(1, len(shape)), key=lambda d: (-strides[d], d), reverse=True):
        dense[d] = size
        size *= shape[d]
    dense[0] = size
    return tuple(dense)


def with_dense_rows(tensor: Tensor) -> Tensor:
    """`tensor` if it has dense rows, else a dense copy."""
    # As x.conj().imag is negative: the minus is not in memory yet.
    return tensor if has_dense_rows(tensor) and not tensor.is_neg() else with_strides(tensor, dense_strides(tensor))


def has_strides(tensor: Tensor, strides: Strides) -> bool:
    """Whether `tensor` has these strides. The stride of a dimension of size 1 does not matter."""
    return tensor.stride() == strides or all(
        own == wanted or length == 1 for own, wanted, length in zip(tensor.stride(), strides, tensor.shape, strict=True)
    )


def with_strides(tensor: Tensor, strides: Strides) -> Tensor:
    """`tensor` if it has these strides, else a copy that has them."""
    if has_strides(tensor, strides) and not tensor.is_neg():
        return tensor
    return tensor.new_empty_strided(tensor.shape, strides).copy_(tensor)


def read_together(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors with dense rows and equal strides. Tensors with another layout are copied. The target's samples may
    lie at another distance than the parameters' samples, because parameters are often parts of one larger tensor.
    """
    *parameters, target = tensors
    first = parameters[0] = with_dense_rows(parameters[0])
    for parameter in parameters[1:]:  # a loop, because this is asked at each call
        if not has_strides(parameter, first.stride()) or parameter.is_neg():
            strides = dense_strides(first)
            parameters = [with_strides(parameter, strides) for parameter in parameters]
            break
    if not has_strides(target, (target.stride(0), *first.stride()[1:])) or target.is_neg():
        target = with_strides(target, dense_strides(first))
    return [*parameters, target]


def in_order_of(tensor: Tensor, strides: Strides) -> Tensor:
    """`tensor` if its memory order is that of one of these strides, else a dense copy in that order.

    A saved tensor may have other strides after its hooks than before, and noise is computed in memory order.
    """
    return tensor if has_strides(tensor, strides) else with_strides(tensor, dense_strides_of(tensor.shape, strides))


def gradient_strides(tensor: Tensor) -> Strides:
    """The strides of the gradient of `tensor`: its own where they are dense, else those that torch gives to its
    gradients.
    """
    return dense_strides(tensor) if has_dense_rows(tensor) else torch.empty_like(tensor).stride()


def in_format_of(inputs: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    """The gradients of `inputs`, dense as they were written, at the strides of `gradient_strides`."""
    return [
        gradient if gradient.stride() == tensor.stride() else with_strides(gradient, gradient_strides(tensor))
        for tensor, gradient in zip(inputs, gradients, strict=True)
    ]


def empty_gradients(*tensors: Tensor) -> list[Tensor]:
    """Uninitialised gradients of `tensors`."""
    return [tensor.new_empty_strided(tensor.shape, gradient_strides(tensor)) for tensor in tensors]
