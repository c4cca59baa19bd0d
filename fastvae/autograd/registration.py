"""Registering the launchers as `torch.ops.fastvae` operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

_library = torch.library.Library("fastvae", "FRAGMENT")


def register(schema: str, launcher: Callable[..., Any], allocate: Callable[..., Any]) -> None:
    """Register an operation: `launcher` runs it on real tensors, `allocate` makes outputs of the same shapes, strides
    and dtypes.
    """
    name = schema[: schema.index("(")]
    # Kernels read strides as they come, so Inductor must not choose others than those the outputs were predicted from.
    _library.define(schema, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))
    _library.impl(name, launcher, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastvae::{name}", allocate, lib=_library)


def is_traced(tensor: Tensor) -> bool:
    """Whether the call must go through the registered operation: it is being compiled, or the tensor is not one that
    a kernel can read.
    """
    return torch.compiler.is_compiling() or type(tensor) not in (Tensor, Parameter)


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply`, less what it does for default arguments, which these Functions do not have.

    Function.apply binds the arguments of a Function with setup_context by `inspect.signature`: 90 us of the 200 us that a
    fused forward took without its launch (CPU, torch 2.13), and more than the launch itself.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]  # of its untyped base


def is_differentiated() -> bool:
    """Whether a backward pass is itself being differentiated (create_graph, torch.func), and so must be made of
    differentiable operations.

    While torch.compile traces a backward pass, grad mode is on although nothing differentiates it: AOTAutograd
    refuses double backward.
    """
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def refuse_vmap(name: str) -> Callable[..., Any]:
    """The `vmap` of a Function whose kernels take the batch dimension themselves."""

    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        raise NotImplementedError(
            f"fastvae.functional.{name} does not run under torch.vmap: it is batched over its first dimension already. "
            'Call it on the whole batch, or inside fastvae.use_backend("reference").'
        )

    return staticmethod(vmap)
