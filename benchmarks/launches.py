"""Record the launches of fastvae instead of running them, and compile them ahead of time."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from math import prod
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource

from fastvae.kernels import batch
from fastvae.kernels.launch import Plan
from fastvae.operations import all_kernel_names
from stand_in import stand_in

# Those that launch.
MODULES = [
    batch,
    *(import_module(f"fastvae.kernels.{name}") for name in sorted({it.split(".")[0] for it in all_kernel_names()})),
]
TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}
# The sides of a tile of pairs or of samples.
_SIDES = ("ROWS", "COLUMNS", "COMPONENTS", "SAMPLES", "DIMS")


@dataclass(frozen=True)
class Launch:
    """A launch as fastvae would have made it."""

    kernel: Any
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int

    @property
    def tile(self) -> int:
        """The elements of a program. Those that have an axis of their own count once for each place of it, pairs once
        for each dimension, and samples once for each row.
        """
        if self.of_pairs:
            sides = {"COMPONENTS": self.constants.get("ROWS")} | self.constants  # one set has rows on both sides
            return prod(sides[name] or 1 for name in _SIDES if name in sides)
        if "ELEMENTS" in self.constants:
            return self.constants["ELEMENTS"] * self.constants["INNER"]
        return self.constants.get("ROWS", 1) * self.constants["COLUMNS"]

    @property
    def of_pairs(self) -> bool:
        """Of pairs, or of samples."""
        return "DIMS" in self.constants or "SAMPLES" in self.constants

    @property
    def widths(self) -> set[int]:
        """Of the accesses of whole tiles, in bits: 128, and of a tensor of a narrower dtype as many elements; and one
        element each of those behind the last that 16 divides, and of sums.
        """
        if self.of_pairs:
            return {8 << k for k in range(5)}  # what a thread reads follows from how the compiler spreads pairs
        if "ELEMENTS" in self.constants and not self.constants["TARGET_HAS_AXIS"]:
            return {128, 8 * self.arguments["target_ptr"].itemsize}  # a number for each colour of a pixel, one by one
        if "VECTOR" not in self.constants:
            return {128}
        tensors = (*self.arguments["parameter_ptrs"], self.arguments["target_ptr"], *self.arguments["gradient_ptrs"])
        of_tail = {8 * tensor.itemsize for tensor in tensors if self.constants.get("HAS_TAIL")}
        of_sums = {32} if self.constants.get("SUMMED") else set()  # of columns, one by one
        return {8 * self.constants["VECTOR"] * tensor.itemsize for tensor in tensors} | of_tail | of_sums

    @property
    def elements_per_thread(self) -> float:
        return self.tile / (32 * self.num_warps)

    def compile(self, target: GPUTarget, **options: Any) -> Any:
        """The kernel compiled as Triton's launcher would specialise it: null pointers and ones folded, 16-byte
        alignment known.
        """
        signature: dict[str, Any] = {}
        constants: dict[Any, Any] = {}
        attributes = {}
        given = dict(self.constants)
        if "FAST" in self.kernel.arg_names:
            given["FAST"] = target.backend == "cuda"

        def described(value: Any, parameter: Any, path: tuple[int, ...]) -> Any:
            """The signature of an argument, or of an element of one that is a tuple."""
            if isinstance(value, tuple):
                return tuple(described(each, parameter, (*path, k)) for k, each in enumerate(value))
            if value is None or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize):
                constants[path] = value
                return "constexpr"
            if isinstance(value, Tensor):
                if not parameter.do_not_specialize_on_alignment:
                    # Every allocation of torch starts on such an address.
                    attributes[path] = [["tt.divisibility", 16]]
                return "*" + TYPES[value.dtype]
            if isinstance(value, int):
                if value % 16 == 0 and not parameter.do_not_specialize:
                    attributes[path] = [["tt.divisibility", 16]]
                return parameter.annotation_type or ("i32" if -(2**31) <= value < 2**31 else "i64")
            return "fp32"

        for index, parameter in enumerate(self.kernel.params):
            name = parameter.name
            if name in given:
                constants[(index,)] = given[name]
                signature[name] = "constexpr"
            else:
                signature[name] = described(self.arguments[name], parameter, (index,))
        source = ASTSource(self.kernel, signature, constexprs=constants, attrs=attributes)
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


def without_memory(argument: Any) -> Any:
    if isinstance(argument, tuple):
        return tuple(map(without_memory, argument))
    return argument.to("meta") if isinstance(argument, Tensor) else argument


def record(call: Callable[[], Any]) -> list[Launch]:
    """The launches that `call`, with CPU tensors, would make on a card. Their tensors are kept without memory."""
    launches: list[Launch] = []

    def launch(kernel: Any, plan: Plan, device: Any, *arguments: Any) -> None:
        names = [name for name in kernel.arg_names if name not in plan.constants and name != "FAST"]
        given = dict(zip(names, (*arguments, *plan.numbers), strict=True))
        given = {name: without_memory(value) for name, value in given.items()}
        launches.append(Launch(kernel, given, plan.constants, plan.num_warps))

    with ExitStack() as stack:
        stack.enter_context(stand_in())
        for module in MODULES:
            stack.enter_context(patch.object(module, "launch", launch))
        call()
    return launches
