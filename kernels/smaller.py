"""Launch the kernel for likelihoods with parameters that are smaller than the target (`broadcast.broadcast_kernel`)."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .broadcast import COLUMN, ELEMENT, GROUP, SCALAR, broadcast_kernel
from .launch import Plan, launch, make_plan, ticket
from .layout import Strides, dense_strides, has_strides, in_format_of, read_together, remembered, with_strides
from .rows import Asked, constants_of
from .tiles import power_of_2, reduction_scale

if TYPE_CHECKING:
    from fastvae.likelihoods import Likelihood

# Upper limit on partial sums, because one program adds them all (128 per thread). Not measured on a GPU.
_MOST_PARTIAL_SUMS = 16384


_ELEMENT, _COLUMN, _GROUP, _SCALAR = (kind.value for kind in (ELEMENT, COLUMN, GROUP, SCALAR))


class Arrangement(NamedTuple):
    """The positions of smaller parameters in a target [batch * rows_per_sample, groups, columns]."""

    kinds: tuple[int, ...]  # of each parameter
    rows_per_sample: int
    groups: int
    columns: int


class Problem(NamedTuple):
    """Everything that determines the plan of a launch."""

    arrangement: Arrangement
    batch: int
    strides: tuple[int, int]  # of the rows of the parameters of kind _ELEMENT, and of those of the target
    itemsize: int  # of the target's shape: of the first parameter
    widest: int  # the largest itemsize of what has the target's shape


def _aligned(shape: torch.Size, rank: int) -> tuple[int, ...]:
    return (1,) * (rank - len(shape)) + tuple(shape)


@remembered
def arrange(target: torch.Size, strides: Strides, dense: bool, shapes: tuple[torch.Size, ...]) -> Arrangement:
    """The kinds of parameters with these shapes, given the order of the target's dimensions in memory, and whether its
    samples follow each other without a gap. A parameter that the kernel cannot read directly is of kind _ELEMENT and is
    copied to the target's shape.
    """
    order = [d for d in sorted(range(1, len(target)), key=lambda d: (-strides[d], d)) if target[d] > 1]
    sizes = [target[d] for d in order]
    kinds, rows_per_sample, groups = [], None, None
    for shape in shapes:
        full = _aligned(shape, len(target))
        varies = [full[d] > 1 for d in order]
        outer = varies.index(False) if False in varies else len(varies)  # so many dimensions vary before one does not
        inner = varies.index(True) if True in varies else len(varies)  # and so many do not, before one does
        if full == tuple(target) or full[0] > 1:
            kinds.append(_ELEMENT)
        elif not any(varies):
            kinds.append(_SCALAR)
        elif all(varies) and rows_per_sample in (None, 1):
            rows_per_sample = 1
            kinds.append(_COLUMN)
        elif all(varies[inner:]) and groups is None and rows_per_sample in (None, prod(sizes[:inner])) and dense:
            rows_per_sample = prod(sizes[:inner])
            kinds.append(_COLUMN)
        elif not any(varies[outer:]) and groups in (None, prod(sizes[:outer])) and rows_per_sample in (None, 1):
            rows_per_sample, groups = 1, prod(sizes[:outer])
            kinds.append(_GROUP)
        else:
            kinds.append(_ELEMENT)
    rows_per_sample, groups = rows_per_sample or 1, groups or 1
    return Arrangement(tuple(kinds), rows_per_sample, groups, prod(sizes) // rows_per_sample // groups)


@remembered
def strides_in_order(shape: torch.Size, target: torch.Size, strides: Strides) -> Strides:
    """Dense strides of a smaller parameter, with its dimensions in the memory order of the target's dimensions."""
    found, size = [0] * len(target), 1
    full = _aligned(shape, len(target))
    for d in sorted(range(len(target)), key=lambda d: (strides[d], -d)):
        found[d] = size
        size *= full[d]
    return tuple(found[len(target) - len(shape) :])


def has_smaller(tensors: Sequence[Tensor]) -> bool:
    """Whether a parameter is smaller than the target. The first parameter never is."""
    shape = tensors[0].shape
    for tensor in tensors[1:-1]:  # noqa: SIM110 - a loop, because this is asked at each call
        if tensor.shape != shape:
            return True
    return False


@remembered
def plan_broadcast(
    likelihood: Likelihood,
    problem: Problem,
    reduction: str,
    wanted: tuple[int, ...],
    kl_stride: int,
    loss_grad_stride: int,
) -> tuple[Plan, int, tuple[int, ...]]:
    """The plan; the number of partial sums of the terms; and those of each gradient that is a sum."""
    (kinds, rows_per_sample, groups, columns), batch, strides, itemsize, widest = problem
    rows, per_row = batch * rows_per_sample, reduction == "none"
    # Two vectors of 16 bytes per thread and tensor with 4 warps, as in `tiles.cut`.
    size = 4 * 128 if likelihood.heavy else 2 * 128 * 16 // itemsize
    # Rows of one or two cache lines where columns are summed, else as long as a tile.
    width = min(max(4, power_of_2(columns)), 64 if _COLUMN in kinds else size)
    height = min(size // width, power_of_2(rows))
    chunks = -(-columns // width)
    summed = tuple(k for k in wanted if k < len(kinds) and kinds[k] != _ELEMENT)
    partials_of_a_block = chunks * groups * (width if _COLUMN in kinds else 1)
    blocks = min(-(-rows // height), max(1, _MOST_PARTIAL_SUMS // partials_of_a_block))
    programs = chunks * groups * blocks
    alignment = gcd(16, columns, *strides)
    constants = {
        **constants_of(likelihood),
        "KINDS": kinds,
        "WANTED": tuple(k for k in wanted if k not in summed),
        "SUMMED": summed,
        "PER_ROW": per_row,
        "ALIGNMENT": alignment,
        "VECTOR": min(16 // widest, alignment),
        "ROWS": height,
        "COLUMNS": width,
    }
    event = rows_per_sample * groups * columns
    plan = make_plan(
        programs,
        4,
        rows,
        columns // alignment,
        *[stride // alignment for stride in strides],
        groups,
        chunks,
        blocks,
        rows_per_sample,
        kl_stride,
        loss_grad_stride,
        batch,
        reduction_scale(reduction, batch, event),
        **constants,
    )
    of_terms = rows * groups * chunks if per_row else programs
    of_sums = tuple(blocks * groups * columns if kinds[k] == _COLUMN else programs for k in summed)
    return plan, of_terms, of_sums


def broadcast(
    likelihood: Likelihood,
    tensors: Sequence[Tensor],
    reduction: str,
    needed: Sequence[bool],
    asked: Asked,
) -> list[Tensor]:
    """Fill the tensors that are not None, and return the gradients that are needed. The batch must not be empty. The
    arguments are those of `broadcast_kernel`.
    """
    *parameters, target = tensors
    shape = target.shape
    # The first parameter has the target's shape, so it gives the order of the dimensions in memory.
    order = dense_strides(parameters[0])
    shapes = tuple(parameter.shape for parameter in parameters)
    dense = all(tensor.stride(0) == order[0] for tensor in (parameters[0], target))
    arrangement = arrange(shape, order, dense, shapes)
    kinds = arrangement.kinds
    of_elements = [p.expand(shape) for p, kind in zip(parameters, kinds, strict=True) if kind == _ELEMENT]
    *of_elements, target = together = read_together([*of_elements, target])
    order = dense_strides(target)
    each = iter(of_elements)
    read = tuple(
        next(each) if kind == _ELEMENT else with_strides(p, strides_in_order(p.shape, shape, order))
        for p, kind in zip(parameters, kinds, strict=True)
    )
    # A parameter that was copied to the target's shape gets its gradient as a sum, made by torch from float32.
    gradients = [
        _empty_gradient(tensor, kind, shape, order)
        for tensor, kind, need in zip(tensors, (*kinds, _ELEMENT), needed, strict=True)
        if need
    ]
    wanted = tuple(k for k, need in enumerate(needed) if need)
    of_element = [g for k, g in zip(wanted, gradients, strict=True) if (*kinds, _ELEMENT)[k] == _ELEMENT]
    of_smaller = [g for k, g in zip(wanted, gradients, strict=True) if (*kinds, _ELEMENT)[k] != _ELEMENT]
    rows_per_sample = arrangement.rows_per_sample
    strides = (together[0].stride(0) // rows_per_sample, target.stride(0) // rows_per_sample)
    sizes = [tensor.element_size() for tensor in together]
    problem = Problem(arrangement, shape[0], strides, sizes[0], max(sizes))
    plan, of_terms, of_sums = plan_broadcast(
        likelihood, problem, reduction, wanted, asked.kl_stride, asked.loss_grad_stride(reduction)
    )

    def partials(count: int) -> Tensor:
        return target.new_empty(count, dtype=torch.float32)

    launch(
        broadcast_kernel,
        plan,
        target.device,
        read,
        target,
        asked.kl,
        *asked.values,
        *asked.upstream,
        tuple(of_element),
        asked.kl_grad,
        tuple(of_smaller),
        partials(of_terms) if asked.values[0] is not None else None,
        tuple(map(partials, of_sums)),
        ticket(target.device),
        *asked.weights,
    )
    inputs = [tensors[k] for k in wanted]
    summed = [
        gradient if gradient.shape == tensor.shape else _summed_to(gradient, tensor)
        for tensor, gradient in zip(inputs, gradients, strict=True)
    ]
    return in_format_of(inputs, summed)


def _empty_gradient(tensor: Tensor, kind: int, shape: torch.Size, order: Strides) -> Tensor:
    if kind != _ELEMENT:
        strides = strides_in_order(tensor.shape, shape, order)
        return tensor.new_empty_strided(tensor.shape, tensor.stride() if has_strides(tensor, strides) else strides)
    dtype = tensor.dtype if tensor.shape == shape else torch.float32
    return tensor.new_empty_strided(shape, order, dtype=dtype)


def _summed_to(gradient: Tensor, tensor: Tensor) -> Tensor:
    return gradient.sum_to_size(_aligned(tensor.shape, gradient.ndim)).view(tensor.shape).to(tensor.dtype)
