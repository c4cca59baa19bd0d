"""Standard normal noise as a pure function of (seed, offset, position).

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) in torch's counter layout: the key
is the seed, the low half of the counter is offset / 4, the high half is the subsequence. The subsequence of element p
of z, counted in memory order, is p // 4, and its word is p % 4. The words therefore do not depend on the tile, the card
or the backend, and two calls with different offsets have different counters. A call for a part of a batch counts from
the beginning of its part.

There are ten rounds, although seven also pass BigCrush (the same paper) and would save 5 of a sample's 30 instructions.
With ten a sample is still bound by memory in float32 and bfloat16 (in a model of an H200, computing takes 0.32 and 0.68
of the time for its bytes), the numbers are those of torch's and NVIDIA's own generators, and a seed keeps its noise.

Box and Muller's transform computes two normals from two words. The radius comes from u = word * 2^-32 + 2^-33, so the
largest normal is 6.8. The angle is signed, within +-pi, because the approximate sine and cosine are most accurate
there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import zero
from .tiles import Tiling, tile_offsets

# (seed_tensor, offset_tensor, seed, offset, batch_offset): the pair by value where the tensors are None, see
# `load_rng`; and the number of samples before those of this call.
Rng = tuple[Tensor | None, Tensor | None, int, int, int]
NO_RNG: Rng = (None, None, 0, 0, 0)


@triton.jit
def load_rng(seed_ptr, offset_ptr, seed, offset):
    """The pair (seed, offset): numbers read from memory plus given numbers. For a pair by value zeros are read."""
    return tl.load(seed_ptr) + seed, tl.load(offset_ptr) + offset


@triton.jit
def philox_words(seed, offset, quad):
    """The four words of each quad (int64), as uint32."""
    counter = tl.cast(offset, tl.uint64) >> 2
    return tl.philox(
        seed,
        (counter & 0xFFFFFFFF).to(tl.uint32),
        (counter >> 32).to(tl.uint32),
        (quad & 0xFFFFFFFF).to(tl.uint32),
        (quad >> 32).to(tl.uint32),
        n_rounds=10,
    )


@triton.jit
def box_muller(radius_word, angle_word, FAST: tl.constexpr):
    """Two independent standard normals from two words."""
    u = tl.fma(radius_word.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)
    angle = angle_word.to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09  # pi * 2^-31
    if FAST:
        # radius = sqrt(-2 ln u) = sqrt(-2 ln 2 * log2 u). Near u = 1 the approximate logarithm is known to 2^-22 only,
        # not its sign, and the root of a negative number would be NaN. Results are written before the angle is read:
        # that is the &.
        radius, cosine, sine = tl.inline_asm_elementwise(
            """
            {
            .reg .f32 t;
            lg2.approx.ftz.f32 t, $3;
            mul.ftz.f32 t, t, 0fBFB17218;
            max.ftz.f32 t, t, 0f00000000;
            sqrt.approx.ftz.f32 $0, t;
            cos.approx.ftz.f32 $1, $4;
            sin.approx.ftz.f32 $2, $4;
            }
            """,
            "=&f,=&f,=&f,f,f",
            [u, angle],
            dtype=(tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        radius = tl.sqrt(-2.0 * tl.log(u))
        cosine = tl.cos(angle)
        sine = tl.sin(angle)
    return radius * cosine, radius * sine


@triton.jit
def normals_of_quads(seed, offset, quad, FAST: tl.constexpr):
    """Noise [..., 2, 2] of quads [...]. All four words of a counter are used."""
    w0, w1, w2, w3 = philox_words(seed, offset, quad)
    n0, n1 = box_muller(w0, w1, FAST)
    n2, n3 = box_muller(w2, w3, FAST)
    return tl.join(tl.join(n0, n2), tl.join(n1, n3))


@triton.jit
def normals_of_elements(seed, offset, position, FAST: tl.constexpr):
    """The same noise for positions that do not start on a quad. Each element computes its counter's words and keeps its
    own normal.
    """
    w0, w1, w2, w3 = philox_words(seed, offset, position >> 2)
    upper = (position & 2) != 0
    first, second = box_muller(tl.where(upper, w2, w0), tl.where(upper, w3, w1), FAST)
    return tl.where((position & 1) != 0, second, first)


@triton.jit
def noise_tile(
    eps_ptr, seed_ptr, offset_ptr, seed, offset, first_position, position, columns, inside,
    RUN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The noise [ROWS, COLUMNS] of the tile whose first element is `position`. It is read from eps, or computed from
    (seed, offset), with positions that count from first_position (None: 0). RUN: see `run_length`.
    """
    # if and else: the compiler compiles what follows a return inside an `if` all the same.
    if eps_ptr is not None:
        eps = tl.load(eps_ptr + position + tile_offsets(columns, ROWS, COLUMNS), mask=inside, other=0.0).to(tl.float32)
    else:
        seed, offset = load_rng(seed_ptr, offset_ptr, seed, offset)
        if first_position is not None:
            position += first_position
        if RUN == 1:
            eps = normals_of_elements(seed, offset, position + tile_offsets(columns, ROWS, COLUMNS), FAST)
        else:
            row_quads = tl.arange(0, ROWS).to(tl.int64)[:, None] * (columns >> 2)
            quad = (position >> 2) + row_quads + tl.arange(0, COLUMNS // RUN)[None, :] * (RUN // 4)
            normals = normals_of_quads(seed, offset, quad, FAST)
            if RUN == 8:
                following = normals_of_quads(seed, offset, quad + 1, FAST)
                normals = tl.permute(tl.join(normals, following), (0, 1, 4, 2, 3))
            eps = tl.reshape(normals, [ROWS, COLUMNS])
    return eps


def starts_on_quad(first_position: int | None) -> bool:
    return (first_position or 0) % 4 == 0


def run_length(tiling: Tiling, itemsize: int, on_quad: bool) -> int:
    """The number of elements that a thread computes in sequence. It is the number that the thread accesses at a time, 8
    of 16 bits, else 4. It is 1 if rows, or the first of them (`on_quad`), do not start on a quad.

    (With 4 elements of 16 bits the normals would move between threads through shared memory, which costs 1.4
    instructions more per element.)
    """
    if not on_quad or (tiling.rows > 1 and tiling.columns % 4):
        return 1
    return 8 if itemsize == 2 and tiling.tile_columns >= 8 else 4


def noise_arguments(rng: Rng, device: torch.device, event: int) -> tuple[Tensor, Tensor, int, int, int | None]:
    """The arguments (seed_ptr, offset_ptr, seed, offset, first_position) of `noise_tile`.

    A pair by value is added to a zero on the device, so that eager calls and captured graphs run the same compiled
    kernel. A second kernel that is first used during a capture would have to be loaded there, which CUDA forbids.
    Without first_position the compiler knows that the positions of a tile share their upper halves: 2 instructions per
    element less.
    """
    seed_tensor, offset_tensor, seed, offset, batch_offset = rng
    if seed_tensor is None or offset_tensor is None:
        seed_tensor = offset_tensor = zero(device)
    return seed_tensor, offset_tensor, seed, offset, batch_offset * event or None
