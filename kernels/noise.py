"""Standard normal noise as a pure function of (seed, offset, position).

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) in torch's counter layout: the key
is the seed, the low half of the counter is offset / 4, the high half is the subsequence. The subsequence of element p
of z, counted in memory order, is p // 4, and its word is p % 4, so the words do not depend on the tile, the card or
the backend, and one call owns its counters as long as nobody else draws at its offset.

Box and Muller's transform makes two normals of two words. The radius comes from u = word * 2^-32 + 2^-33, so the
largest normal is 6.8; the angle is signed, within +-pi, where the approximate sine and cosine are at their best.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import zero
from .tiles import tile_offsets

# (seed_tensor, offset_tensor, seed, offset): by value where the tensors are None, see `noise.load_rng`.
Rng = tuple[Tensor | None, Tensor | None, int, int]
NO_RNG: Rng = (None, None, 0, 0)


@triton.jit
def load_rng(seed_ptr, offset_ptr, seed, offset):
    """The pair (seed, offset): what is read plus what is given; a pair by value is added to zeros."""
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
def normals_of_quads(seed, offset, quad, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FAST: tl.constexpr):
    """Noise [ROWS, COLUMNS] for rows that start on a quad; quad is [ROWS, COLUMNS / 4]. All four words of a counter
    are used.
    """
    w0, w1, w2, w3 = philox_words(seed, offset, quad)
    n0, n1 = box_muller(w0, w1, FAST)
    n2, n3 = box_muller(w2, w3, FAST)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [ROWS, COLUMNS])


@triton.jit
def normals_of_elements(seed, offset, position, FAST: tl.constexpr):
    """The same noise for positions that do not start on a quad: each element makes its counter's words and keeps its
    own normal.
    """
    w0, w1, w2, w3 = philox_words(seed, offset, position >> 2)
    upper = (position & 2) != 0
    first, second = box_muller(tl.where(upper, w2, w0), tl.where(upper, w3, w1), FAST)
    return tl.where((position & 1) != 0, second, first)


@triton.jit
def noise_tile(
    eps_ptr, seed_ptr, offset_ptr, seed, offset, position, columns, inside,
    QUADS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """The noise [ROWS, COLUMNS] of the tile whose first element is `position`: read from eps, or made from (seed,
    offset).
    """
    if eps_ptr is not None:
        eps = tl.load(eps_ptr + position + tile_offsets(columns, ROWS, COLUMNS), mask=inside, other=0.0)
        return eps.to(tl.float32)
    seed, offset = load_rng(seed_ptr, offset_ptr, seed, offset)
    if QUADS:
        quad = (position >> 2) + tile_offsets(columns >> 2, ROWS, COLUMNS // 4)
        return normals_of_quads(seed, offset, quad, ROWS, COLUMNS, FAST)
    return normals_of_elements(seed, offset, position + tile_offsets(columns, ROWS, COLUMNS), FAST)


def on_pointers(rng: Rng, device: torch.device) -> Rng:
    """The pair as the kernels take it: a pair by value is added to a zero on the device.

    So eager calls and captured graphs run the same compiled kernel. A second one, first met under capture, would have
    to be loaded there, which CUDA forbids.
    """
    seed_tensor, offset_tensor, seed, offset = rng
    if seed_tensor is None:
        seed_tensor = offset_tensor = zero(device)
    return seed_tensor, offset_tensor, seed, offset
