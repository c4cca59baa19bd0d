"""Launching the kernels of every likelihood: the loss on its own, and the evidence lower bound."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .elementwise import KL_PER_PROGRAM, gradient_kernel, value_kernel
from .launch import Plan, launch, make_plan, ticket
from .layout import dense_strides, has_strides, in_format_of, remembered, with_dense_rows, with_strides
from .tiles import Tiling, cut, empty_sum, reduction_scale, sum_blocks

if TYPE_CHECKING:
    from fastvae.likelihoods import Likelihood

Scalar = float | Tensor


def read_together(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors with dense rows and equal strides: as they are where they lie so, else copies. Only the samples of
    the target may lie at a distance of their own, because parameters often are parts of one larger tensor.
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


class Rows(NamedTuple):
    """How the parameters and the target lie, as `read_together` returns them, of a batch that is not empty."""

    batch: int
    event: int
    stride: int  # of the parameters' samples
    target_stride: int
    itemsize: int  # of the first parameter
    widest: int  # the largest itemsize

    def tiles(self, per_row: bool) -> tuple[Tiling, dict[str, Any], list[int]]:
        """The cut, and what follows from it for both kernels: constants, and the arguments rows, column_units,
        stride_units, target_units, chunks and tail.

        The tensors are one row, unless each sample has a sum of its own, or there are gaps between the samples.
        """
        rows, columns, stride, target_stride, tail = self.batch, self.event, self.stride, self.target_stride, 0
        if rows == 1 or (stride == target_stride == columns and not per_row):
            rows, columns, stride, target_stride = 1, rows * columns, 0, 0
        alignment = gcd(16, columns, stride, target_stride)
        tiling = cut(rows, columns, self.itemsize)
        # Masked loads are whole vectors only if 16 divides the size, so the rest becomes a tail. A tensor that is small
        # enough for one program has none.
        if rows == 1 and alignment < 16 and cut(1, columns - columns % 16, self.itemsize).programs > 1:
            alignment, tail = 16, columns % 16
            columns -= tail
            tiling = cut(rows, columns, self.itemsize)
        constants = {
            "FLAT": rows == 1,
            "PER_ROW": per_row and rows > 1,
            "HAS_TAIL": tail > 0,
            "ALIGNMENT": alignment,
            "VECTOR": 16 // self.widest,
            "ROWS": tiling.tile_rows,
            "COLUMNS": tiling.tile_columns,
        }
        units = [size // alignment for size in (columns, stride, target_stride)]
        return tiling, constants, [rows, *units, tiling.chunks, tail]


def rows_of(tensors: Sequence[Tensor]) -> Rows:
    first = tensors[0]
    batch, itemsize = first.shape[0], first.element_size()
    widest = itemsize
    for tensor in tensors[1:]:
        widest = max(widest, tensor.element_size())
    return Rows(batch, first.numel() // batch, first.stride(0), tensors[-1].stride(0), itemsize, widest)


def constants_of(likelihood: Likelihood) -> dict[str, Any]:
    """The constants of both kernels that follow from the likelihood."""
    return {
        "TERM": likelihood.term.jit,
        "SETTINGS": likelihood.settings,
        "SLOPES": len(likelihood.parameters) + likelihood.target_has_slope,
        "SLOPE_FACTOR": likelihood.slope_factor,
        "UNIT": likelihood.target == "unit",
    }


def empty_gradients(tensors: Sequence[Tensor], needed: Sequence[bool]) -> tuple[Tensor, ...]:
    """Uninitialised gradients of the tensors that need one, at the strides at which the kernel reads the tensors.

    `in_format_of` gives the gradient of a tensor that had to be copied the strides of that tensor.
    """
    strides = dense_strides(tensors[0])
    each = zip(tensors, needed, strict=True)
    return tuple([tensor.new_empty_strided(tensor.shape, strides) for tensor, need in each if need])


def needed_of(values: Sequence[Any], needed: Sequence[bool]) -> list[Any]:
    return [value for value, need in zip(values, needed, strict=True) if need]


def allocate_loss(tensors: Sequence[Tensor], reduction: str) -> Tensor:
    first = tensors[0]
    return first.new_empty(first.shape[:1] if reduction == "none" else [], dtype=torch.float32)


@remembered
def plan_loss(likelihood: Likelihood, rows: Rows, reduction: str) -> tuple[Plan, int]:
    """The plan, and the number of partial sums."""
    per_row = reduction == "none"
    tiling, constants, numbers = rows.tiles(per_row)
    groups, count = (tiling.rows, tiling.chunks) if per_row else (1, tiling.programs)
    plan = make_plan(
        tiling.programs,
        tiling.num_warps,
        *numbers,
        0,
        rows.batch,
        reduction_scale(reduction, rows.batch, rows.event),
        **constants_of(likelihood),
        **constants,
        WANTED=(),
        **sum_blocks(groups, count),
    )
    return plan, tiling.programs if count > 1 else 0


def negative_log_likelihood(likelihood: Likelihood, tensors: Sequence[Tensor], reduction: str) -> Tensor:
    """The loss of `tensors`, which are the parameters and, last, the target."""
    loss = allocate_loss(tensors, reduction)
    if tensors[0].numel() == 0:
        return loss.fill_(empty_sum(reduction, tensors[0].shape[0]))
    *parameters, target = tensors = read_together(tensors)
    plan, partials = plan_loss(likelihood, rows_of(tensors), reduction)
    launch(
        value_kernel,
        plan,
        loss.device,
        tuple(parameters),
        target,
        None,
        loss,
        None,
        None,
        (),
        None,
        loss.new_empty(partials) if partials else None,
        ticket(loss.device) if partials else None,
        1.0,
        1.0,
        1.0,
    )
    return loss


@remembered
def plan_loss_backward(
    likelihood: Likelihood, rows: Rows, reduction: str, loss_grad_stride: int, needed: tuple[bool, ...]
) -> Plan:
    tiling, constants, numbers = rows.tiles(per_row=loss_grad_stride != 0)
    return make_plan(
        tiling.programs,
        tiling.num_warps,
        *numbers,
        loss_grad_stride,
        rows.batch,
        reduction_scale(reduction, rows.batch, rows.event),
        **constants_of(likelihood),
        **constants,
        WANTED=wanted(needed),
    )


def wanted(needed: Sequence[bool]) -> tuple[int, ...]:
    return tuple(k for k, need in enumerate(needed) if need)


def negative_log_likelihood_backward(
    likelihood: Likelihood, tensors: Sequence[Tensor], loss_grad: Tensor, reduction: str, needed: Sequence[bool]
) -> list[Tensor]:
    """The gradients of those of the parameters and the target that need one."""
    gradients = empty_gradients(tensors, needed)
    loss_grad = loss_grad.resolve_neg()
    if tensors[0].numel():
        *parameters, target = together = read_together(tensors)
        loss_grad_stride = loss_grad.stride(0) if reduction == "none" else 0
        launch(
            gradient_kernel,
            plan_loss_backward(likelihood, rows_of(together), reduction, loss_grad_stride, tuple(needed)),
            target.device,
            tuple(parameters),
            target,
            loss_grad,
            None,
            None,
            gradients,
            None,
            1.0,
            1.0,
        )
    return in_format_of(needed_of(tensors, needed), list(gradients))


def allocate_values(first: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """loss, reconstruction and mean_kl: three tensors, because views of one buffer could not be modified in place by
    the user.
    """
    new_empty = first.new_empty
    return new_empty([], dtype=torch.float32), new_empty([], dtype=torch.float32), new_empty([], dtype=torch.float32)


def programs_of_kl(batch: int) -> int:
    return -(-batch // KL_PER_PROGRAM.value)


@remembered
def plan_elbo(likelihood: Likelihood, rows: Rows, kl_stride: int, with_gradients: bool) -> Plan:
    tiling, constants, numbers = rows.tiles(per_row=False)
    return make_plan(
        # Enough for every tile, and for the gradient of every sample's kl. A program without a tile loads nothing.
        max(tiling.programs, programs_of_kl(rows.batch)),
        tiling.num_warps,
        *numbers,
        kl_stride,
        rows.batch,
        1.0 / rows.batch,
        **constants_of(likelihood),
        **constants,
        WANTED=tuple(range(len(likelihood.parameters))) if with_gradients else (),
        GROUPS=1,
        BLOCK=1024,
    )


def elbo_forward(
    likelihood: Likelihood,
    tensors: Sequence[Tensor],
    kl: Tensor,
    beta: Scalar,
    reconstruction_weight: Scalar,
    grad_scale: Scalar,
    gradients: tuple[Tensor, ...],
    kl_grad: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The three values; and the gradients of the parameters and of kl, where tensors are given for them."""
    values = allocate_values(tensors[0])
    if tensors[0].shape[0] == 0:
        for value in values:
            value.fill_(float("nan"))
        return values
    *parameters, target = tensors = read_together(tensors)
    kl = kl.resolve_neg()
    plan = plan_elbo(likelihood, rows_of(tensors), kl.stride(0), bool(gradients))
    several = plan.programs > 1
    launch(
        value_kernel,
        plan,
        target.device,
        tuple(parameters),
        target,
        kl,
        *values,
        gradients,
        kl_grad,
        values[0].new_empty(plan.programs) if several else None,
        ticket(target.device) if several else None,
        as_argument(beta),
        as_argument(reconstruction_weight),
        as_argument(grad_scale),
    )
    return values


def as_argument(scalar: Scalar) -> Scalar:
    """A kernel argument: an integer would be compiled into the kernel, a float is not."""
    return scalar.resolve_neg() if isinstance(scalar, Tensor) else float(scalar)


def elbo_loss(
    likelihood: Likelihood, tensors: Sequence[Tensor], kl: Tensor, beta: Scalar, reconstruction_weight: Scalar
) -> tuple[Tensor, Tensor, Tensor]:
    return elbo_forward(likelihood, tensors, kl, beta, reconstruction_weight, 1.0, (), None)


def elbo_value_and_grad(
    likelihood: Likelihood,
    tensors: Sequence[Tensor],
    kl: Tensor,
    beta: Scalar,
    reconstruction_weight: Scalar,
    grad_scale: Scalar | None,
) -> tuple[Tensor, ...]:
    """loss, reconstruction, mean_kl, and the gradients of kl and of each parameter."""
    parameters = tensors[:-1]
    gradients = empty_gradients(parameters, [True] * len(parameters))
    kl_grad = kl.new_empty(kl.shape)
    scale = 1.0 if grad_scale is None else grad_scale
    values = elbo_forward(likelihood, tensors, kl, beta, reconstruction_weight, scale, gradients, kl_grad)
    return *values, kl_grad, *in_format_of(list(parameters), list(gradients))


@remembered
def plan_elbo_backward(likelihood: Likelihood, rows: Rows, needed: tuple[bool, ...]) -> Plan:
    tiling, constants, numbers = rows.tiles(per_row=False)
    return make_plan(
        max(tiling.programs if any(needed) else 1, programs_of_kl(rows.batch)),
        tiling.num_warps,
        *numbers,
        0,
        rows.batch,
        1.0 / rows.batch,
        **constants_of(likelihood),
        **constants,
        WANTED=wanted(needed),
    )


def elbo_backward(
    likelihood: Likelihood,
    tensors: Sequence[Tensor],
    kl: Tensor,
    loss_grad: Tensor | None,
    reconstruction_grad: Tensor | None,
    mean_kl_grad: Tensor | None,
    beta: Scalar,
    reconstruction_weight: Scalar,
    needed: Sequence[bool],
    needs_kl: bool,
) -> list[Tensor]:
    """The gradients of those of the parameters, the target and kl that need one."""
    gradients = empty_gradients(tensors, needed)
    kl_grads = [kl.new_empty(kl.shape)] if needs_kl else []
    if tensors[0].shape[0]:
        *parameters, target = together = read_together(tensors) if gradients else tensors
        launch(
            gradient_kernel,
            plan_elbo_backward(likelihood, rows_of(together), tuple(needed)),
            target.device,
            tuple(parameters),
            target,
            *[None if grad is None else grad.resolve_neg() for grad in (loss_grad, reconstruction_grad, mean_kl_grad)],
            gradients,
            kl_grads[0] if kl_grads else None,
            as_argument(beta),
            as_argument(reconstruction_weight),
        )
    return in_format_of(needed_of(tensors, needed), list(gradients)) + kl_grads
