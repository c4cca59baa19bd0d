"""Read compiled code: the purpose of each instruction, the width of memory accesses, and offsets that may overflow."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

Line = tuple[str, int]  # file and number

PARTS = ("body", "tails", "row sums", "fixed", "finishing")


class Instruction(NamedTuple):
    operation: str
    line: Line | None  # the innermost, where functions were inlined


def read_sass(disassembly: str) -> list[Instruction]:
    """The instructions of `nvdisasm -c -gi`, without padding."""
    instructions = []
    line: Line | None = None
    after_instruction = True
    for text in disassembly.splitlines():
        if match := re.match(r'\s*//## File "(.*?)", line (\d+)', text):
            # The places where the function was inlined follow on lines of their own.
            if after_instruction:
                line = match[1], int(match[2])
            after_instruction = False
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s*(.*)", text):
            after_instruction = True
            if not match[1].startswith("NOP"):
                instructions.append(Instruction(match[1], line))
    return instructions


def source_lines(function: Any) -> set[Line]:
    """The lines of a Triton function."""
    lines, first = inspect.getsourcelines(function.fn)
    return {(inspect.getsourcefile(function.fn), number) for number in range(first, first + len(lines))}


def tile_lines(ttgir: str, tile: int) -> tuple[set[Line], set[Line]]:
    """The source lines that work on tensors of a whole tile, and those that make the masks of its loads and stores."""
    # A location is an alias of a place, of a named place, of a place inlined at another, or of several places.
    aliases = dict(re.findall(r"^#loc(\d*) = loc\((.*)\)$", ttgir, re.MULTILINE))

    def place(alias: str) -> Line | None:
        if match := re.match(r'"(.*)":(\d+):\d+', aliases[alias]):
            return match[1], int(match[2])
        inner = re.search(r"#loc(\d*)", aliases[alias])
        return place(inner[1]) if inner else None

    working: set[Line] = set()
    masks: set[str] = set()
    made: dict[str, tuple[str, Line]] = {}  # result: what made it, and where
    for text in ttgir.splitlines():
        match = re.search(r"loc\(#loc(\d*)\)$", text)
        if text.startswith("#") or not match or (line := place(match[1])) is None:
            continue
        if definition := re.match(r"\s*(%[\w#]+)(?::\d+)? = (.*)", text):
            made[definition[1]] = definition[2], line
        sizes = [prod(map(int, shape.split("x")[:-1])) for shape in re.findall(r"tensor<((?:\d+x)+)", text)]
        # An eighth, because noise is made in pairs of quads.
        if any(size >= tile / 8 for size in sizes):
            working.add(line)
            if access := re.search(r"\btt\.(load|store) (.*?) :", text):
                masks.update(re.findall(r"%[\w#]+", access[2])[1 if access[1] == "load" else 2 :][:1])
    masking: set[Line] = set()
    for name in masks:
        operation, line = made[name]
        while operation.startswith("ttg.convert_layout"):
            operation, line = made[re.search(r"%[\w#]+", operation)[0]]
        masking.add(line)
    return working - masking, masking


def classify(
    instructions: list[Instruction], ttgir: str, tile: int, ticket_lines: set[Line]
) -> Iterator[tuple[Instruction, str]]:
    """Each instruction and which of PARTS it belongs to; see `codegen`."""
    working, masking = tile_lines(ttgir, tile)
    ticket_drawn = False
    for instruction in instructions:
        line = instruction.line
        ticket_drawn |= re.search(r"\bATOM", instruction.operation) is not None
        if ticket_drawn or line in ticket_lines:
            yield instruction, "finishing"
        elif line is not None and line[0].endswith("triton/language/standard.py"):
            yield instruction, "row sums"
        elif line in masking:
            yield instruction, "tails"
        elif line in working:
            yield instruction, "body"
        else:
            yield instruction, "fixed"


def fused_sums(instructions: list[Instruction]) -> int:
    """How many sums over threads add a product in the instruction that makes it: a * b + c, where c is another thread's
    product. Each of the two threads then has rounded only the other's, and their sums differ.
    """
    products: set[str] = set()
    shuffled: set[str] = set()  # products of another thread
    found = 0
    for operation, _ in instructions:
        registers = re.findall(r"\bR\d+\b", operation)
        if re.search(r"\bFFMA\S* ", operation) and len(registers) > 1 and registers[-1] in shuffled:
            found += 1
        if registers:
            is_product = re.search(r"\bFMUL", operation)
            is_shuffled = re.search(r"\bSHFL\.BFLY\b", operation) and registers[1] in products
            for those, are in ((products, is_product), (shuffled, is_shuffled)):
                (those.add if are else those.discard)(registers[0])
    return found


class Access(NamedTuple):
    kind: str  # load or store
    bits: int


def sass_access(operation: str) -> Access | None:
    """What an instruction reads from or writes to global memory, if anything."""
    match = re.search(r"\b(LDG|STG)\.([\w.]+)", operation)
    if not match:
        return None
    sizes = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
    bits = next((sizes[word] for word in match[2].split(".") if word in sizes), 32)
    return Access("load" if match[1] == "LDG" else "store", bits)


def gcn_accesses(assembly: str) -> Iterator[Access]:
    sizes = {
        "dword": 32,
        "dwordx2": 64,
        "dwordx3": 96,
        "dwordx4": 128,
        "short": 16,
        "ushort": 16,
        "byte": 8,
        "ubyte": 8,
    }
    for kind, size in re.findall(r"^\s*(?:global|buffer|flat)_(load|store)_([a-z]+\d?)", assembly, re.MULTILINE):
        if size in sizes:
            yield Access(kind, sizes[size])


def widest(accesses: list[Access], kind: str) -> int:
    return max((access.bits for access in accesses if access.kind == kind), default=0)


def bits_moved(accesses: list[Access]) -> dict[str, int]:
    """How many accesses there are of each width."""
    return {str(bits): count for bits, count in sorted(Counter(access.bits for access in accesses).items())}


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
            "arith.extui",
            "arith.cmpi",
            "tt.addptr",
        ):
            tainted.add(result)
            if operation in ("arith.addi", "arith.subi", "arith.muli", "arith.shli"):
                yield line.strip()
