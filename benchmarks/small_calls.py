"""Every operation, forward and backward, for the tools that look at a program from outside.

    compute-sanitizer --tool memcheck python benchmarks/small_calls.py [--shard I/N]
    ncu --profile-from-start off ... python benchmarks/small_calls.py --elements 16777216

Sizes are odd, so that every tile has an edge, and there are cases with one tile and with several. Nearly all of the
time is compilation. Therefore each operation has two calls, in which its dtypes, sizes, layouts and targets take turns;
--shard runs every N-th call from number I on. With --elements each operation runs at that size twice. The first call
compiles it, and only the second is profiled.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice, product
from math import isqrt, prod

import torch
from torch import Tensor

import fastvae
import fastvae.functional as F
from fastvae.operations import Operation, Spec, of_each_kind, operations
from fastvae.operations.operation import flattened
from pairwise import OBJECTIVES, Objective, drawn
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


def call_of_objective(objective: Objective, sizes: tuple[int, ...], device: torch.device) -> Callable[[], object]:
    tensors = drawn(objective, sizes, device)

    def call() -> None:
        root = flattened(objective.function(*tensors))[0]
        torch.autograd.grad(root, tensors, torch.ones_like(root))

    return call


def calls(device: torch.device, elements: int | None) -> Iterator[Callable[[], object]]:
    kinds = list(of_each_kind(operations()))
    if elements is not None:
        # Samples of 16,384 numbers, as latents of a large autoencoder have.
        columns = min(16384, elements)
        for operation in kinds:
            yield call_of(operation, Spec((elements // columns, columns), device=device))
        for objective, name in ((it, name) for it in OBJECTIVES.values() for name in it.table):
            sizes = tuple(min(size, isqrt(elements)) for size in objective.table[name])
            yield call_of_objective(objective, sizes, device)
        return
    for objective in OBJECTIVES.values():
        yield call_of_objective(objective, sorted(objective.forms, key=prod)[1], device)
    for turn, (number, operation) in product(range(2), enumerate(kinds)):
        shapes = POSTERIORS if operation.likelihood is None else ROWS if operation.long_rows else IMAGES
        shape = shapes[(turn + number) % len(shapes)]
        dtype, target_dtype = (torch.bfloat16, torch.uint8) if turn else (torch.float32, None)
        layout = channels_last if len(shape) == 4 and (turn + number // 2) % 2 else Tensor.contiguous
        target_dtype = target_dtype if takes_bytes(operation) else None
        yield call_of(operation, Spec(shape, dtype, target_dtype, layout, device))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int)
    parser.add_argument("--shard", default="0/1", metavar="I/N")
    settings = parser.parse_args()
    elements = settings.elements
    shard, shards = map(int, settings.shard.split("/"))
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    count = 0
    with fastvae.use_backend("triton"):
        for call in islice(calls(device, elements), shard, None, shards):
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
