"""A likelihood of a large batch on the CPU, block by block.

A formula of 30 operations on a whole batch writes 30 tensors of its size to memory, and autograd keeps most of them. In
blocks they stay in the cache, and nothing but the inputs is kept for backward, which computes `Likelihood.slopes`. (Two
threads, 128 x 20000 counts: 0.2 of the time of the whole formula, and 0.1 of its memory.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastvae.likelihoods.likelihood import Likelihood
from fastvae.reference.precision import in_precision, reduce_event

# Elements of a block for each thread. Torch gives a thread at least 32768; with more, the ten tensors of a formula that
# are alive at a time would not fit into a cache of 2 MB.
_PER_THREAD = 65536


def rows_of_a_block(likelihood: Likelihood, tensors: Sequence[Tensor]) -> int | None:
    """The samples of a block; None where the formula runs on the whole batch, because it is small, or is traced or
    transformed, or because the target requires grad, of which there is no slope.
    """
    target = tensors[-1]
    size = _PER_THREAD * torch.get_num_threads()
    if (
        target.device.type != "cpu"
        or target.numel() < 2 * size
        or target.requires_grad
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors)
    ):
        return None
    return max(1, size // (target.numel() // target.shape[0]))


def blocks(tensors: Sequence[Tensor], rows: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """The samples of each block, and the tensors there; a smaller parameter without a batch is in each as it is."""
    target = tensors[-1]
    for start in range(0, target.shape[0], rows):
        part = slice(start, start + rows)
        yield part, [x[part] if has_samples(x, target) else x for x in tensors]


def has_samples(tensor: Tensor, target: Tensor) -> bool:
    return tensor.ndim == target.ndim and tensor.shape[0] == target.shape[0]


class NegativeLogLikelihood(torch.autograd.Function):
    """The loss, as a function of (likelihood, reduction, rows, differentiable, *parameters, target).

    differentiable(likelihood, tensors, needed, element_grad) has the gradients in plain PyTorch, for those of higher
    order.
    """

    @staticmethod
    def forward(
        ctx: Any, likelihood: Likelihood, reduction: str, rows: int, differentiable: Callable[..., Any], *tensors: Tensor
    ) -> Tensor:
        ctx.options = likelihood, reduction, rows, differentiable
        ctx.save_for_backward(*tensors)
        each_sample = reduction == "none"
        sums = [
            reduce_event(likelihood.formula(*in_precision(part[:-1], part[-1], likelihood)), "none" if each_sample else "sum")
            for _, part in blocks(tensors, rows)
        ]
        if each_sample:
            return torch.cat(sums)
        return torch.stack(sums).sum() / count(tensors[-1], reduction)

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor) -> tuple[Tensor | None, ...]:
        likelihood, reduction, rows, differentiable = ctx.options
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[4:]
        target = tensors[-1]
        if reduction == "none":
            factor = loss_grad.view(-1, *[1] * (target.ndim - 1))
        else:
            factor = loss_grad / count(target, reduction)
        if torch.is_grad_enabled():
            return None, None, None, None, *differentiable(likelihood, tensors, needed, factor)
        return None, None, None, None, *gradients(likelihood, tensors, needed, factor, rows), None


def count(target: Tensor, reduction: str) -> int:
    return {"batchmean": target.shape[0], "mean": target.numel()}.get(reduction, 1)


def gradients(
    likelihood: Likelihood, tensors: Sequence[Tensor], needed: Sequence[bool], factor: Tensor, rows: int
) -> list[Tensor | None]:
    """factor * slope of each parameter that needs it; factor is 0-dimensional or [B, 1, ...]."""
    parameters, target = tensors[:-1], tensors[-1]
    found: list[Tensor | None] = [torch.empty_like(x) if need and has_samples(x, target) else None for x, need in zip(parameters, needed)]
    sums: list[list[Tensor]] = [[] for _ in parameters]
    for part, block in blocks(tensors, rows):
        slopes = likelihood.slopes(*in_precision(block[:-1], block[-1], likelihood))
        for k, (slope, parameter) in enumerate(zip(slopes, block, strict=False)):
            if needed[k]:
                scaled = (slope * (factor[part] if factor.ndim else factor)).sum_to_size(parameter.shape)
                if found[k] is None:
                    sums[k].append(scaled)
                else:
                    found[k][part] = scaled
    for k, parts in enumerate(sums):
        if parts:
            found[k] = torch.stack(parts).sum(0).to(parameters[k].dtype)
    return found
