"""The arithmetic of convolutions and matrix products in training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

PRECISIONS = ("fp32", "tf32", "bf16")


@contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """Set how float32 convolutions and matrix products are computed on CUDA devices, and cuDNN's search for its fastest
    algorithms; afterwards all is as it was.

    "fp32": in float32. "tf32" and "bf16": what is float32 has its operands rounded to 10 bits, for the tensor cores.
    The search is left out where `torch.use_deterministic_algorithms` asks for results that repeat.
    """
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before[1:]
