"""The arithmetic of convolutions and matrix products in training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

PRECISIONS = ("fp32", "tf32", "bf16")

# torch.backends has a tree of settings, whose values are "ieee", "tf32" and "bf16"; one that is "none" follows the one
# above it. (torch.backends.mkldnn.fp32_precision sets another one than it reads, so these are what is below it.)
_get, _set = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
_MATMULS = ("cuda", "matmul"), ("mkldnn", "matmul")  # both are also set by torch.set_float32_matmul_precision
_CUDNN = ("cuda", "conv"), ("cuda", "rnn")


@contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """Set how float32 convolutions and matrix products are computed on CUDA devices, and cuDNN's search for its fastest
    algorithms; afterwards all is as it was, whether it was set by torch.backends' fp32_precision or by the older
    torch.set_float32_matmul_precision and torch.backends.cudnn.allow_tf32. (In the block, allow_tf32 cannot be read
    where this changed what convolutions do: torch refuses that once the two kinds of setting differ.)

    "fp32": in float32. "tf32" and "bf16": what is float32 has its operands rounded to 10 bits, for the tensor cores.
    The search is left out where `torch.use_deterministic_algorithms` asks for results that repeat.
    """
    wanted = "ieee" if precision == "fp32" else "tf32"
    benchmark = torch.backends.cudnn.benchmark
    changed = [(place, _own(place)) for place in _MATMULS]
    for place in _MATMULS:
        _set(*place, "ieee")  # the older setting cannot be read while it contradicts these
    older = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    for place in _CUDNN:
        if _get(*place) != wanted:
            # What follows is set from above: torch's default for convolutions follows, and cannot be put back once it
            # was set itself.
            place = place if _own(place) != "none" else _above(place)
            changed.append((place, _own(place)))
            _set(*place, wanted)
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(older)
        for place, own in reversed(changed):
            _set(*place, own)
        torch.backends.cudnn.benchmark = benchmark


def _above(place: tuple[str, str]) -> tuple[str, str]:
    return ("generic" if place[1] == "all" else place[0], "all")


def _own(place: tuple[str, str]) -> str:
    """What is set there, which torch does not tell: "none" where it follows what is above it."""
    held = _get(*place)
    if place == ("generic", "all"):
        return held
    above = _above(place)
    own_above = _own(above)
    other = "tf32" if held == "ieee" else "ieee"
    _set(*above, other)
    follows = _get(*place) == other
    _set(*above, own_above)
    return "none" if follows else held
