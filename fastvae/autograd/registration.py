"""Registering the launchers as `torch.ops.fastvae` operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fastvae.kernels.launch import fresh_tickets

_library = torch.library.Library("fastvae", "FRAGMENT")


def register(schema: str, launcher: Callable[..., Any], allocate: Callable[..., Any]) -> None:
    """Register an operation: `launcher` runs it on real tensors, `allocate` makes outputs of the same shapes, strides
    and dtypes.
    """
    name = schema[: schema.index("(")]
    # Kernels read strides as they come, so Inductor must not choose others than those the outputs were predicted from.
    _library.define(schema, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))

    def implementation(*arguments: Any) -> Any:
        with fresh_tickets():
            return launcher(*arguments)

    def refuse(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(
            f"torch.ops.fastvae.{name} was differentiated without its autograd.Function, as torch.compile does with "
            "what torch.func transforms inside it. Transform outside of torch.compile, or inside "
            'fastvae.use_backend("reference").'
        )

    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastvae::{name}", allocate, lib=_library)
    # Without a formula the gradient would silently be zero.
    torch.library.register_autograd(f"fastvae::{name}", refuse, lib=_library)


def is_traced(tensor: Tensor) -> bool:
    """Whether the call must go through the registered operation: it is being compiled, or the tensor is not one that
    a kernel can read.
    """
    return (
        torch.compiler.is_compiling()
        or type(tensor) not in (Tensor, Parameter)
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
    )


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply`, less what it does for default arguments, which these Functions do not have.

    Function.apply binds the arguments of a Function with setup_context by `inspect.signature`: 90 us of the 200 us
    that a fused forward took without its launch (CPU, torch 2.13), and more than the launch itself.
    """
    if torch.compiler.is_compiling():
        return function.apply(*distinct(arguments))
    if torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]  # of its untyped base


def distinct(arguments: tuple[Any, ...]) -> Iterator[Any]:
    """The arguments with views in place of repeated tensors: traced by torch 2.11, a Function that is given one tensor
    twice loses a gradient.
    """
    seen: list[Tensor] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            repeated = any(argument is other for other in seen)
            seen.append(argument)
            yield argument.view_as(argument) if repeated else argument
        else:
            yield argument


def is_differentiated(*gradients: Tensor | None) -> bool:
    """Whether a backward pass is itself being transformed (create_graph, torch.func, batched gradients), and so must be
    made of plain operations.

    While torch.compile traces a backward pass, grad mode is on although nothing differentiates it: AOTAutograd
    refuses double backward.
    """
    if torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return True
    return any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in gradients)


def refuse_vmap(name: str) -> Callable[..., Any]:
    """The `vmap` of a Function whose kernels take the batch dimension themselves."""

    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        raise NotImplementedError(
            f"fastvae.functional.{name} does not run under torch.vmap: it is batched over its first dimension already. "
            'Call it on the whole batch, or inside fastvae.use_backend("reference").'
        )

    return staticmethod(vmap)
