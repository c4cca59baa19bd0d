"""The log-sum-exp of each row, over tiles of terms and over programs: a maximum m, and the sum s of e^(term - m)."""

import triton
import triton.language as tl

from .numerics import exp, log
from .tiles import drew_last_ticket

# Rows whose parts are joined at a time.
ROWS_AT_ONCE = tl.constexpr(256)


@triton.jit
def shift(m):
    """What is subtracted from terms whose maximum is m: a difference of equal infinities would be NaN."""
    return tl.where(tl.abs(m) == float("inf"), 0.0, m)


@triton.jit
def joined(m, s, other_m, other_s, FAST: tl.constexpr):
    """(m, s) of two parts, where s = sum e^(term - shift(m)). NaN among the terms is in s, whatever the maximum is."""
    most = tl.maximum(m, other_m)
    s = s * tl.where(m == most, 1.0, exp(m - most, FAST))
    return most, s + other_s * tl.where(other_m == most, 1.0, exp(other_m - most, FAST))


@triton.jit
def join_parts(all_m_ptr, all_s_ptr, value_ptr, rows, parts, constant, FAST: tl.constexpr):
    """The values of all rows from the (m, s) of their parts, [parts, rows], in order."""
    first = tl.zeros([], tl.int64)
    while first < rows:
        row = first + tl.arange(0, ROWS_AT_ONCE)
        inside = row < rows
        m = tl.full([ROWS_AT_ONCE], -float("inf"), tl.float32)
        s = tl.zeros([ROWS_AT_ONCE], tl.float32)
        part = 0
        while part < parts:
            at = tl.cast(part, tl.int64) * rows + row
            # .cg as in `tiles.sum_in_order`
            part_m = tl.load(all_m_ptr + at, mask=inside, other=0.0, cache_modifier=".cg")
            part_s = tl.load(all_s_ptr + at, mask=inside, other=0.0, cache_modifier=".cg")
            m, s = joined(m, s, part_m, part_s, FAST)
            part += 1
        tl.store(value_ptr + row, shift(m) + log(s, FAST) + constant, mask=inside)
        first += ROWS_AT_ONCE


@triton.jit
def store_value(
    m, s, value_ptr, part_ptr, ticket_ptr, row, inside_row, rows, part, parts, constant, FAST: tl.constexpr
):  # fmt: skip
    """value = constant + log-sum-exp of a program's rows; with part_ptr of all rows, by the last of the programs."""
    if part_ptr is None:
        tl.store(value_ptr + row, shift(m) + log(s, FAST) + constant, mask=inside_row)
    else:
        all_s_ptr = part_ptr + tl.cast(parts, tl.int64) * rows
        tl.store(part_ptr + part * rows + row, m, mask=inside_row)
        tl.store(all_s_ptr + part * rows + row, s, mask=inside_row)
        if drew_last_ticket(ticket_ptr):
            join_parts(part_ptr, all_s_ptr, value_ptr, rows, parts, constant, FAST)
