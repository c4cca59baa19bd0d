"""The compiled code of every kernel: registers, spills, shared memory, width of loads and stores, instructions.

    python benchmarks/codegen.py [--target sm_80 sm_90 sm_100 gfx942]    print the table
    python benchmarks/codegen.py --write       write it to benchmarks/codegen/triton-<version>.json, to be committed
    python benchmarks/codegen.py --check       compare with that file: what `tests/test_codegen.py` does
    python benchmarks/codegen.py --markdown    print the columns a person reads, as Markdown (sm_90 unless --target)

This needs no GPU. The launches are recorded instead of run, and compiled ahead of time with the ptxas that Triton
contains. TRITON_INTERPRET must not be set, because the mode is fixed when a kernel is decorated.

Instructions are counted in SASS (NVIDIA only), in the code of one thread, so a loop counts once. Each instruction
belongs to one of five parts. The part depends on the source line that the compiler noted for the instruction, and on
Triton's intermediate code for that line:

- body: lines that work on tensors of a whole tile; per element.
- tails: lines that compute the masks of those loads and stores; per element. (The initial zeros of masked loads are on
  the load's line, so they count in the body.)
- row sums: the reductions of `tl.sum`, before any ticket is drawn; per thread.
- fixed: all other lines, which work on numbers and on one value per row: addresses, seeds, scales; per thread.
- finishing: the ticket, and everything after it, which only the last program runs: the sum over programs; per thread.

A comparison of two tile sizes (slope and intercept) would measure code that never runs, because another tile has other
layouts, vectors and registers.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from configurations import launches
from disassembly import (
    PARTS,
    bits_moved,
    classify,
    fused_sums,
    gcn_accesses,
    narrow_arithmetic,
    read_sass,
    sass_access,
    source_lines,
    widest,
)
from fastvae.files import replacing
from fastvae.kernels.tiles import drew_last_ticket
from launches import Launch, exact_lines

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Code:
    """What the compiler made. Widths are in bits; "bulk" are the accesses of a whole tile. Instructions and what is
    after them: NVIDIA only.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    widest_load: int
    widest_store: int
    elements_per_thread: float
    overflows: tuple[str, ...] = ()  # arithmetic on a program's number that 32 bits may not hold
    body: float | None = None  # per element
    tails: float | None = None  # per element
    row_sums: int | None = None
    fixed: int | None = None
    finishing: int | None = None
    instructions: float | None = None  # per element, all but the finishing
    bulk: dict[str, int] | None = None  # how many accesses there are of each width
    narrow: dict[str, int] | None = None  # those of them that are not of `Launch.widths`
    others: int | None = None  # accesses of single numbers, the finishing apart
    fused_sums: int | None = None  # see `disassembly.fused_sums`


def inspect(launch: Launch, target: GPUTarget, **options: Any) -> Code:
    compiled = launch.compile(target, **options)
    overflows = tuple(narrow_arithmetic(compiled.asm["ttir"]))
    elements = launch.elements_per_thread
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        registers, spills = (
            int(re.search(rf"\.{key}:\s*(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count")
        )
        accesses = list(gcn_accesses(text))
        return Code(
            registers,
            4 * spills,
            compiled.metadata.shared,
            widest(accesses, "load"),
            widest(accesses, "store"),
            elements / 2,  # twice the threads in a warp
            overflows,
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage, sass = (
            subprocess.run([TOOLS / tool, *flags, path], capture_output=True, text=True, check=True).stdout
            for tool, *flags in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c", "-gi"))
        )
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    instructions = read_sass(sass)
    for instruction, part in classify(instructions, compiled.asm["ttgir"], launch.tile, source_lines(drew_last_ticket)):
        parts[part].append(instruction.operation)
    count = {part: len(operations) for part, operations in parts.items()}
    bulk = [access for operation in parts["body"] if (access := sass_access(operation))]
    others = [
        access
        for part in ("tails", "row sums", "fixed")
        for operation in parts[part]
        if (access := sass_access(operation))
    ]
    return Code(
        registers,
        stack + local,
        compiled.metadata.shared,
        widest(bulk, "load"),
        widest(bulk, "store"),
        elements,
        overflows,
        body=round(count["body"] / elements, 2),
        tails=round(count["tails"] / elements, 2),
        row_sums=count["row sums"],
        fixed=count["fixed"],
        finishing=count["finishing"],
        instructions=round(sum(count[part] for part in PARTS if part != "finishing") / elements, 2),
        bulk=bits_moved(bulk),
        narrow=bits_moved([access for access in bulk if access.bits not in launch.widths]),
        others=len(others),
        fused_sums=fused_sums(instructions),
    )


Table = dict[str, dict[str, Any]]


def compile_all(targets: list[str], match: str = "") -> Table:
    """match: a regular expression that is found in the names of the kernels that are compiled."""
    jobs = [
        (name, launch, target)
        for name, launch in launches()
        for target in targets
        if re.search(match, f"{target} {name}")
    ]
    # Threads suffice: much of the time goes to ptxas and the disassembler, outside of Python.
    with exact_lines(), ThreadPoolExecutor(os.cpu_count()) as pool:
        codes = list(pool.map(lambda job: inspect(job[1], TARGETS[job[2]]), jobs))
    return {f"{target} {name}": asdict(code) for (name, _, target), code in zip(jobs, codes, strict=True)}


# What is committed: what a change of a kernel should show in a diff.
COMMITTED = (
    "registers", "spilled_bytes", "shared_bytes", "widest_load", "widest_store",
    "instructions", "body", "tails", "row_sums", "fixed", "finishing",
)  # fmt: skip
# More instructions than committed are a complaint from this factor on.
TOLERANCE = 1.1
WRITE = "python benchmarks/codegen.py --write"


def committed_path(version: str) -> Path:
    """Of triton's minor version: its compiler, and with it the table, changes with that."""
    return Path(__file__).parent / "codegen" / f"triton-{'.'.join(version.split('.')[:2])}.json"


def read_committed(version: str, match: str = "") -> Table:
    """The figures of a triton version, of the kernels in whose names the regular expression is found."""
    path = committed_path(version)
    if not path.exists():
        raise FileNotFoundError(f"no figures are committed for triton {version}: write and commit them with\n  {WRITE}")
    return {name: code for name, code in json.loads(path.read_text())["kernels"].items() if re.search(match, name)}


def write_table(path: Path, version: str, table: Table) -> None:
    """One line per kernel, so that a diff reads well."""
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(figures)}" for name, figures in table.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(f'{{"triton": {json.dumps(version)}, "kernels": {{\n{lines}\n}}}}\n'.encode())


def complaints(table: Table, committed: Table) -> Iterator[str]:
    """Everything that is wrong with the kernels of `table`, given the committed figures."""
    for name, code in table.items():
        if code["spilled_bytes"]:
            yield f"{name}: {code['spilled_bytes']} bytes of registers are spilled"
        if code["narrow"]:
            what = ", ".join(f"{count} of {bits} bits" for bits, count in code["narrow"].items())
            yield f"{name}: bulk tensors are accessed in pieces narrower than they could be: {what}"
        if code["fused_sums"]:
            yield f"{name}: {code['fused_sums']} sums over threads add a product before it is rounded"
        for line in code["overflows"]:
            yield f"{name}: an offset is made in 32 bits: {line}"
        if name not in committed:
            yield f"{name}: not in the committed table: {WRITE}"
            continue
        for figure in ("widest_load", "widest_store"):
            if code[figure] < committed[name][figure]:
                yield f"{name}: {figure} {code[figure]} bits, committed {committed[name][figure]}"
        for figure in ("body", "instructions", "finishing"):
            if code[figure] is not None and code[figure] > TOLERANCE * committed[name][figure]:
                yield (
                    f"{name}: {figure} {code[figure]} instructions, committed {committed[name][figure]}; "
                    f"if that is what is wanted: {WRITE}"
                )
    targets = {name.split()[0] for name in table}
    for name in committed:
        if name not in table and name.split()[0] in targets:
            yield f"{name}: in the committed table, but no longer a kernel: {WRITE}"


def report(table: Table) -> Iterator[str]:
    yield f"{'instructions: per element | per thread':>137}"
    yield (f"{'kernel':59} registers spilled shared  load store bits |   body  tails | row sums fixed finishing")
    for name, code in table.items():
        line = (
            f"{name:59} {code['registers']:9} {code['spilled_bytes']:7} {code['shared_bytes']:6} "
            f"{code['widest_load']:5} {code['widest_store']:5}"
        )
        if code["body"] is not None:
            line += (
                f"      | {code['body']:6.1f} {code['tails']:6.2f} | "
                f"{code['row_sums']:8} {code['fixed']:5} {code['finishing']:9}"
            )
        yield line


def markdown(table: Table) -> Iterator[str]:
    yield (
        "| kernel | dtype | registers | spilled | shared | widest load, store | body per element | tails per element "
        "| row sums | fixed | finishing |"
    )
    yield "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
    for name, code in table.items():
        kernel, dtype = name.split(" ", 1)[1].rsplit(" ", 1)
        cells = [kernel, dtype, code["registers"], f"{code['spilled_bytes']} B", f"{code['shared_bytes']} B"]
        cells += [f"{code['widest_load']}, {code['widest_store']}"]
        if code["body"] is None:
            cells += ["", "", "", "", ""]
        else:
            cells += [f"{code['body']:.1f}", f"{code['tails']:.2f}", code["row_sums"], code["fixed"], code["finishing"]]
        yield "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", choices=TARGETS, help="default: all, with --markdown sm_90")
    parser.add_argument("--match", default="", metavar="REGEX", help="only kernels in whose names this is found")
    parser.add_argument("--write", action="store_true", help="write the table of this triton version")
    parser.add_argument("--check", action="store_true", help="compare with the table of this triton version")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    parser.add_argument("--json", type=Path, help="also write everything that was found to this file")
    settings = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("unset TRITON_INTERPRET: interpreted functions cannot be compiled")
    if os.environ.get("TRITON_DISABLE_LINE_INFO", "0") == "1":
        parser.error("unset TRITON_DISABLE_LINE_INFO: instructions are told apart by their source lines")
    if settings.write and (settings.target or settings.match):
        parser.error("--write needs all targets and kernels")
    table = compile_all(settings.target or (["sm_90"] if settings.markdown else list(TARGETS)), settings.match)
    print(*(markdown if settings.markdown else report)(table), sep="\n")
    if settings.json:
        write_table(settings.json, triton.__version__, table)
    if settings.write:
        figures = {
            name: {figure: code[figure] for figure in COMMITTED if code[figure] is not None}
            for name, code in table.items()
        }
        write_table(committed_path(triton.__version__), triton.__version__, figures)
    if settings.check:
        found = list(complaints(table, read_committed(triton.__version__, settings.match)))
        if found:
            sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
