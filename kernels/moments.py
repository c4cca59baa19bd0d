"""Where the moments of a posterior lie in a row."""

import triton
import triton.language as tl


@triton.jit
def moments_tile(first_column, INNER: tl.constexpr, COLUMNS: tl.constexpr):
    """Where a row's elements lie, as (int64 base, offsets [COLUMNS]), counted from the row's start.

    INNER = 0: one after the other. Otherwise mu and logvar take turns, INNER elements each (a packed tensor split
    along an inner dimension).
    """
    column = tl.arange(0, COLUMNS)
    if INNER == 0:
        return first_column, column
    # In 64 bits only where it must be: each element is divided.
    column += (first_column % INNER).to(tl.int32 if INNER < 2**29 else tl.int64)
    offsets = column + column // INNER * INNER
    if INNER % 8 == 0:
        # INNER elements run on; the compiler does not see it through the division.
        offsets = tl.max_contiguous(tl.multiple_of(offsets, 8), 8)
    return first_column // INNER * (2 * INNER), offsets
