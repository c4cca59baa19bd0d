"""Bytes and launches of every operation, counted access by access on Triton's interpreter.

    python benchmarks/traffic.py

prints, for each operation in each direction, what one element costs: bytes read, bytes written, and what they should
come to by the formula beside them, which names the tensors that must be read and written. The rest, up to a few per
cent, are sums, partial sums, tickets, the noise's seed and scalar arguments.

Needs no GPU. What is counted is what the kernels ask for, lane by lane: the active lanes of each load, store and atomic
of a kernel, times their size. Caches may make it less on a card, and partial sectors more.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import fastvae
import fastvae.functional as F


@dataclass
class Traffic:
    loaded: int = 0
    stored: int = 0
    launches: int = 0


@contextmanager
def metered() -> Iterator[Traffic]:
    """Counts what is loaded, stored and launched inside of the block, on the interpreter.

    Covers plain and masked loads and stores, and atomic read-modify-writes: all that the kernels use.
    """
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

    from fastvae import kernels

    if not kernels.INTERPRETED:
        raise RuntimeError("bytes are counted on Triton's interpreter: set TRITON_INTERPRET=1 before importing Triton")
    traffic = Traffic()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    atomic, run = InterpreterBuilder.create_atomic_rmw, InterpretedFunction.run

    def size(pointers: Any, mask: Any) -> int:
        return int(mask.data.sum()) * max(1, pointers.get_element_ty().primitive_bitwidth // 8)

    # Only the arguments that every version of Triton has are named.
    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        traffic.loaded += size(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        traffic.stored += size(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def counted_atomic(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        traffic.loaded += size(pointers, mask)
        traffic.stored += size(pointers, mask)
        return atomic(self, operation, pointers, value, mask, *rest)

    def counted_run(self: Any, *arguments: Any, **options: Any) -> Any:
        traffic.launches += 1
        return run(self, *arguments, **options)

    with (
        patch.object(InterpreterBuilder, "create_masked_load", counted_load),
        patch.object(InterpreterBuilder, "create_masked_store", counted_store),
        patch.object(InterpreterBuilder, "create_atomic_rmw", counted_atomic),
        patch.object(InterpretedFunction, "run", counted_run),
    ):
        yield traffic


@dataclass(frozen=True)
class Operation:
    """A call of a public operation. Formulas name bulk tensors: "read + read -> written"."""

    name: str
    inputs: tuple[Tensor, ...]  # that get a gradient
    elements: int
    call: Callable[[], tuple[Tensor, ...]]
    forward: str
    backward: str | None

    def measure(self) -> tuple[Traffic, Traffic | None]:
        """Forward, and backward unless there is none."""
        with fastvae.use_backend("triton"):
            with metered() as forward:
                outputs = self.call()
            if self.backward is None:
                return forward, None
            upstream = [torch.randn_like(output) for output in outputs]
            with metered() as backward:
                torch.autograd.grad(outputs, self.inputs, upstream)
            return forward, backward


def operations(dtype: torch.dtype, target_dtype: torch.dtype | None = None) -> Iterator[Operation]:
    """Every public operation, on 8 samples of 4096 elements; target_dtype for those that have a target."""
    shape = batch, _ = 8, 4096
    mu, logvar = (torch.randn(shape, dtype=dtype).requires_grad_() for _ in range(2))
    moments = torch.randn(batch, 2 * shape[1], dtype=dtype).requires_grad_()
    eps = torch.randn(shape, dtype=dtype)
    logits, kl = torch.randn(shape, dtype=dtype).requires_grad_(), torch.rand(batch).requires_grad_()
    target = torch.randint(0, 2, shape).to(target_dtype or dtype)
    target_with_grad = target.clone().requires_grad_(target.is_floating_point())

    def operation(
        name: str, inputs: tuple[Tensor, ...], call: Callable[[], Any], forward: str, backward: str | None
    ) -> Operation:
        def outputs() -> tuple[Tensor, ...]:
            result = call()
            return (result,) if isinstance(result, Tensor) else result

        return Operation(name, inputs, batch * shape[1], outputs, forward, backward)

    both, moment_grads = "mu + logvar", "mu_grad + logvar_grad"
    if target_dtype is None:
        yield operation(
            "gaussian_sample", (mu, logvar), lambda: F.gaussian_sample(mu, logvar),
            f"{both} -> z", f"logvar + z_grad -> {moment_grads}",
        )  # fmt: skip
        yield operation(
            "gaussian_kl", (mu, logvar), lambda: F.gaussian_kl(mu, logvar), f"{both} ->", f"{both} -> {moment_grads}"
        )
        yield operation(
            "gaussian_sample_kl", (mu, logvar), lambda: F.gaussian_sample_kl(mu, logvar),
            f"{both} -> z", f"{both} + z_grad -> {moment_grads}",
        )  # fmt: skip
        yield operation(
            "gaussian_sample_kl_packed", (moments,), lambda: F.gaussian_sample_kl_packed(moments),
            f"{both} -> z", f"{both} + z_grad -> {moment_grads}",
        )  # fmt: skip
        yield operation(
            "gaussian_sample_kl_packed eps", (moments,), lambda: F.gaussian_sample_kl_packed(moments, eps=eps),
            f"{both} + eps -> z", f"{both} + eps + z_grad -> {moment_grads}",
        )  # fmt: skip
        # Of many samples, because what is written for each dimension is shared by them.
        tall = tuple(t.detach().view(-1, 16).requires_grad_() for t in (mu, logvar))
        yield operation(
            "gaussian_sample_kl dimensions", tall,
            lambda: F.gaussian_sample_kl(*tall, reduction="per_dimension", free_bits=0.1),
            f"{both} -> z", f"{both} + z_grad -> {moment_grads}",
        )  # fmt: skip
    yield operation(
        "sigmoid_mse_loss", (logits,), lambda: F.sigmoid_mse_loss(logits, target),
        "logits + target ->", "logits + target -> logits_grad",
    )  # fmt: skip
    yield operation(
        "elbo_loss", (logits, kl), lambda: F.elbo_loss(logits, target, kl).loss,
        "logits + target ->", "logits + target -> logits_grad",
    )  # fmt: skip
    if target_dtype is None:
        yield operation(
            "sigmoid_mse_loss both gradients", (logits, target_with_grad),
            lambda: F.sigmoid_mse_loss(logits, target_with_grad),
            "logits + target ->", "logits + target -> logits_grad + target_grad",
        )  # fmt: skip
        yield operation(
            "elbo_loss both gradients", (logits, target_with_grad, kl),
            lambda: F.elbo_loss(logits, target_with_grad, kl).loss,
            "logits + target ->", "logits + target -> logits_grad + target_grad",
        )  # fmt: skip
    yield operation(
        "elbo_value_and_grad", (), lambda: F.elbo_value_and_grad(logits.detach(), target, kl.detach())[1],
        "logits + target -> logits_grad", None,
    )  # fmt: skip


def formula_bytes(formula: str, dtype: torch.dtype, target_dtype: torch.dtype | None) -> int:
    """Bytes per element of the tensors that a formula names."""
    names = re.findall(r"\w+", formula)
    return sum((target_dtype or dtype).itemsize if name == "target" else dtype.itemsize for name in names)


def documented_bytes(docstring: str, *conditions: str) -> tuple[int, int]:
    """What a kernel's docstring says it (reads, writes) per float32 element, under conditions such as "with eps".

    The sentence is "Bytes per float32 element: reads 8 (12 with eps), writes 4 (0 without z)."
    """
    numbers = []
    text = " ".join(docstring.split())
    sentence = re.search(
        r"Bytes per float32 element: reads (\d+)(?: \(([^)]*)\))?, writes (\d+)(?: \(([^)]*)\))?[.;]", text
    )
    if sentence is None:
        raise ValueError("no sentence 'Bytes per float32 element: reads R, writes W.' in the docstring")
    unknown = set(conditions)
    for number, variants in ((sentence[1], sentence[2]), (sentence[3], sentence[4])):
        for variant, condition in re.findall(r"(\d+) ([^,]+)", variants or ""):
            if condition in conditions:
                number = variant
                unknown.discard(condition)
        numbers.append(int(number))
    if unknown:
        raise ValueError(f"the docstring does not say what is read and written {', '.join(sorted(unknown))}")
    return numbers[0], numbers[1]


def main() -> None:
    print(f"{'operation':32} {'types':14} {'direction':9} {'read':>6} {'written':>8} {'formula':>8}  launches")
    for dtype, target_dtype in ((torch.float32, None), (torch.float32, torch.uint8), (torch.bfloat16, None)):
        types = str(dtype).removeprefix("torch.") + (" uint8" if target_dtype else "")
        for operation in operations(dtype, target_dtype):
            measured = zip(
                ("forward", "backward"), operation.measure(), (operation.forward, operation.backward), strict=True
            )
            for direction, traffic, formula in measured:
                if traffic is not None and formula is not None:
                    print(
                        f"{operation.name:32} {types:14} {direction:9} {traffic.loaded / operation.elements:6.2f} "
                        f"{traffic.stored / operation.elements:8.2f} "
                        f"{formula_bytes(formula, dtype, target_dtype):8}  {traffic.launches}  {formula}"
                    )


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of Triton
    main()
