"""Registering the launchers as operations of PyTorch, `torch.ops.fastvae`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fastvae.kernels.launch import fresh_tickets

_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_is_batched = torch._C._functorch.is_legacy_batchedtensor

# The package's own name, so that two versions of fastvae in one process, each under a name of its own, are apart.
_NAMESPACE = __name__.partition(".")[0]
_library = torch.library.Library(_NAMESPACE, "FRAGMENT")

operations = getattr(torch.ops, _NAMESPACE)
"""The registered operations, as attributes."""


def register(schema: str, launcher: Callable[..., Any], allocate: Callable[..., Any]) -> None:
    """Register an operation. `launcher` runs it on real tensors. `allocate` returns outputs with the same shapes,
    strides and dtypes.
    """
    name = schema[: schema.index("(")]
    # Kernels read strides as they come, so Inductor must not choose others than those the outputs were predicted from.
    _library.define(schema, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))

    def implementation(*arguments: Any) -> Any:
        with fresh_tickets():
            return launcher(*arguments)

    def refuse(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(
            f"torch.ops.{_NAMESPACE}.{name} was differentiated without its autograd.Function: call the operation by "
            'fastvae.functional. Inside a transform of your own, call it in fastvae.use_backend("reference").'
        )

    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_NAMESPACE}::{name}", allocate, lib=_library)
    # Without a formula the gradient would silently be zero.
    torch.library.register_autograd(f"{_NAMESPACE}::{name}", refuse, lib=_library)


# Of these a kernel can read the memory, or needs none.
_READABLE = frozenset((Tensor, Parameter, type(None), float, int))


def is_traced(*arguments: Any) -> bool:
    """Whether a call with these tensors and numbers must go through the registered operation. This is so if the call is
    being compiled, or if a kernel cannot take one of the tensors or run in the current mode.
    """
    if (
        torch.compiler.is_compiling()
        or not _READABLE.issuperset(map(type, arguments))
        or (torch._C._len_torch_dispatch_stack() and _is_mode_of_a_trace())
    ):
        return True
    # A loop, because this is asked at each call, and `any` of a generator takes twice as long.
    for argument in arguments:  # noqa: SIM110
        if type(argument) is Tensor and argument._is_zerotensor():
            return True
    return False


def _is_mode_of_a_trace() -> bool:
    keys = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(key) is not None for key in (keys.PROXY, keys.FAKE, keys.FUNCTIONAL))


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply` without its handling of default arguments, which these Functions do not have.

    Function.apply binds the arguments of a Function with setup_context by `inspect.signature`. This took 90 us of the
    200 us of a fused forward without its launch (CPU, torch 2.13), more than the launch itself.
    """
    if torch.compiler.is_compiling():
        arguments = tuple(distinct(arguments))
        if not torch.is_grad_enabled() or not any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
            # Where nothing requires grad, Dynamo gives a `forward` of any number of arguments a context before them.
            return function.forward(*arguments)
        return function.apply(*arguments)
    if torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]  # of its untyped base


def distinct(arguments: tuple[Any, ...]) -> Iterator[Any]:
    """The arguments with views in place of repeated tensors, because a Function that torch 2.11 traces loses a gradient
    if it gets the same tensor twice.
    """
    seen: list[Tensor] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            repeated = any(argument is other for other in seen)
            seen.append(argument)
            yield argument.view_as(argument) if repeated else argument
        else:
            yield argument


def is_differentiated(*tensors: Tensor | None) -> bool:
    """Whether a backward pass of these tensors is itself differentiated or transformed (create_graph, torch.func,
    batched gradients), and must therefore consist of plain operations. This is also so after a transform has ended: the
    function that `torch.func.vjp` returns is called outside of the transform, but the saved tensors still belong to it.

    While torch.compile traces a backward pass, grad mode is on although nothing differentiates the pass, because
    AOTAutograd does not support double backward.
    """
    if torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return True
    for tensor in tensors:  # noqa: SIM110 - as in `is_traced`
        if tensor is not None and (_is_wrapped(tensor) or _is_batched(tensor)):
            return True
    return False


def refuse_vmap(name: str) -> Callable[..., Any]:
    """The `vmap` of a Function whose kernels take the batch dimension themselves."""

    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        raise NotImplementedError(
            f"fastvae.functional.{name} does not run under torch.vmap: it is batched over its first dimension already. "
            'Call it on the whole batch, or inside fastvae.use_backend("reference").'
        )

    return staticmethod(vmap)
