"""Record the launches of fastvae instead of running them, and compile them ahead of time."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from math import prod
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource

import fastvae.functional as F
from fastvae.kernels import batch
from fastvae.kernels.launch import Plan
from fastvae.likelihoods import Bernoulli, SigmoidMSE
from fastvae.operations import Operation, Spec, all_kernel_names, operations
from pairwise import OBJECTIVES, in_directions
from stand_in import stand_in

# Those that launch.
MODULES = [
    batch,
    *(import_module(f"fastvae.kernels.{name}") for name in sorted({it.split(".")[0] for it in all_kernel_names()})),
]
channels_last = partial(Tensor.contiguous, memory_format=torch.channels_last)
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


class Configuration(NamedTuple):
    """An operation in one direction, as it is compiled ahead of time."""

    operation: Operation
    direction: str
    spec: Spec
    options: Mapping[str, Any]

    def record(self) -> Launch:
        tensors, launches = self.operation.inputs(self.spec), {}
        outputs: list[Tensor] = []
        launches["forward"] = record(lambda: outputs.extend(self.operation(F, *tensors, **self.options)))
        if self.direction == "backward":
            roots, leaves = outputs[: self.operation.roots], [t for t in tensors if t.requires_grad]
            # Dense, as a decoder and the bound give them; one number for all dimensions, as the gradient of a sum is.
            upstream = [
                root.new_ones(()).expand(root.shape)
                if name == "kl" and self.options.get("reduction") is None
                else torch.ones_like(root)
                for name, root in zip(self.operation.outputs, roots, strict=False)
            ]
            launches["backward"] = record(lambda: torch.autograd.grad(roots, leaves, upstream))
        return launches[self.direction][-1]  # of long rows, after the sums


# The operations of the posterior share kernels; these are the forms that differ. "rows" are samples of which a program
# has several; "long" samples or batches are shared by many programs.
POSTERIOR = {
    ("gaussian_sample", "forward"): ("long",),
    ("gaussian_kl", "forward"): ("long",),
    ("gaussian_sample_kl", "backward"): ("long",),
    ("gaussian_sample_kl_packed", "forward"): ("rows", "long", "channels_last"),
    ("gaussian_sample_kl_packed", "backward"): ("rows", "long", "channels_last"),
    ("gaussian_sample_kl_packed_per_dimension", "forward"): ("rows", "long"),
    ("gaussian_sample_kl_packed_per_dimension", "backward"): ("rows", "long"),
}


# Of these every operation is compiled, for each dtype; of the others the loss with its gradients in float32.
BY_DTYPE = (SigmoidMSE(), Bernoulli())


def configurations(dtype: torch.dtype) -> Iterator[tuple[str, Configuration]]:
    """By size: what of the operations is compiled. float16 compiles to the code of bfloat16."""
    sizes = {
        "rows": Spec((512, 16), dtype),
        "long": Spec((512, 16384), dtype),
        "channels_last": Spec((512, 16, 32, 32), dtype, layout=channels_last),
    }
    for operation in operations():
        for direction in operation.directions:
            if operation.long_rows:
                if dtype is torch.float32 and operation.reductions:  # each of the kernels once
                    yield "long", Configuration(operation, direction, Spec((16, 65536), dtype), {"reduction": "none"})
            elif operation.likelihood is None:
                # The packed moments are those of the bound, which takes the divergence of each sample.
                options = {"reduction": "none"} if operation.name == "gaussian_sample_kl_packed" else {}
                for size in POSTERIOR.get((operation.name, direction), ()):
                    yield size, Configuration(operation, direction, sizes[size], options)
            elif operation.measured and (dtype is torch.float32 or operation.likelihood in BY_DTYPE):
                if operation.likelihood not in BY_DTYPE and not operation.smaller and operation.backward is not None:
                    continue  # what differs is the term, and the loss with its gradient has all of it
                long = Spec((16, 3, 32, 32), dtype) if operation.numbers_of_an_element else sizes["long"]
                yield from ((size, it) for size, it in _of_likelihood(operation, direction, long))


def _of_likelihood(operation: Operation, direction: str, long: Spec) -> Iterator[tuple[str, Configuration]]:
    options: dict[str, Any] = {"reduction": "none" if direction == "forward" else "mean"}
    if "kl" in operation.arguments:
        options = {"beta": torch.ones(())}  # as a training loop gives it
    specs = {"long": long}
    if operation.likelihood == SigmoidMSE():
        specs["odd"] = Spec((8, 16385), long.dtype)  # a size that 16 does not divide
        if long.dtype is torch.float32:
            specs["uint8 target"] = replace(long, target_dtype=torch.uint8)
            specs["images"] = Spec((128, 1, 28, 28))  # shared by many programs, in smaller tiles
        else:
            specs["float32 target"] = replace(long, target_dtype=torch.float32)
    for size, spec in specs.items():
        # With a sum for each sample, rows of an odd size start at any address.
        as_one_row = size == "odd" and "reduction" in options
        yield size, Configuration(operation, direction, spec, {"reduction": "mean"} if as_one_row else options)


def pairwise_launches() -> Iterator[tuple[str, Launch]]:
    """The kernels of the objectives of pairs and of samples in float32, with gradients to every input."""
    for name, objective in OBJECTIVES.items():
        for size, sizes in objective.table.items():
            every = range(len(objective.inputs(sizes, torch.float32)))
            for call in in_directions(objective, sizes, torch.float32, every):
                for launch in record(call):
                    kernel = launch.kernel.fn.__name__.removesuffix("_kernel")
                    yield f"{name} {kernel} {size} float32", launch


def launches() -> Iterator[tuple[str, Launch]]:
    """Each kernel in the configurations that fastvae uses, by name."""
    for dtype in (torch.float32, torch.bfloat16):
        for size, it in configurations(dtype):
            yield f"{it.operation.name} {it.direction} {size} {str(dtype).removeprefix('torch.')}", it.record()
    yield from pairwise_launches()
    photos = torch.empty(512, 1, 28, 28, dtype=torch.uint8)
    (launch,) = record(lambda: batch.gather_batch(photos, torch.arange(128)))
    yield "gather_batch forward uint8 images float32", launch
