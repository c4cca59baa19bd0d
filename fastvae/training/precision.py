"""The arithmetic of convolutions and matrix products in training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

PRECISIONS = ("fp32", "tf32", "bf16")

# torch.backends has a tree of settings, whose values are "ieee", "tf32" and "bf16"; one that is "none" follows the one
# above it. Beside it are two older settings, which write into the tree, and which torch refuses to read while they
# contradict it: torch.export, for one, reads them.
_get, _set = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
_MATMULS = ("cuda", "matmul"), ("mkldnn", "matmul")  # of torch.set_float32_matmul_precision
_CUDNN = ("cuda", "conv"), ("cuda", "rnn")  # of torch.backends.cudnn.allow_tf32


@contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """Set how float32 convolutions and matrix products are computed on CUDA devices, and cuDNN's search for its fastest
    algorithms; afterwards all is as it was, whether it was set by torch.backends' fp32_precision or by the older
    torch.set_float32_matmul_precision and torch.backends.cudnn.allow_tf32.

    "fp32": in float32. "tf32" and "bf16": what is float32 has its operands rounded to 10 bits, for the tensor cores.
    The search is left out where `torch.use_deterministic_algorithms` asks for results that repeat.

    One thing torch cannot put back: its default for convolutions, once "fp32" has replaced it, comes back as a setting
    of the same value, "tf32", which does not follow a later torch.backends.fp32_precision.
    """
    exact = precision == "fp32"
    benchmark = torch.backends.cudnn.benchmark
    held = {place: (_own(place), _get(*place)) for place in (*_MATMULS, *_CUDNN)}
    matmul, cudnn = _older_matmul(), _older_cudnn()
    torch.set_float32_matmul_precision("highest" if exact else "high")
    cudnn_changes = cudnn is exact or any((_get(*place) == "tf32") is exact for place in _CUDNN)
    if cudnn_changes:
        torch.backends.cudnn.allow_tf32 = not exact
        for place in _CUDNN:
            _set(*place, "ieee" if exact else "tf32")  # not "none", which follows
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        if cudnn_changes:
            torch.backends.cudnn.allow_tf32 = cudnn
        for place, (own, value) in held.items():
            if place in _MATMULS or cudnn_changes:
                by_default = own == "none" and value != _get(*_above(place))
                _set(*place, value if by_default else own)
        torch.backends.cudnn.benchmark = benchmark


def _above(place: tuple[str, str]) -> tuple[str, str]:
    return ("generic" if place[1] == "all" else place[0], "all")


def _own(place: tuple[str, str]) -> str:
    """What is set there, which torch does not tell: "none" where it follows what is above it."""
    held = _get(*place)
    if place == ("generic", "all"):
        return held
    other = "tf32" if held == "ieee" else "ieee"
    with _changed(_above(place), other):
        return "none" if _get(*place) == other else held


@contextmanager
def _changed(place: tuple[str, str], value: str) -> Iterator[None]:
    own = _own(place)
    _set(*place, value)
    try:
        yield
    finally:
        _set(*place, own)


def _older_matmul() -> str:
    with _changed(_MATMULS[0], "ieee"), _changed(_MATMULS[1], "ieee"):  # which contradicts nothing
        return torch.get_float32_matmul_precision()


def _older_cudnn() -> bool:
    """Readable where it is the same as what holds for both; what follows is changed from above, see `arithmetic`."""
    places = [place if _own(place) != "none" else _above(place) for place in _CUDNN]
    with _changed(places[0], "tf32"), _changed(places[1], "tf32"):
        try:
            return bool(torch.backends.cudnn.allow_tf32)
        except RuntimeError:
            return False
