"""The kernels compiled ahead of time, which needs no GPU: no spills, whole vectors, and no offset that could overflow.

Compilation needs functions that were decorated for it, so it runs in a process of its own, without TRITON_INTERPRET.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CODEGEN = Path(__file__).parents[1] / "benchmarks" / "codegen.py"
if not CODEGEN.exists():
    pytest.skip("needs benchmarks/codegen.py of the source tree", allow_module_level=True)

# Bulk tensors of a whole tile that an operation loads or stores; those of uint8 targets apart.
BULK_TENSORS = {
    "gaussian_sample": 3,
    "gaussian_kl": 2,
    "gaussian_sample_kl": 3,
    "gaussian_backward": 5,
    "sigmoid_mse_forward": 2,
    "sigmoid_mse_backward": 3,
    "elbo_loss": 2,
    "elbo_value_and_grad": 3,
    "elbo_backward": 3,
}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("codegen") / "table.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, CODEGEN, "--json", path], env=environment, check=True, stdout=subprocess.DEVNULL)
    return json.loads(path.read_text())["kernels"]


@pytest.mark.slow
def test_every_kernel_is_compiled_for_every_target(table):
    assert {key.split()[0] for key in table} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert {key.split()[1] for key in table} == set(BULK_TENSORS)


@pytest.mark.slow
def test_nothing_is_spilled(table):
    assert not [name for name, code in table.items() if code["spilled_bytes"]]


@pytest.mark.slow
def test_bulk_tensors_move_in_vectors_of_128_bits(table):
    for name, code in table.items():
        if name.startswith("gfx"):
            continue
        itemsize = 4 if name.endswith("float32") else 2
        per_tensor = code["elements_per_thread"] * itemsize / 16
        tensors = BULK_TENSORS[name.split()[1]]
        bytes_target = code["elements_per_thread"] / 16 if "uint8" in name else per_tensor
        vectors = code["widths"].count(128)
        assert vectors == (tensors - 1) * per_tensor + bytes_target, f"{name}: {vectors} accesses of 128 bits"
        # What is left are scalars: upstream gradients, weights, the pair of the noise, and the finished sums.
        assert len(code["widths"]) - vectors <= 7, f"{name}: {code['widths']}"


@pytest.mark.slow
def test_no_offset_is_made_in_32_bits(table):
    assert not {name: code["overflows"] for name, code in table.items() if code["overflows"]}


def test_the_overflow_check_can_fail():
    specification = importlib.util.spec_from_file_location("codegen", CODEGEN)
    codegen = importlib.util.module_from_spec(specification)
    sys.modules["codegen"] = codegen
    specification.loader.exec_module(codegen)
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
    assert len(list(codegen.narrow_arithmetic(wrong))) == 1
    assert not list(codegen.narrow_arithmetic(right))
