"""Launch the kernel for likelihoods whose elements have an axis of their own (`grouped.grouped_kernel`)."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd, prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .grouped import grouped_kernel
from .launch import Plan, launch, make_plan, ticket
from .layout import Strides, gradient_strides, in_format_of, remembered
from .rows import Asked
from .tiles import cut_elements, power_of_2, reduction_scale, sum_blocks

if TYPE_CHECKING:
    from fastvae.likelihoods import Likelihood


# The longest axis that a program holds whole: 16 numbers of each tensor per thread of 8 warps, as in `tiles.cut`.
LONGEST = 4096


def terms_of_a_sample(likelihood: Likelihood, tensors: Sequence[Tensor]) -> int:
    """The number of values of the formula in a sample."""
    shape = tensors[0].shape
    if not likelihood.grouped:
        return prod(shape[1:])
    axis = likelihood.grouping(shape, tensors[-1].shape).axis
    return prod(shape[1:axis]) * prod(shape[axis + 1 :])


class Lying(NamedTuple):
    """The strides of a tensor [rows, elements, axis]."""

    row: int
    element: int
    axis: int


class Problem(NamedTuple):
    """Everything that determines the plan of a launch."""

    batch: int
    elements: int  # of a sample
    slots: int
    size: int
    targets: int
    target_has_axis: bool
    parameters: Lying
    target: Lying
    gradient: Lying | None


@remembered
def lying(shape: torch.Size, strides: Strides, axis: int | None) -> Lying | None:
    """The strides of a tensor if all its dimensions except the batch and the axis are merged into one, or None if they
    cannot be merged. The stride of a dimension of size 1 is 0.
    """
    if 0 in shape:
        return Lying(0, 0, 0)  # nothing lies anywhere
    element, expected = 0, None
    for d in range(len(shape) - 1, 0, -1):
        if d == axis or shape[d] == 1:
            continue
        if expected is None:
            element = expected = strides[d]
        elif strides[d] != expected:
            return None
        expected *= shape[d]
    along = strides[axis] if axis is not None and shape[axis] > 1 else 0
    return Lying(strides[0] if shape[0] > 1 else 0, element, along)


def read(tensor: Tensor, axis: int | None, neighbours: bool) -> tuple[Tensor, Lying]:
    """The tensor, or a copy if the kernel cannot read it directly. A kernel that needs neighbours along the axis needs
    the axis to have stride 1.
    """
    found = None if tensor.is_neg() else lying(tensor.shape, tensor.stride(), axis)
    if found is None or (neighbours and axis is not None and found.axis != 1):
        last = axis if neighbours and axis is not None else -1
        dense = tensor.movedim(last, -1).clone(memory_format=torch.contiguous_format).resolve_neg()
        tensor = dense.movedim(-1, last)
        found = lying(tensor.shape, tensor.stride(), axis)
        assert found is not None
    return tensor, found


def joined(lies: Lying, batch: int, elements: int) -> Lying | None:
    """The same tensor with all samples in one row, if they follow each other at the distance of elements."""
    if batch == 1:
        return lies
    if elements == 1:
        return Lying(0, lies.row, lies.axis)
    return Lying(0, lies.element, lies.axis) if lies.row == elements * lies.element else None


@remembered
def plan_grouped(
    likelihood: Likelihood, problem: Problem, reduction: str, values: bool, kl_stride: int, loss_grad_stride: int
) -> tuple[Plan, int]:
    """The plan, and the number of partial sums."""
    batch, elements, slots, size, targets, target_has_axis, *lies = problem
    rows, per_sample = batch, reduction == "none"
    together = [joined(each, batch, elements) for each in lies if each is not None]
    flat = batch == 1 or (None not in together and (not per_sample or elements == 1))
    event = elements
    if flat:
        lies = [None if each is None else joined(each, batch, elements) for each in lies]
        rows, elements = 1, batch * elements
    inner = max(2, power_of_2(size))
    width = cut_elements(elements, slots, inner)
    num_warps = 8 if width * inner > 2048 else 4
    chunks = max(1, -(-elements // width))
    programs = rows * chunks
    sums = "all" if not per_sample else "element" if flat and event == 1 else "row"
    several = values and sums != "element" and (programs if sums == "all" else chunks) > 1
    numbers = [elements, *(number for each in lies for number in (each or Lying(0, 0, 0)))]
    alignments = tuple(gcd(16, number) for number in numbers)
    plan = make_plan(
        programs,
        num_warps,
        rows,
        chunks,
        *(number // alignment for number, alignment in zip(numbers, alignments, strict=True)),
        kl_stride,
        loss_grad_stride,
        batch,
        reduction_scale(reduction, batch, event),
        TERM=likelihood.term.jit,
        SETTINGS=likelihood.settings,
        UNIT=likelihood.target == "unit",
        SLOTS=slots,
        SIZE=size,
        TARGETS=targets,
        TARGET_HAS_AXIS=target_has_axis,
        SUMS=sums,
        FLAT=rows == 1,
        ALIGNMENTS=alignments,
        ELEMENTS=width,
        INNER=inner,
        **sum_blocks(rows if sums == "row" else 1, chunks if sums == "row" else programs),
    )
    return plan, programs if several else 0


class Read(NamedTuple):
    """The tensors that a kernel reads and writes, with their strides."""

    parameters: Tensor
    target: Tensor
    gradient: Tensor | None
    problem: Problem


def read_grouped(likelihood: Likelihood, tensors: Sequence[Tensor], needs_gradient: bool) -> Read:
    given, target = tensors
    grouping = likelihood.grouping(given.shape, target.shape)
    neighbours = grouping.size > LONGEST
    parameters, lies = read(given, grouping.axis, neighbours)
    target, target_lies = read(target, grouping.target_axis, neighbours)
    gradient = gradient_lies = None
    if needs_gradient:
        gradient = given.new_empty_strided(given.shape, gradient_strides(given))
        gradient, gradient_lies = read(gradient, grouping.axis, neighbours)
    axis = given.shape[grouping.axis]
    of_target = 1 if grouping.target_axis is None else target.shape[grouping.target_axis]
    has_axis = grouping.target_axis is not None and of_target == axis
    problem = Problem(
        given.shape[0],
        terms_of_a_sample(likelihood, tensors),
        axis // grouping.size,
        grouping.size,
        1 if has_axis else of_target,
        has_axis,
        lies,
        target_lies,
        gradient_lies,
    )
    return Read(parameters, target, gradient, problem)


def grouped(
    likelihood: Likelihood,
    tensors: Sequence[Tensor],
    reduction: str,
    needed: Sequence[bool],
    asked: Asked,
) -> list[Tensor]:
    """Fill the tensors that are not None, and return the gradient of the parameters if it is needed. The arguments are
    those of `grouped_kernel`. A sample may have no elements, but there must be samples.
    """
    parameters, target, gradient, problem = read_grouped(likelihood, tensors, needed[0])
    has_values = asked.values[0] is not None
    plan, partials = plan_grouped(
        likelihood, problem, reduction, has_values, asked.kl_stride, asked.loss_grad_stride(reduction)
    )
    launch(
        grouped_kernel,
        plan,
        target.device,
        parameters,
        target,
        asked.kl,
        *asked.values,
        *asked.upstream,
        gradient,
        asked.kl_grad,
        target.new_empty(partials, dtype=torch.float32) if partials else None,
        ticket(target.device) if partials else None,
        *asked.weights,
    )
    return [] if gradient is None else in_format_of([tensors[0]], [gradient])
