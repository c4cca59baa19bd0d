"""Bytes and launches of every operation, counted access by access on Triton's interpreter.

    python benchmarks/traffic.py

prints for each operation and direction the bytes read and written per element, and the expected bytes by a formula,
which names the tensors that must be read and written. The remainder, up to a few per cent, consists of sums, partial
sums, tickets, the noise's seed and scalar arguments.

This needs no GPU. It counts the accesses of the kernels, lane by lane: the active lanes of each load, store and atomic,
times their size. On a card caches may reduce the traffic, and partial sectors may increase it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any
from unittest.mock import patch

import torch

import fastvae
import fastvae.functional as F
from fastvae.operations import Operation, Spec, operations


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


def takes_bytes(operation: Operation) -> bool:
    """Whether it takes a uint8 target, and asks for no gradient of it."""
    return operation.likelihood is not None and "target" not in operation.gradients


def measure(
    operation: Operation, dtype: torch.dtype, target_dtype: torch.dtype | None = None
) -> dict[str, tuple[Traffic, int]]:
    """The traffic of an operation in each direction, and the number of elements that it was made for."""
    # Of many samples where they share what is written for each dimension, else of long ones.
    shape = (1024, 16) if "dimensions" in operation.kernels["forward"][0] else (4, 4096)
    if operation.smaller:  # of a number for each column, one is read and a sum left for each tile of 16 rows
        shape = (64, 512) if "column" in operation.smaller.values() else (64, 2, 512)
    elif operation.long_rows:
        shape = (2, 6000)
    elif numbers := operation.numbers_of_an_element:
        shape = (2, 4096 // max(numbers.values()))
    elements = prod(shape)
    tensors = operation.inputs(Spec(shape, dtype, target_dtype))
    found = {}
    with fastvae.use_backend("triton"):
        with metered() as traffic:
            outputs = operation(F, *tensors)
        found["forward"] = traffic, elements
        if operation.backward is not None:
            roots = outputs[: operation.roots]
            upstream = [torch.randn_like(output) for output in roots]
            with metered() as traffic:
                torch.autograd.grad(roots, [t for t in tensors if t.requires_grad], upstream)
            found["backward"] = traffic, elements
    return found


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
    print(f"{'operation':40} {'types':14} {'direction':9} {'read':>6} {'written':>8} {'formula':>8}  launches")
    for dtype, target_dtype in ((torch.float32, None), (torch.float32, torch.uint8), (torch.bfloat16, None)):
        types = str(dtype).removeprefix("torch.") + (" uint8" if target_dtype else "")
        for operation in operations():
            if target_dtype and not takes_bytes(operation):
                continue
            for direction, (traffic, elements) in measure(operation, dtype, target_dtype).items():
                expected = sum(operation.bytes_per_element(direction, dtype, target_dtype))
                print(
                    f"{operation.name:40} {types:14} {direction:9} {traffic.loaded / elements:6.2f} "
                    f"{traffic.stored / elements:8.2f} {expected:8}  {traffic.launches}  "
                    f"{operation.formula(direction)}"
                )


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of Triton
    main()
