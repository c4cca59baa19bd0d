"""The formula of a likelihood on a large batch on the CPU, block by block.

A formula of 30 operations on a whole batch writes 30 tensors of the batch's size to memory, and autograd keeps most of
them. Block by block the tensors stay in the cache. Only the inputs are kept for backward, which computes
`Likelihood.slopes`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastvae.likelihoods.likelihood import Likelihood
from fastvae.reference.precision import in_precision, reduce_event

# Elements of a block for each thread: torch gives a thread at least 32768.
_PER_THREAD = 131072


def rows_of_a_block(tensors: Sequence[Tensor]) -> int | None:
    """The number of samples of a block. None if the formula runs on the whole batch: the batch is small, the call is
    traced or transformed, or the target requires grad, for which there are no slopes.
    """
    if torch.compiler.is_compiling():
        return None
    target = tensors[-1]
    size = _PER_THREAD * torch.get_num_threads()
    if target.numel() < 2 * size or target.device.type != "cpu" or target.requires_grad:
        return None
    if (
        torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors)
    ):
        return None
    return max(1, size // (target.numel() // target.shape[0]))


def _each(tensors: Sequence[Tensor], rows: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """The samples of each block, and the tensors there. A smaller parameter without a batch is in each as it is."""
    target = tensors[-1]
    for start in range(0, target.shape[0], rows):
        part = slice(start, start + rows)
        yield part, [tensor[part] if _has_samples(tensor, target) else tensor for tensor in tensors]


def _has_samples(tensor: Tensor, target: Tensor) -> bool:
    return tensor.ndim == target.ndim and tensor.shape[0] == target.shape[0]


def sums(likelihood: Likelihood, tensors: Sequence[Tensor], rows: int, reduction: str) -> list[Tensor]:
    """The values of each block, reduced."""
    return [
        reduce_event(likelihood.formula(*in_precision(tuple(block[:-1]), block[-1], likelihood)), reduction)
        for _, block in _each(tensors, rows)
    ]


def gradients(
    likelihood: Likelihood, tensors: Sequence[Tensor], needed: Sequence[bool], factor: float | Tensor, rows: int
) -> list[Tensor | None]:
    """factor * slope for each parameter that needs a gradient. factor is a number, or a tensor [] or [B, 1, ...]."""
    *parameters, target = tensors
    found = [
        torch.empty_like(parameter) if need and _has_samples(parameter, target) else None
        for parameter, need in zip(parameters, needed, strict=True)
    ]
    partial: list[list[Tensor]] = [[] for _ in parameters]
    for part, block in _each(tensors, rows):
        of_block = factor[part] if isinstance(factor, Tensor) and factor.ndim else factor
        slopes = likelihood.slopes(*in_precision(tuple(block[:-1]), block[-1], likelihood))
        for k, need in enumerate(needed):
            if not need:
                continue
            whole = found[k]
            if whole is not None and slopes[k].shape == block[k].shape:
                torch.mul(of_block, slopes[k], out=whole[part])
                continue
            gradient = (of_block * slopes[k]).sum_to_size(block[k].shape)
            if whole is None:
                partial[k].append(gradient)
            else:
                whole[part] = gradient
    for k, parts in enumerate(partial):
        if parts:
            found[k] = torch.stack(parts).sum(0).to(parameters[k].dtype)
    return found
