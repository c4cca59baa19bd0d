"""Which path a call takes, and why.

Every operation exists twice: fused (Triton) and as its specification (plain PyTorch, `fastvae.reference`). The choice
is made per call from the tensors' device and dtype, the machine, and what the user asked for: `use_backend` first,
then the environment variable ``FASTVAE_BACKEND``, then "auto".
"""

from __future__ import annotations

import importlib.util
import os
from types import TracebackType
from typing import NamedTuple

import torch

BACKENDS = ("auto", "reference", "triton")

# The kernels are compiled and checked for compute capability 8.0 and newer (sm_80, sm_90, sm_100).
_MINIMUM_CAPABILITY = (8, 0)

# Looked up, not imported: importing fastvae must not import Triton.
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


class Backend(NamedTuple):
    """The path that a call takes. ``name`` is "triton" or "reference"; ``reason`` is the reason in words."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


# What is asked for, the innermost block first; the last entry is what holds outside of all. A plain module global:
# torch.compile traces and guards it, which it does not do for a ContextVar. Not for each thread, because the threads in
# which autograd runs a backward pass, and computes a checkpoint again, are in no block.
_requested = [_checked(os.environ.get("FASTVAE_BACKEND", "auto"), "environment variable FASTVAE_BACKEND")]


class use_backend:
    """Choose the backend inside a ``with`` block: "triton", "reference" or "auto".

    It works outside and inside a function compiled by torch.compile. If "triton" cannot run, the operations raise
    ``RuntimeError`` and name what is missing. In torch.func transforms inside torch.compile, in torch.jit.trace and in
    torch.onnx.export every choice runs the specification, because torch must see the single operations. The choice
    applies to the whole process, as torch's own backend selection does. If several threads are in such blocks, the
    block that was entered last applies to all threads, until all have left.
    """

    def __init__(self, name: str) -> None:
        self.name = _checked(name, "name")

    def __enter__(self) -> use_backend:
        _requested.insert(0, self.name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # The innermost of this name, not what was there before: blocks of several threads need not be nested.
        _requested.remove(self.name)


def _obstacle(tensor: torch.Tensor) -> str | None:
    """What keeps the Triton path from running on this tensor, or None."""
    if tensor.dtype is torch.float64:
        return "float64 is computed by the reference path only"
    if not _TRITON_INSTALLED:
        return "Triton is not installed (pip install triton)"
    kind = tensor.device.type
    if kind == "cuda":
        if torch.version.hip is None:
            # get_device_properties, because torch.compile folds it to a constant and get_device_capability it does not.
            card = torch.cuda.get_device_properties(tensor.device)
            if (card.major, card.minor) < _MINIMUM_CAPABILITY:
                return f"compute capability {card.major}.{card.minor} is below the supported 8.0"
        return None
    if kind == "cpu":
        from fastvae import kernels

        if kernels.INTERPRETED:
            return None
        return "CPU tensors need Triton's interpreter (set TRITON_INTERPRET=1 before the first import of Triton)"
    return f"device type {kind!r} has no Triton path"


def backend_for(tensor: torch.Tensor) -> Backend:
    """The backend that an operation on ``tensor`` takes now, and the reason in words.

    Raises ``RuntimeError`` if "triton" was asked for and cannot run on this tensor; the message names what is missing.
    "auto" takes Triton on CUDA devices if it can run there, and the reference everywhere else, so it never fails
    without a GPU. Inside torch.compile "auto" lets the compiler generate the losses, see `choose`.
    """
    return choose(tensor, inductor_fuses=False)


def choose(tensor: torch.Tensor, inductor_fuses: bool) -> Backend:
    """`backend_for` for one operation. ``inductor_fuses``: under torch.compile use the specification, because Inductor
    can fuse it with its neighbours and cannot fuse our kernel.

    The following was read from the code that torch 2.11 and 2.13 generate for sm_90 and the example's training step. It
    counts launches forward and backward, including those of neighbouring operations that the choice changes:
        loss: specification 4 + 3, fused 5 + 5, of equal bytes. Of images of 32x32, 3 + 2 and 5 + 5, and a quarter fewer
            bytes: the bias, the squared error and the bias's gradient become one pass.
        sampling and divergence: specification 2 + 1, fused 2 + 2, of equal bytes. Of latents [16, 4, 64, 64], 4 + 1 and
            3 + 1, and 14.7 against 8.4 MB, because the compiler stores the noise.
    Sampling therefore stays fused: its noise is not stored, and not drawn a second time when activations are
    recomputed.
    """
    requested = _requested[0]
    if requested == "reference":
        return Backend("reference", "asked for")
    # Also where "triton" was asked for, as where a backward pass is itself differentiated: only the formula is right.
    if torch._C._are_functorch_transforms_active() and torch.compiler.is_compiling():
        return Backend("reference", "torch.compile loses gradients of fused operations in torch.func transforms")
    if torch._C._get_tracing_state() is not None:
        return Backend("reference", "torch.jit.trace records plain PyTorch")
    if torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export():
        return Backend("reference", "ONNX has plain operations only")
    if requested == "auto" and tensor.device.type == "cpu":
        return Backend("reference", "CPU tensors run plain PyTorch")
    obstacle = _obstacle(tensor)
    if requested == "triton":
        if obstacle is not None:
            raise RuntimeError(f'backend "triton" was asked for but cannot run: {obstacle}')
        return Backend("triton", "asked for")
    if obstacle is not None:
        return Backend("reference", obstacle)
    if inductor_fuses and torch.compiler.is_compiling():
        return Backend("reference", "torch.compile fuses this operation with its neighbours")
    return Backend("triton", "CUDA tensors run fused kernels")
