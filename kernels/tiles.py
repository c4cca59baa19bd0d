"""Cut a tensor [B, ...] into tiles, one per program, and finish sums over several tiles in the same launch."""

from dataclasses import dataclass
from functools import lru_cache

import triton
import triton.language as tl


@dataclass(frozen=True)
class Tiling:
    """The cut of a [rows, columns] problem: each program takes `tile_rows` whole rows, or `tile_columns` elements of
    one row.
    """

    rows: int
    columns: int
    tile_rows: int
    tile_columns: int
    num_warps: int

    @property
    def chunks(self) -> int:
        """Programs per row."""
        return -(-self.columns // self.tile_columns)

    @property
    def programs(self) -> int:
        return max(1, self.chunks * -(-self.rows // self.tile_rows))


@lru_cache(maxsize=4096)
def cut(rows: int, columns: int, itemsize: int, heavy: bool = False) -> Tiling:
    """Cut a problem whose bulk tensors have elements of `itemsize` bytes; `heavy` as in `Likelihood.heavy`.

    Tiles are powers of two. They depend only on the problem, never on the card, so that partial sums contain the same
    elements everywhere. The compiler chooses the order in which a program adds its tile. Sums are therefore equal in
    every bit where the same compiled code runs, and may differ in the last bits between cards, layouts and versions of
    triton. No figure here was measured on a GPU. The figures follow from code compiled for sm_90 with triton 3.6 and
    3.9 (registers, vector width).
    """
    # Two vectors of 16 bytes per thread and tensor with 4 warps: enough loads in flight, and small problems still
    # spread over the card.
    size = 4 * 128 if heavy else 2 * 128 * 16 // itemsize
    if columns <= size:
        width = max(4, power_of_2(columns))
        return Tiling(rows, columns, min(size // width, power_of_2(rows)), width, 4)
    if heavy:
        return Tiling(rows, columns, 1, 2 * size, 8)
    # 4096 elements keep the partial sums of long reductions few: 64 million elements leave 16 thousand of them, 64 KiB.
    if columns <= 4096 or rows * columns >= 1 << 22:
        return Tiling(rows, columns, 1, 4096, 8)
    return Tiling(rows, columns, 1, size, 4)


def cut_elements(elements: int, slots: int, inner: int) -> int:
    """The number of elements of a program, if each element has an axis of its own with `slots` times `inner` numbers.

    For a mixture of 16 components a program has 64 pixels. More would not stay in the L1 cache if the channels are
    innermost, because then every slot is a part of the same cache lines. With one slot, a program has 16 numbers per
    thread.
    """
    return max(1, min((1024 if slots > 1 else 2048) // inner, power_of_2(max(1, elements))))


# Kernel arguments that no address is aligned by: specialising on them (divisible by 16, equal to 1) would only
# compile the same code again.
UNSPECIALIZED = (
    "seed",
    "offset",
    "first_position",
    "rows",
    "chunks",
    "batch",
    "kl_stride",
    "kl_grad_stride",
    "loss_grad_stride",
)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def reduction_scale(reduction: str, batch: int, event: int) -> float:
    """The factor of the sum over a sample ("none"), over a batch ("per_dimension") or over everything."""
    terms = {"batchmean": batch, "per_dimension": batch, "mean": batch * event}.get(reduction, 1)
    # Over nothing there is nothing to scale: the gradients are empty, and the sums are `empty_sum`.
    return 1.0 / terms if terms else 0.0


def empty_sum(reduction: str, batch: int) -> float:
    """The result of a reduction over no elements: 0, or NaN for a mean."""
    return float("nan") if reduction == "mean" or (reduction == "batchmean" and batch == 0) else 0.0


def sum_blocks(groups: int, count: int) -> dict[str, int]:
    """The block size for `sum_groups_in_order`. There are only two variants, to limit compilations."""
    if groups * count == 1:
        return {"GROUPS": 1, "BLOCK": 1}
    return {"GROUPS": 1, "BLOCK": 1024} if count > 32 else {"GROUPS": 32, "BLOCK": 32}


@triton.jit
def program_tile(chunks, FLAT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(first row, first column) of this program, in 64 bits so that no offset made from them can overflow.

    A program has whole rows (ROWS > 1), or one of the `chunks` of a row. With FLAT (one row) or ROWS > 1 no division is
    needed.
    """
    program = tl.program_id(0)
    if FLAT:
        return tl.zeros([], tl.int64), program.to(tl.int64) * COLUMNS
    if ROWS > 1:
        return program.to(tl.int64) * ROWS, tl.zeros([], tl.int64)
    # Unsigned: a signed division takes 6 instructions more (sm_90, triton 3.9).
    program, chunks = program.to(tl.uint32), tl.cast(chunks, tl.uint32)
    return (program // chunks).to(tl.int64), (program % chunks).to(tl.int64) * COLUMNS


@triton.jit
def tile_offsets(row_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Offsets [ROWS, COLUMNS] from a tile's first element, in 64 bits, because the rows of a slice may lie any distance
    apart.
    """
    return tl.arange(0, ROWS).to(tl.int64)[:, None] * row_stride + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def sum_in_order(terms_ptr, count, stride, BLOCK: tl.constexpr):
    """The sum of `count` terms in float32. The order depends only on `count`, because there is one compiled form."""
    total = tl.zeros([BLOCK], tl.float32)
    start = 0
    # while: the interpreter of triton 3.6 cannot count to a tensor with numpy 2.4.
    while start < count:
        index = start + tl.arange(0, BLOCK)
        # .cg reads past the L1 cache, which may hold what was there before another program wrote.
        terms = tl.load(terms_ptr + index.to(tl.int64) * stride, mask=index < count, other=0.0, cache_modifier=".cg")
        total += terms.to(tl.float32)
        start += BLOCK
    return tl.sum(total)


@triton.jit
def sum_groups_in_order(terms_ptr, sums_ptr, groups, count, scale, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """sums[g] = scale * the sum of terms[g, :], terms [groups, count]. The order depends only on `count`, because there
    is one compiled form.
    """
    first = 0
    while first < groups:
        group = first + tl.arange(0, GROUPS)
        total = tl.zeros([GROUPS, BLOCK], tl.float32)
        start = 0
        while start < count:
            index = start + tl.arange(0, BLOCK)
            inside = (group < groups)[:, None] & (index < count)[None, :]
            total += tl.load(
                terms_ptr + group[:, None] * count + index[None, :], mask=inside, other=0.0, cache_modifier=".cg"
            )
            start += BLOCK
        tl.store(sums_ptr + group, tl.sum(total, axis=1) * scale, mask=group < groups)
        first += GROUPS


@triton.jit
def drew_last_ticket(ticket_ptr):
    """Whether this program is the last of the launch to reach this point. It then sees everything that every program
    stored before its ticket.

    The ticket is 0 when the launch starts, and the last program sets it back to 0.
    """
    # The barrier puts all threads' stores before the one thread's atomic, whose release and acquire order the programs.
    tl.debug_barrier()
    last = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1
    if last:
        tl.store(ticket_ptr, 0)
    return last
