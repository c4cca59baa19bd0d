"""The kernels compiled ahead of time, which needs no GPU: no spills, whole vectors, no more instructions than
committed, and no offset that could overflow.

Compilation needs functions that were decorated for it, so it runs in processes of its own, without TRITON_INTERPRET.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import triton

from conftest import compiling

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import codegen
import disassembly
from configurations import configurations, of_general
from fastvae.operations import PAIRWISE, operations
from pairwise import OBJECTIVES

GENERAL = {operation.name for _, operation in of_general(torch.float32)}
GROUPED = {it.name for it in operations() if it.numbers_of_an_element}
# By the names of the table. How their accesses and parts lie follows from how the compiler spreads pairs over threads.
OF_PAIRS = {
    f"{name} {kernel.split('.')[1].removesuffix('_kernel')} {size} float32"
    for name, kernels in PAIRWISE.items()
    for kernel in kernels
    for size in OBJECTIVES[name].table
}


def bulk_sizes() -> dict[str, list[int]]:
    """By the names of the table: the element sizes of the tensors of a whole tile that are loaded and stored."""
    found = {"gather_batch forward uint8 images float32": [1, 4]}
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        for size, (operation, direction, spec, _) in configurations(dtype):
            target = (spec.target_dtype or dtype).itemsize
            # Each once: of long rows, which are read again for the gradient, the table has the kernel of that.
            names = dict.fromkeys(moved for names in operation.tensors_moved(direction) for moved in names)
            found[f"{operation.name} {direction} {size} {name}"] = [
                target if moved.startswith("target") else dtype.itemsize for moved in names
            ]
    return found


# All four targets and all kernels take seven times as long: `benchmarks/codegen.py --check`.
COMPILED = ("sm_90",)
# bfloat16 differs from float32 in loads and stores only.
MATCH = r" float32$| (gaussian_sample_kl_packed|elbo_loss|elbo_loss_Gaussian) .* bfloat16$"


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("codegen") / "table.json"
    compiling(codegen.__file__, "--json", path, "--target", *COMPILED, "--match", MATCH)
    return json.loads(path.read_text())["kernels"]


@pytest.fixture(scope="module")
def planted():
    return json.loads(compiling(Path(__file__).parent / "planted_kernels.py"))


@pytest.mark.slow
def test_every_kernel_is_compiled_and_the_committed_table_has_every_target(table):
    kernels = set(bulk_sizes()) | OF_PAIRS
    compiled = {kernel for kernel in kernels if re.search(MATCH, f" {kernel}")}
    assert set(table) == {f"{target} {kernel}" for target in COMPILED for kernel in compiled}
    assert any(kernel.endswith("bfloat16") for kernel in compiled)
    committed = codegen.read_committed(triton.__version__)
    assert set(committed) == {f"{target} {kernel}" for target in codegen.TARGETS for kernel in kernels}
    assert not any(code["spilled_bytes"] for code in committed.values())


@pytest.mark.slow
def test_the_kernels_are_as_good_as_committed(table):
    found = list(codegen.complaints(table, codegen.read_committed(triton.__version__, MATCH)))
    assert not found, "\n".join(found)


@pytest.mark.slow
def test_bulk_tensors_move_in_vectors_of_128_bits(table):
    """None is missing among the accesses that are judged: their number is known."""
    sizes = bulk_sizes()
    for name, code in table.items():
        if name.startswith("gfx"):
            continue
        kernel = name.split(" ", 1)[1]
        if kernel in OF_PAIRS:
            continue
        if kernel.split()[0] in GROUPED:
            # How many follows from how the compiler spreads an axis over threads: 5 classes have 8 places.
            widths = {"128", "32"} if "Mixture" in kernel else {"128"}  # colours are read one by one
            assert set(code["bulk"]) == widths and code["others"] <= 5, name
            continue
        expected: Counter[str] = Counter()
        for size in sizes[kernel]:
            # A copy takes 16 bytes of each dtype; what is computed with, as many elements of each.
            together = 16 // (size if kernel.startswith("gather_batch") else max(sizes[kernel]))
            expected[str(8 * size * together)] += code["elements_per_thread"] / together
            if " odd " in kernel:
                expected[str(8 * size)] += 1
        if "_per_column" in kernel:
            expected["128"] += 1  # the parameter, once for all rows
            if "backward" in kernel:
                expected["32"] += 1  # its gradient, of a column
        if "per_dimension backward long" in name:
            expected["128"] += code["elements_per_thread"] / 4  # a tile is one row, and so is kl, in float32
        assert code["bulk"] == expected, name
        # What is left are scalars: upstream gradients, weights, the pair of the noise, and sums. Of dimensions also kl
        # in float32, 8 columns per thread in two accesses.
        few = 5 if "per_dimension backward rows bfloat16" in name else 4
        if "shared_prior" in name:
            few = 8  # its halves, and their gradients' partial sums, are of 16 columns
        elif "samples backward" in name:
            few = 10  # of each sample a gradient of its density, in a loop that is unrolled
        assert code["others"] <= few, name


@pytest.mark.slow
def test_the_parts_of_a_kernel_are_what_they_are_called(table):
    """Row sums are where there are sums, and tickets where those are shared by programs."""
    for name, code in table.items():
        if name.startswith("gfx"):
            continue
        kernel = name.split(" ", 1)[1]
        if kernel in OF_PAIRS:
            continue
        # Whose gradient is a sum.
        smaller = "_per_column" in kernel or "_per_channel" in kernel or "_shared_prior" in kernel
        sums = not kernel.startswith(("gaussian_sample ", "gather_batch ")) and ("backward" not in kernel or smaller)
        assert (code["row_sums"] > 0) == sums, name
        # The rows of "rows", and images whose sums are asked for one by one, fit one program each.
        alone = " rows " in kernel or kernel.startswith("sigmoid_mse_loss forward images")
        if "per_dimension" in kernel:
            alone = " long " in kernel  # the other way round: rows are what is shared
        if "_shared_prior backward" in kernel:
            alone = False
        assert (code["finishing"] > 0) == (sums and not alone), name
        # Of images a thread has only 8 elements, over which the mask of kl's gradient is spread: 7 instructions.
        most = 2 + 7 / 8 if kernel.startswith("elbo_value_and_grad forward images") else 2
        # So it is over the 4 elements that a thread has of a heavy term.
        most = 4 if code["elements_per_thread"] == 4 else most
        # Of whole channels nothing is left over, so the masks are numbers. The general pair has its masks in tensors,
        # which its sums use too.
        may_be_none = "_per_channel" in kernel or kernel.split()[0] in GENERAL
        assert (code["tails"] > 0 or may_be_none) and code["tails"] < most and code["body"] > 2, name
        assert code["fixed"] > 0, name


# What follows shows that each check can fail: first on figures, then on kernels.

SOUND = {
    "sm_90 kernel float32": {
        "spilled_bytes": 0, "narrow": {}, "overflows": [], "fused_sums": 0, "body": 20.0, "instructions": 30.0,
        "finishing": 300, "widest_load": 128, "widest_store": 128,
    },
    "gfx942 kernel float32": {
        "spilled_bytes": 0, "narrow": None, "overflows": [], "fused_sums": None, "body": None, "instructions": None,
        "finishing": None, "widest_load": 128, "widest_store": 0,
    },
}  # fmt: skip


def test_a_sound_table_has_no_complaint():
    assert not list(codegen.complaints(SOUND, SOUND))


@pytest.mark.parametrize(
    ("figure", "value", "complaint"),
    [
        ("spilled_bytes", 8, "8 bytes of registers are spilled"),
        ("narrow", {"64": 2}, "narrower than they could be: 2 of 64 bits"),
        ("fused_sums", 1, "1 sums over threads add a product before it is rounded"),
        ("overflows", ["%start = arith.muli %pid, %c1024_i32 : i32"], "an offset is made in 32 bits: %start"),
        ("widest_load", 64, "widest_load 64 bits, committed 128"),
        ("body", 22.2, "body 22.2 instructions, committed 20.0"),
        ("instructions", 33.3, "instructions 33.3 instructions, committed 30.0"),
        ("finishing", 333, "finishing 333 instructions, committed 300"),
    ],
)
def test_a_kernel_that_got_worse_is_a_complaint(figure, value, complaint):
    worse = copy.deepcopy(SOUND)
    worse["sm_90 kernel float32"][figure] = value
    (found,) = codegen.complaints(worse, SOUND)
    assert found.startswith("sm_90 kernel float32: ") and complaint in found


@pytest.mark.parametrize("figure", ["body", "instructions", "finishing"])
def test_ten_percent_more_are_no_complaint(figure):
    worse = copy.deepcopy(SOUND)
    worse["sm_90 kernel float32"][figure] *= 1.09
    assert not list(codegen.complaints(worse, SOUND))


def test_a_kernel_that_was_not_committed_is_a_complaint():
    (found,) = codegen.complaints(SOUND, {"gfx942 kernel float32": SOUND["gfx942 kernel float32"]})
    assert found == "sm_90 kernel float32: not in the committed table: python benchmarks/codegen.py --write"


def test_a_committed_kernel_that_is_gone_is_a_complaint():
    (found,) = codegen.complaints({"gfx942 kernel float32": SOUND["gfx942 kernel float32"]}, SOUND | {"gfx942 old": {}})
    assert found.startswith("gfx942 old: in the committed table, but no longer a kernel")


def test_an_unknown_triton_names_the_command_that_adds_its_table():
    with pytest.raises(FileNotFoundError, match=r"triton 99\.1\.0: .*\n  python benchmarks/codegen.py --write$"):
        codegen.read_committed("99.1.0")


def test_a_table_is_written_whole_and_read_back(tmp_path, monkeypatch):
    path = tmp_path / "codegen" / "triton-9.9.json"
    monkeypatch.setattr(codegen, "committed_path", lambda version: path)
    codegen.write_table(path, "9.9.0", SOUND)
    assert codegen.read_committed("9.9.0") == SOUND
    assert len(path.read_text().splitlines()) == len(SOUND) + 2
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_committed_tables_hold_the_same_kernels():
    tables = [json.loads(path.read_text())["kernels"] for path in codegen.committed_path("0").parent.glob("*.json")]
    assert len(tables) >= 2
    assert all(list(table) == list(tables[0]) for table in tables)


@pytest.mark.slow
def test_a_planted_kernel_without_fault_has_no_complaint(planted):
    sound = planted["sound"]
    assert not list(codegen.complaints({"sm_90 sound": sound}, {"sm_90 sound": sound}))
    # 32 elements per thread, read and written in vectors of four, and one partial sum.
    assert sound["bulk"] == {"128": 16} and sound["others"] == 1
    assert sound["row_sums"] > 0 and sound["finishing"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ("strided", "narrower than they could be: 32 of 32 bits"),
        ("reads twice", "body 10"),
        ("adds products", "1 sums over threads add a product before it is rounded"),
        ("without registers", "bytes of registers are spilled"),
    ],
)
def test_a_planted_fault_is_a_complaint(fault, complaint, planted):
    found = codegen.complaints({"sm_90 planted": planted[fault]}, {"sm_90 planted": planted["sound"]})
    assert any(complaint in text for text in found)


@pytest.mark.slow
def test_a_planted_second_read_is_seen_in_the_body_alone(planted):
    sound, wasteful = planted["sound"], planted["reads twice"]
    assert wasteful["bulk"] == {"128": 24}
    assert wasteful["body"] > 1.1 * sound["body"]
    assert wasteful["row_sums"] == sound["row_sums"] and wasteful["finishing"] == sound["finishing"]


def test_the_overflow_check_can_fail():
    wrong = """
    %pid = tt.get_program_id x : i32
    %start = arith.muli %pid, %c1024_i32 : i32
    %wide = arith.extsi %start : i32 to i64
    """
    right = """
    %pid = tt.get_program_id x : i32
    %row = arith.divsi %pid, %chunks : i32
    %wide = arith.extsi %row : i32 to i64
    %start = arith.muli %wide, %c1024_i64 : i64
    """
    assert len(list(disassembly.narrow_arithmetic(wrong))) == 1
    assert not list(disassembly.narrow_arithmetic(right))


@pytest.mark.parametrize(
    ("operation", "access"),
    [
        ("@P0 LDG.E.128 R16, desc[UR14][R36.64] ;", ("load", 128)),
        ("LDG.E.EF.64.CONSTANT R2, desc[UR4][R2.64] ;", ("load", 64)),
        ("LDG.E R2, desc[UR4][R2.64] ;", ("load", 32)),
        ("@!P1 STG.E.U16 desc[UR4][R2.64], R5 ;", ("store", 16)),
        ("STG.E.U8 desc[UR4][R2.64], R5 ;", ("store", 8)),
        ("STS.128 [R4], R8 ;", None),
    ],
)
def test_the_width_of_an_access_is_read_from_its_instruction(operation, access):
    assert disassembly.sass_access(operation) == access


def test_the_width_of_accesses_on_amd():
    text = """
        global_load_dwordx4 v[2:5], v0, s[2:3]
        s_load_dwordx2 s[0:1], s[4:5], 0x0
        buffer_store_short v1, v2, s[4:7], 0 offen
    """
    assert list(disassembly.gcn_accesses(text)) == [("load", 128), ("store", 16)]
