"""Kernels with faults that `benchmarks/codegen.py` must see, compiled in a process of its own by `test_codegen.py`.

    python tests/planted_kernels.py

Prints what is found about each, as JSON.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from codegen import TARGETS, inspect
from fastvae.kernels.tiles import drew_last_ticket, sum_in_order
from launches import Launch, exact_lines


@triton.jit
def scaled_sum(
    source_ptr, result_ptr, sum_ptr, partial_ptr, ticket_ptr, size,
    STRIDE: tl.constexpr, AGAIN: tl.constexpr, SQUARES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """A kernel of every part: a masked body, a row sum, and the sum over programs.

    STRIDE > 1 makes its load narrow, AGAIN makes it read everything twice, SQUARES add up products.
    """
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < size
    source = tl.load(source_ptr + column * STRIDE, mask=inside, other=0.0)
    if AGAIN:
        tl.debug_barrier()
        source *= tl.load(source_ptr + column * STRIDE, mask=inside, other=0.0, volatile=True)
    tl.store(result_ptr + column, source * tl.exp(source), mask=inside)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(source * source if SQUARES else source))
    if drew_last_ticket(ticket_ptr):
        tl.store(sum_ptr, sum_in_order(partial_ptr, tl.num_programs(0), 1, 1024))


def planted(
    stride: int = 1, again: bool = False, squares: bool = False, columns: int = 4096, **options: int
) -> dict[str, object]:
    numbers, number = torch.empty(1 << 16), torch.empty(())
    arguments = {
        "source_ptr": numbers, "result_ptr": numbers, "sum_ptr": number, "partial_ptr": numbers,
        "ticket_ptr": torch.zeros(1, dtype=torch.int32), "size": 1 << 16,
    }  # fmt: skip
    constants = {"STRIDE": stride, "AGAIN": again, "SQUARES": squares, "ROWS": 1, "COLUMNS": columns}
    return asdict(inspect(Launch(scaled_sum, arguments, constants, 4), TARGETS["sm_90"], **options))


if __name__ == "__main__":
    with exact_lines():
        found = {
            "sound": planted(),
            "strided": planted(stride=3),
            "reads twice": planted(again=True),
            "adds products": planted(squares=True, columns=128),  # one number per thread, so that threads add them
            "without registers": planted(maxnreg=16),
        }
    print(json.dumps(found))
