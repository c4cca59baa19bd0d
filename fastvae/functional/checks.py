"""Checks of the public functions' arguments. They run before any launch, and each error names the argument, its value
and what is expected.
"""

from __future__ import annotations

import numbers
from math import prod

import torch
from torch import Tensor

from fastvae.backend import choose
from fastvae.likelihoods import Likelihood

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REDUCTIONS = ("none", "batchmean", "sum", "mean")


def check_reduction(reduction: str, more: tuple[str, ...] = ()) -> None:
    """`more`: reductions that only this operation has."""
    if reduction not in REDUCTIONS + more:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS + more)}, got {reduction!r}")


def check_batch(name: str, tensor: Tensor) -> None:
    """A floating-point tensor [B, ...] with at least one dimension after the batch."""
    check_floating(name, tensor)
    if tensor.ndim < 2:
        raise ValueError(f"{name} must have shape [B, ...] with at least 2 dimensions, got {list(tensor.shape)}")


def check_floating(name: str, tensor: Tensor) -> None:
    """A dense tensor of one of the dtypes that operations take."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
    check_dense(name, tensor)


def check_dense(name: str, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")


def check_like(name: str, tensor: Tensor, first_name: str, first: Tensor) -> None:
    """Check that an argument has the shape and device of another one, because neither is broadcast and nothing is
    copied between devices.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    check_dense(name, tensor)
    if tensor.shape != first.shape:
        raise ValueError(f"{name} must have the shape of {first_name}, {list(first.shape)}, got {list(tensor.shape)}")
    check_device(name, tensor, first_name, first)


def check_device(name: str, tensor: Tensor, first_name: str, first: Tensor) -> None:
    if tensor.device != first.device:
        raise ValueError(f"{name} must be on the device of {first_name}, {first.device}, got {tensor.device}")


def check_halves(mu: Tensor, logvar: Tensor) -> None:
    check_batch("mu", mu)
    check_like("logvar", logvar, "mu", mu)
    if logvar.dtype != mu.dtype:
        raise TypeError(f"logvar must have the dtype of mu, {mu.dtype}, got {logvar.dtype}")


def check_packed(moments: Tensor, dim: int) -> tuple[int, torch.Size]:
    """The dimension of moments = [mu | logvar] that is split, counted from the front, and the shape of one half."""
    check_batch("moments", moments)
    dim = check_integer("dim", dim)
    if not -moments.ndim <= dim < moments.ndim or dim % moments.ndim == 0:
        raise ValueError(
            f"dim must name a dimension of moments other than the batch, 1 to {moments.ndim - 1}, got {dim}"
        )
    dim %= moments.ndim
    if moments.shape[dim] % 2:
        raise ValueError(f"moments must have an even size along dim {dim}, got {list(moments.shape)}")
    half = list(moments.shape)
    half[dim] //= 2
    return dim, torch.Size(half)


def check_divergence(reduction: str, free_bits: float) -> float:
    """Returns free_bits as a Python number."""
    check_reduction(reduction, ("per_dimension",))
    free_bits = check_number("free_bits", free_bits)
    if not 0.0 <= free_bits <= torch.finfo(torch.float32).max:
        raise ValueError(f"free_bits must be finite in float32 and not negative, got {free_bits}")
    if free_bits and reduction not in ("batchmean", "per_dimension"):
        raise ValueError(
            f'free_bits is of a batch mean: reduction must be "batchmean" or "per_dimension", got {reduction!r}'
        )
    return free_bits


def check_noise(
    shape: torch.Size,
    name: str,
    like: Tensor,
    eps: Tensor | None,
    generator: torch.Generator | None,
    batch_offset: int | None,
) -> int | None:
    """Returns batch_offset as a Python integer."""
    if batch_offset is not None:
        batch_offset = check_integer("batch_offset", batch_offset)
        if batch_offset < 0:
            raise ValueError(f"batch_offset must not be negative, got {batch_offset}")
        if (batch_offset + shape[0]) * prod(shape[1:]) >= 2**63:
            raise ValueError(
                f"batch_offset must leave the elements of the whole batch below 2^63, got {batch_offset} samples of "
                f"{prod(shape[1:])} elements before this part"
            )
        if eps is not None:
            raise ValueError("eps and batch_offset were both given: eps is the noise itself, so nothing would be drawn")
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        if eps is not None:
            raise ValueError("eps and generator were both given: eps is the noise itself, so nothing would be drawn")
        if generator.device != like.device:
            raise ValueError(f"generator must be of the tensor's device, {like.device}, got {generator.device}")
    if eps is not None:
        if not isinstance(eps, Tensor) or eps.dtype not in FLOATING:
            raise TypeError(f"eps must be a floating-point tensor, got {getattr(eps, 'dtype', type(eps).__name__)}")
        if eps.shape != shape:
            raise ValueError(f"eps must have the shape of z, {list(shape)}, got {list(eps.shape)}")
        check_device("eps", eps, name, like)
        if eps.requires_grad:
            raise ValueError("eps must not require grad: it is noise, not a parameter; pass eps.detach()")
    return batch_offset


def check_is_likelihood(likelihood: object) -> None:
    if not isinstance(likelihood, Likelihood):
        raise TypeError(f"likelihood must be a fastvae.likelihoods.Likelihood, got {likelihood!r}")


def check_likelihood(
    parameters: Tensor | tuple[Tensor, ...], target: Tensor, likelihood: Likelihood
) -> tuple[Tensor, ...]:
    """Check a likelihood and its parameters: all on one device, and the first with the target's shape. Returns the
    parameters as a tuple.
    """
    check_is_likelihood(likelihood)
    names = likelihood.parameters
    given = parameters if isinstance(parameters, tuple) else (parameters,)
    if len(given) != len(names):
        raise ValueError(
            f"parameters must be the {len(names)} tensors ({', '.join(names)}) of {type(likelihood).__name__}, "
            f"got {len(given)}"
        )
    first = given[0]
    check_batch(names[0], first)
    if likelihood.grouped:
        check_grouped(first, target, likelihood)
        return (*given, target)
    for name, tensor in zip(names[1:], given[1:], strict=True):
        check_smaller(name, tensor, names[0], first)
    check_like("target", target, names[0], first)
    check_target_dtype(target, likelihood)
    return (*given, target)


def check_grouped(parameters: Tensor, target: Tensor, likelihood: Likelihood) -> None:
    """Check the target of a likelihood whose elements have several numbers in a parameter."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a torch.Tensor, got {type(target).__name__}")
    check_dense("target", target)
    check_device("target", target, likelihood.parameters[0], parameters)
    if likelihood.grouping(parameters.shape, target.shape).target_axis is not None:
        check_target_dtype(target, likelihood)
    elif target.dtype not in (torch.int64, torch.uint8):
        raise TypeError(
            f"target must be int64 or uint8 where it holds classes, of shape {list(target.shape)}, got {target.dtype}"
        )


def check_target_dtype(target: Tensor, likelihood: Likelihood) -> None:
    if target.dtype is torch.uint8 and not likelihood.reads_bytes:
        raise TypeError(f"target must be floating point for {likelihood}, got torch.uint8, which is read as t / 255")
    if target.dtype is not torch.uint8 and target.dtype not in FLOATING:
        read = "t / 255" if likelihood.target == "unit" else "t"
        raise TypeError(f"target must be uint8 (read as {read}) or floating point, got {target.dtype}")


def check_smaller(name: str, tensor: Tensor, first_name: str, first: Tensor) -> None:
    """Check a floating-point tensor that has the shape of the first parameter, or can be broadcast to it."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
    check_dense(name, tensor)
    check_device(name, tensor, first_name, first)
    if tensor.shape == first.shape:
        return
    each = zip(tensor.shape[::-1], first.shape[::-1], strict=False)
    if tensor.ndim > first.ndim or any(size not in (1, of_first) for size, of_first in each):
        raise ValueError(
            f"{name} must have the shape of {first_name}, {list(first.shape)}, or one that is broadcast to it, such as "
            f"{[1] * (first.ndim - 1)}, got {list(tensor.shape)}"
        )


def check_kl(kl: Tensor, first_name: str, first: Tensor) -> None:
    """The divergence of each sample of a batch."""
    if not isinstance(kl, Tensor) or kl.dtype not in FLOATING:
        raise TypeError(f"kl must be a floating-point tensor, got {getattr(kl, 'dtype', type(kl).__name__)}")
    check_dense("kl", kl)
    if kl.ndim != 1 or kl.shape[0] != first.shape[0]:
        raise ValueError(
            f"kl must be the divergence of each sample, shape [{first.shape[0]}] (reduction='none'), "
            f"got {list(kl.shape)}"
        )
    check_device("kl", kl, first_name, first)


def check_number(name: str, value: float, expected: str = "a number") -> float:
    """A real number, Python's or numpy's, as a Python number."""
    if type(value) is float:
        return value
    if isinstance(value, (int, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool):
        if torch.compiler.is_compiling():
            return value
    elif isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be {expected}, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(
            f"{name} must be in the range of a float, got an integer of {int(value).bit_length()} bits"
        ) from None


def check_integer(name: str, value: int) -> int:
    """An integer, Python's or numpy's, as a Python integer."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    return int(value)


def check_scalar(name: str, value: float | Tensor, first_name: str, first: Tensor) -> float | Tensor:
    """A number, or a 0-dimensional floating-point tensor on the device of the first argument, which is read there
    without a synchronisation.
    """
    if isinstance(value, Tensor):
        if value.ndim != 0 or value.dtype not in FLOATING:
            raise ValueError(
                f"{name} must be a number or a 0-dimensional floating-point tensor, "
                f"got a tensor of shape {list(value.shape)} and {value.dtype}"
            )
        check_device(name, value, first_name, first)
        if value.requires_grad:
            raise ValueError(f"{name} must not require grad: it is a weight, not a parameter; pass {name}.detach()")
        return value
    return check_number(name, value, "a number or a 0-dimensional tensor")


def has_kernels(likelihood: Likelihood, target: Tensor) -> bool:
    """Whether kernels compute the likelihood and every gradient that is needed. Otherwise its formula does."""
    return likelihood.term is not None and (likelihood.target_has_slope or not target.requires_grad)


def refuse_transforms(name: str) -> None:
    """Raise an error under a torch.func transform, because the results have no graph and the transform would return
    zeros.
    """
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            f"fastvae.functional.{name} does not run under torch.func transforms: it has the gradient already. "
            "Transform fastvae.functional.elbo_loss instead."
        )


def takes_triton(first: Tensor, *others: Tensor | None, inductor_fuses: bool = False) -> bool:
    """Whether the call runs fused. One float64 tensor is enough to make it a reference call. See
    `fastvae.backend.choose` for inductor_fuses.
    """
    decisive = first
    for tensor in others:
        if tensor is not None and tensor.dtype is torch.float64:
            decisive = tensor
    return choose(decisive, inductor_fuses).name == "triton"
