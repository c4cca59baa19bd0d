"""Every operation, forward and backward, for the tools that look at a program from outside.

    compute-sanitizer --tool memcheck python benchmarks/small_calls.py
    ncu --profile-from-start off ... python benchmarks/small_calls.py --elements 16777216

Sizes are odd, so that every tile has an edge, and there are cases with one tile and with several. With --elements each
operation runs at that size twice. The first call compiles it, and only the second is profiled.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor

import fastvae
import fastvae.functional as F
from fastvae.operations import Operation, Spec, of_each_kind, operations
from traffic import takes_bytes

IMAGES = ((3, 1, 5, 5), (2, 3, 50, 41))
POSTERIORS = ((3, 5), (5, 3, 7, 3), (2, 5003), (150, 21))
ROWS = ((2, 5003), (150, 4099))
channels_last = partial(Tensor.contiguous, memory_format=torch.channels_last)


def call_of(operation: Operation, spec: Spec) -> Callable[[], object]:
    tensors = operation.inputs(spec)
    leaves = [tensor for tensor in tensors if tensor.requires_grad]

    def call() -> None:
        roots = operation(F, *tensors)[: operation.roots]
        if roots:
            torch.autograd.grad(roots, leaves, [torch.ones_like(root) for root in roots])

    return call


def calls(device: torch.device, elements: int | None) -> Iterator[Callable[[], object]]:
    if elements is not None:
        # Samples of 16,384 numbers, as latents of a large autoencoder have.
        columns = min(16384, elements)
        for operation in of_each_kind(operations()):
            yield call_of(operation, Spec((elements // columns, columns), device=device))
        return
    for operation, dtype in product(of_each_kind(operations()), (torch.float32, torch.bfloat16)):
        for shape in POSTERIORS if operation.likelihood is None else ROWS if operation.long_rows else IMAGES:
            for layout in (Tensor.contiguous, channels_last) if len(shape) == 4 else (Tensor.contiguous,):
                for target_dtype in (None, torch.uint8) if takes_bytes(operation) else (None,):
                    yield call_of(operation, Spec(shape, dtype, target_dtype, layout, device))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int)
    elements = parser.parse_args().elements
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    count = 0
    with fastvae.use_backend("triton"):
        for call in calls(device, elements):
            call()
            if elements is not None and on_gpu:
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
                call()
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()
            count += 1
    if on_gpu:
        torch.cuda.synchronize()
    print(f"{count} operations ran")


if __name__ == "__main__":
    main()
