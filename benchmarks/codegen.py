"""What the compiler makes of every kernel: registers, spills, shared memory, width of loads and stores, instructions
per element.

    python benchmarks/codegen.py [--target sm_80 sm_90 sm_100 gfx942]

Needs no GPU: the launches are recorded instead of made, and compiled ahead of time with the ptxas that Triton
carries. Must run where TRITON_INTERPRET is not set, because the mode is fixed when a kernel is decorated.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastvae.kernels import elbo, gaussian, reconstruction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Launch:
    """A launch as fastvae would have made it."""

    kernel: Any
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int

    @property
    def elements_per_thread(self) -> float:
        return self.constants["ROWS"] * self.constants["COLUMNS"] / (32 * self.num_warps)

    def compile(self, target: GPUTarget) -> Any:
        """The kernel compiled as Triton's launcher would specialise it: null pointers and ones folded, 16-byte
        alignment known.
        """
        signature: dict[str, str] = {}
        constants: dict[Any, Any] = dict(self.constants, FAST=target.backend == "cuda")
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
        return triton.compile(source, target=target, options={"num_warps": self.num_warps, "enable_fp_fusion": True})


def record(call: Callable[[], Any]) -> Launch:
    """The one launch that `call` makes."""
    launches: list[Launch] = []

    def launch(kernel: Any, programs: int, num_warps: int, device: Any, *arguments: Any, **constants: Any) -> None:
        names = [name for name in kernel.arg_names if name not in constants and name != "FAST"]
        launches.append(Launch(kernel, dict(zip(names, arguments, strict=True)), constants, num_warps))

    with (
        patch.object(gaussian, "launch", launch),
        patch.object(reconstruction, "launch", launch),
        patch.object(elbo, "launch", launch),
    ):
        call()
    (only,) = launches
    return only


def launches() -> Iterator[tuple[str, Launch]]:
    """Each kernel in the configurations that fastvae uses, by name.

    "rows" are samples of which a program has several, "long" samples or batches are shared by many programs. float16
    compiles to the code of bfloat16.
    """
    by_value, by_pointer = (None, None, 1, 4), (torch.tensor(1), torch.tensor(4), 0, 0)
    one, kl = torch.empty(()), torch.empty(512)
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        small, long = torch.empty(512, 32, dtype=dtype), torch.empty(512, 2 * 16384, dtype=dtype)
        dense = torch.empty(512, 16384, dtype=dtype)
        image = torch.empty(512, 32, 32, 32, dtype=dtype).to(memory_format=torch.channels_last)
        calls: dict[str, Callable[[], Any]] = {
            "gaussian_sample long": lambda d=dense: gaussian.gaussian_sample(d, d, None, *by_value),
            "gaussian_kl long": lambda d=dense: gaussian.gaussian_kl(d, d, "batchmean"),
        }
        for size, moments in (("rows", small), ("long", long), ("channels_last", image)):
            z = torch.empty_like(moments.narrow(1, 0, moments.shape[1] // 2))
            calls |= {
                f"gaussian_sample_kl packed {size}": lambda m=moments: gaussian.gaussian_sample_kl(
                    m, None, 1, "none", None, *by_value
                ),
                f"gaussian_backward packed {size}": lambda m=moments, z=z: gaussian.gaussian_backward(
                    m, None, 1, "none", z, kl, True, True, None, *by_value
                ),
            }
        calls["gaussian_sample_kl captured rows"] = lambda m=small: gaussian.gaussian_sample_kl(
            m, None, 1, "none", None, *by_pointer
        )
        calls["gaussian_backward dense long"] = lambda d=dense: gaussian.gaussian_backward(
            d, d, 1, "none", d, kl[:1].expand(512), True, True, None, *by_value
        )
        targets = {"": dense, " uint8 target": dense.to(torch.uint8)} if dtype is torch.float32 else {"": dense}
        for target_name, target in targets.items():
            calls |= {
                f"sigmoid_mse_forward{target_name}": lambda d=dense, t=target: reconstruction.sigmoid_mse_forward(
                    d, t, "none"
                ),
                f"sigmoid_mse_backward{target_name}": lambda d=dense, t=target: reconstruction.sigmoid_mse_backward(
                    d, t, one, "mean", True, False
                ),
                f"elbo_loss{target_name}": lambda d=dense, t=target: elbo.elbo_loss(d, t, kl, one, 0.5),
                f"elbo_value_and_grad{target_name}": lambda d=dense, t=target: elbo.elbo_value_and_grad(
                    d, t, kl, one, 0.5, None
                ),
                f"elbo_backward{target_name}": lambda d=dense, t=target: elbo.elbo_backward(
                    d, t, kl, one, None, None, one, 0.5, True, False, True
                ),
            }
        for call_name, call in calls.items():
            yield f"{call_name} {name}", record(call)


@dataclass(frozen=True)
class Code:
    """What the compiler made. `instructions` counts the whole kernel once, tails and sums over programs included, per
    element of a tile.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    elements_per_thread: float
    instructions: float | None = None  # NVIDIA only
    widths: tuple[int, ...] = ()  # bits of each plain load and store of global memory; NVIDIA only
    overflows: tuple[str, ...] = ()  # arithmetic on a program's number that 32 bits may not hold


def inspect(launch: Launch, target: GPUTarget) -> Code:
    compiled = launch.compile(target)
    overflows = tuple(narrow_arithmetic(compiled.asm["ttir"]))
    elements = launch.elements_per_thread
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        registers, spills = (
            int(re.search(rf"\.{key}:\s*(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count")
        )
        return Code(registers, 4 * spills, compiled.metadata.shared, elements, overflows=overflows)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", path], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run([TOOLS / "nvdisasm", "-c", path], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    operations = [
        line.split("*/", 1)[1].strip() for line in sass.splitlines() if re.match(r"\s*/\*[0-9a-f]{4,}\*/", line)
    ]
    operations = [operation for operation in operations if not operation.startswith("NOP")]
    widths = [
        {"128": 128, "64": 64, "U16": 16, "U8": 8}.get(match[1], 32)
        for operation in operations
        # STRONG are the accesses to partial sums and tickets.
        if "STRONG" not in operation and (match := re.search(r"\b(?:LDG|STG)\.E(?:\.(128|64|U16|U8))?", operation))
    ]
    return Code(
        registers,
        stack + local,
        compiled.metadata.shared,
        elements,
        len(operations) / elements,
        tuple(widths),
        overflows,
    )


def narrow_arithmetic(ttir: str) -> Iterator[str]:
    """Lines of Triton's intermediate code that add to, multiply or shift a program's number before it is widened to
    64 bits.

    A bulk tensor may have more than 2^31 elements, so no offset may be made from the program's number in 32 bits.
    Dividing it is harmless.
    """
    tainted: set[str] = set()
    for line in ttir.splitlines():
        match = re.match(r"\s*(%[\w#]+)(?::\d+)? = (\S+) (.*)", line)
        if not match:
            continue
        result, operation, rest = match.groups()
        if operation == "tt.get_program_id":
            tainted.add(result)
        elif tainted & set(re.findall(r"%[\w#]+", rest)) and operation not in (
            "arith.extsi",
            "arith.cmpi",
            "tt.addptr",
        ):
            tainted.add(result)
            if operation in ("arith.addi", "arith.subi", "arith.muli", "arith.shli"):
                yield line.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    settings = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("unset TRITON_INTERPRET: interpreted functions cannot be compiled")
    jobs = [(name, launch, target) for name, launch in launches() for target in settings.target]
    # Threads suffice: the time goes to the compiler and the disassembler, outside of Python.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        codes = list(pool.map(lambda job: inspect(job[1], TARGETS[job[2]]), jobs))
    table = {f"{target} {name}": asdict(code) for (name, _, target), code in zip(jobs, codes, strict=True)}
    for name, code in table.items():
        memory = f"{code['spilled_bytes']:3} B spilled {code['shared_bytes']:5} B shared"
        instructions = "" if code["instructions"] is None else f"{code['instructions']:6.1f} instructions/element"
        print(f"{name:60} {code['registers']:4} registers {memory} {instructions}")
    if settings.json:
        temporary = settings.json.with_suffix(".part")
        temporary.write_text(json.dumps({"triton": triton.__version__, "kernels": table}, indent=1))
        temporary.replace(settings.json)


if __name__ == "__main__":
    main()
