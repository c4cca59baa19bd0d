"""The launches that fastvae makes, recorded instead of made, and compiled ahead of time."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource

from fastvae.kernels import batch, dimensions, elbo, gaussian, reconstruction
from fastvae.kernels.launch import Plan

MODULES = (batch, dimensions, elbo, gaussian, reconstruction)  # those that launch
TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Launch:
    """A launch as fastvae would have made it."""

    kernel: Any
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int

    @property
    def tile(self) -> int:
        """The elements of a program."""
        return self.constants["ROWS"] * self.constants["COLUMNS"]

    @property
    def elements_per_thread(self) -> float:
        return self.tile / (32 * self.num_warps)

    def compile(self, target: GPUTarget, **options: Any) -> Any:
        """The kernel compiled as Triton's launcher would specialise it: null pointers and ones folded, 16-byte
        alignment known.
        """
        signature: dict[str, str] = {}
        constants: dict[Any, Any] = dict(self.constants)
        if "FAST" in self.kernel.arg_names:
            constants["FAST"] = target.backend == "cuda"
        attributes = {}
        for index, parameter in enumerate(self.kernel.params):
            name = parameter.name
            if name in constants:
                signature[name] = "constexpr"
                continue
            value = self.arguments[name]
            if value is None or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize):
                constants[name] = value
                signature[name] = "constexpr"
            elif isinstance(value, Tensor):
                signature[name] = "*" + TYPES[value.dtype]
                if not parameter.do_not_specialize_on_alignment:
                    # Every allocation of torch starts on such an address.
                    attributes[(index,)] = [["tt.divisibility", 16]]
            elif isinstance(value, int):
                signature[name] = parameter.annotation_type or ("i32" if -(2**31) <= value < 2**31 else "i64")
                if value % 16 == 0 and not parameter.do_not_specialize:
                    attributes[(index,)] = [["tt.divisibility", 16]]
            else:
                signature[name] = "fp32"
        positions = {(self.kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(self.kernel, signature, constexprs=positions, attrs=attributes)
        options |= {"num_warps": self.num_warps, "enable_fp_fusion": True}
        return triton.compile(source, target=target, options=options)


@contextmanager
def exact_lines() -> Iterator[None]:
    """Compile such that every instruction is noted to come from the line that it comes from.

    The LLVM of newer tritons counts a source line on for each line of inline assembly, of which masked loads and stores
    are made too. A cache of its own, because what was compiled before has the wrong lines.
    """
    make_ptx = CUDABackend.make_ptx

    def corrected(*arguments: Any) -> str:
        ptx = make_ptx(*arguments)
        return re.sub(
            "// begin inline asm.*?// end inline asm",
            lambda block: re.sub(r"^\s*\.loc\b.*\n", "", block[0], flags=re.MULTILINE),
            ptx,
            flags=re.DOTALL,
        )

    with (
        tempfile.TemporaryDirectory() as cache,
        patch.dict(os.environ, TRITON_CACHE_DIR=cache),
        patch.object(CUDABackend, "make_ptx", corrected),
    ):
        yield


def record(call: Callable[[], Any]) -> list[Launch]:
    """The launches that `call` makes."""
    launches: list[Launch] = []

    def launch(kernel: Any, plan: Plan, device: Any, *arguments: Any) -> None:
        names = [name for name in kernel.arg_names if name not in plan.constants and name != "FAST"]
        given = dict(zip(names, (*arguments, *plan.numbers), strict=True))
        launches.append(Launch(kernel, given, plan.constants, plan.num_warps))

    with ExitStack() as stack:
        for module in MODULES:
            stack.enter_context(patch.object(module, "launch", launch))
        call()
    return launches


def launches() -> Iterator[tuple[str, Launch]]:
    """Each kernel in the configurations that fastvae uses, by name.

    "rows" are samples of which a program has several; "long" samples or batches are shared by many programs, so are
    "images" of 28x28, in smaller tiles. float16 compiles to the code of bfloat16.
    """
    noise = (None, None, 1, 4, 0)  # by value; noise by pointer, under capture, runs the same compiled kernel
    one, kl = torch.empty(()), torch.empty(512)
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        small, long = torch.empty(512, 32, dtype=dtype), torch.empty(512, 2 * 16384, dtype=dtype)
        dense = torch.empty(512, 16384, dtype=dtype)
        image = torch.empty(512, 32, 32, 32, dtype=dtype).to(memory_format=torch.channels_last)
        calls: dict[str, Callable[[], Any]] = {
            "gaussian_sample long": lambda d=dense: gaussian.gaussian_sample(d, d, None, *noise),
            "gaussian_kl long": lambda d=dense: gaussian.gaussian_kl(d, d, "batchmean", 0.0),
        }
        for size, moments in (("rows", small), ("long", long), ("channels_last", image)):
            z = torch.empty_like(moments.narrow(1, 0, moments.shape[1] // 2))
            calls |= {
                f"gaussian_sample_kl packed {size}": lambda m=moments: gaussian.gaussian_sample_kl(
                    m, None, 1, "none", 0.0, None, *noise
                ),
                f"gaussian_backward packed {size}": lambda m=moments, z=z: gaussian.gaussian_backward(
                    m, None, 1, "none", 0.0, z, kl, None, True, True, None, *noise
                ),
            }
            if size == "channels_last":
                continue
            means = torch.empty(z.shape[1])
            calls |= {
                f"dimensions_forward packed {size}": lambda m=moments: gaussian.gaussian_sample_kl(
                    m, None, 1, "per_dimension", 0.1, None, *noise
                ),
                f"dimensions_backward packed {size}": lambda m=moments, z=z, k=means: gaussian.gaussian_backward(
                    m, None, 1, "per_dimension", 0.1, z, k[:1].expand(len(k)), k, True, True, None, *noise
                ),
            }
        calls["gaussian_backward dense long"] = lambda d=dense: gaussian.gaussian_backward(
            d, d, 1, "none", 0.0, d, kl[:1].expand(512), None, True, True, None, *noise
        )
        pairs = {"long": (dense, dense)}
        if dtype is torch.float32:
            images = torch.empty(128, 1, 28, 28)
            photos = torch.empty(512, 1, 28, 28, dtype=torch.uint8)
            calls["gather_batch uint8 images"] = lambda p=photos: batch.gather_batch(p, torch.arange(128))
            pairs |= {"uint8 target": (dense, dense.to(torch.uint8)), "images": (images, images)}
        for pair_name, (logits, target) in pairs.items():
            divergence = kl[: len(logits)]
            calls |= {
                f"sigmoid_mse_forward {pair_name}": lambda x=logits, t=target: reconstruction.sigmoid_mse_forward(
                    x, t, "none"
                ),
                f"sigmoid_mse_backward {pair_name}": lambda x=logits, t=target: reconstruction.sigmoid_mse_backward(
                    x, t, one, "mean", True, False
                ),
                f"elbo_loss {pair_name}": lambda x=logits, t=target, d=divergence: elbo.elbo_loss(x, t, d, one, 0.5),
                f"elbo_value_and_grad {pair_name}": lambda x=logits, t=target, d=divergence: elbo.elbo_value_and_grad(
                    x, t, d, one, 0.5, None
                ),
                f"elbo_backward {pair_name}": lambda x=logits, t=target, d=divergence: elbo.elbo_backward(
                    x, t, d, one, None, None, one, 0.5, True, False, True
                ),
            }
        for call_name, call in calls.items():
            (launch,) = record(call)
            yield f"{call_name} {name}", launch
