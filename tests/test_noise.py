"""The noise: Philox words against known answers and integers, normals against float64, and torch's generators.

The reserving of counters is tested on the device, and its CUDA paths everywhere with stand-ins for the generator.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastvae.functional as F
from bounds import ulp
from conftest import plan_anew
from fastvae import random
from fastvae.kernels import INTERPRETED, moments
from fastvae.kernels.launch import FAST
from fastvae.kernels.noise import box_muller, normals_of_elements, normals_of_quads, philox_words
from fastvae.kernels.tiles import Tiling
from fastvae.random import PhiloxState

# --- the specification, in integers and float64 -----------------------------------------------------------------------

LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


def philox4x32(counter, key) -> np.ndarray:
    """Philox4x32-10 of Salmon et al. 2011: counters [4, n] and keys [2, n] to words [4, n]."""
    c0, c1, c2, c3 = (np.asarray(c, np.uint64) for c in counter)
    k0, k1 = (np.asarray(k, np.uint64) for k in key)
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (p1 >> HALF) ^ c1 ^ k0, p1 & LOW, (p0 >> HALF) ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & LOW, (k1 + np.uint64(0xBB67AE85)) & LOW
    return np.stack([c0, c1, c2, c3])


def expected_words(seed, offset, quad) -> np.ndarray:
    """Torch's layout: the key is the seed, the counter offset / 4 (low half) and the subsequence (high half)."""
    seed, offset, quad = (np.asarray(value, np.int64).astype(np.uint64) for value in (seed, offset, quad))
    counter = offset >> np.uint64(2)
    seed, counter, quad = np.broadcast_arrays(seed, counter, quad)
    return philox4x32((counter & LOW, counter >> HALF, quad & LOW, quad >> HALF), (seed & LOW, seed >> HALF))


def expected_pair(radius_word: np.ndarray, angle_word: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Box and Muller's two normals [2, n] in float64, and the error that float32 may make in them.

    In units of 2^-24: u is two roundings off (the conversion of the word and the result), its logarithm 8 relative (4
    ulp, of vectorised libraries) or 4 absolute (2^-22, lg2.approx); where that is more than the logarithm itself, the
    root of it bounds the root. The root and its argument's factor are three more, relative; the angle is three relative
    to pi at most, and its sine and cosine 12 absolute (2^-20.5, sin.approx; a library's 2 are less); the product one.
    """
    unit = 2.0**-24
    u = radius_word.astype(np.float64) * 2.0**-32 + 2.0**-33
    angle = angle_word.astype(np.uint32).view(np.int32) * (math.pi / 2**31)
    logarithm = -np.log(u)
    radius = np.sqrt(2 * logarithm)
    spread = 2 * unit * (2 + np.maximum(8 * logarithm, 4))
    radius_error = np.minimum(np.sqrt(spread), spread / np.maximum(radius, 1e-30)) + 3 * unit * radius
    direction = np.stack([np.cos(angle), np.sin(angle)])
    error = radius_error * np.abs(direction) + (radius + radius_error) * unit * (3 * math.pi + 12 + 1)
    return radius * direction, error


def expected_noise(seed: int, offset: int, count: int) -> tuple[Tensor, Tensor]:
    """The noise of the first `count` positions in float64, and its error."""
    w0, w1, w2, w3 = expected_words(seed, offset, np.arange(-(-count // 4)))
    (first, first_error), (second, second_error) = expected_pair(w0, w1), expected_pair(w2, w3)
    normals, errors = (np.concatenate(pair).T.reshape(-1) for pair in ((first, second), (first_error, second_error)))
    return torch.from_numpy(normals[:count].copy()), torch.from_numpy(errors[:count].copy())


# --- words ------------------------------------------------------------------------------------------------------------

# Random123's kat_vectors: philox4x32-10, counter and key to words.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000 00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
# Inputs and words of every known answer, [6, n] and [4, n].
KNOWN_INPUTS, KNOWN_WORDS = (
    np.array([[int(number, 16) for number in text.split()] for text in texts], np.uint64).T
    for texts in zip(*KNOWN_ANSWERS, strict=True)
)


@triton.jit
def philox_kernel(counter_ptr, seed_ptr, words_ptr, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    c0 = tl.load(counter_ptr + i).to(tl.uint32)
    c1 = tl.load(counter_ptr + COUNT + i).to(tl.uint32)
    c2 = tl.load(counter_ptr + 2 * COUNT + i).to(tl.uint32)
    c3 = tl.load(counter_ptr + 3 * COUNT + i).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr + i), c0, c1, c2, c3, n_rounds=10)
    tl.store(words_ptr + i, w0.to(tl.int64))
    tl.store(words_ptr + COUNT + i, w1.to(tl.int64))
    tl.store(words_ptr + 2 * COUNT + i, w2.to(tl.int64))
    tl.store(words_ptr + 3 * COUNT + i, w3.to(tl.int64))


@triton.jit
def words_kernel(seed_ptr, offset_ptr, quad_ptr, words_ptr, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    w0, w1, w2, w3 = philox_words(tl.load(seed_ptr + i), tl.load(offset_ptr + i), tl.load(quad_ptr + i))
    tl.store(words_ptr + i, w0.to(tl.int64))
    tl.store(words_ptr + COUNT + i, w1.to(tl.int64))
    tl.store(words_ptr + 2 * COUNT + i, w2.to(tl.int64))
    tl.store(words_ptr + 3 * COUNT + i, w3.to(tl.int64))


def run_words(kernel, device, *inputs: np.ndarray) -> np.ndarray:
    """The words [4, n] that a kernel makes of int64 inputs [..., n]."""
    count = inputs[0].shape[-1]
    words = torch.empty(4, count, dtype=torch.int64, device=device)
    tensors = [torch.from_numpy(np.ascontiguousarray(values).view(np.int64)).to(device) for values in inputs]
    kernel[(1,)](*tensors, words, COUNT=count)
    return words.cpu().numpy().astype(np.uint64)


def test_known_answers_of_the_integer_reference() -> None:
    assert np.array_equal(philox4x32(KNOWN_INPUTS[:4], KNOWN_INPUTS[4:]), KNOWN_WORDS)


def test_known_answers_of_triton(device) -> None:
    inputs = np.repeat(KNOWN_INPUTS, 2, axis=1)[:, :4]  # the first two twice: a block's size is a power of two
    inputs[:, 3] = KNOWN_INPUTS[:, 2]
    words = run_words(philox_kernel, device, inputs[:4], inputs[4] | inputs[5] << HALF)
    assert np.array_equal(words, KNOWN_WORDS[:, [0, 0, 1, 2]])


def test_known_answer_of_the_kernel(device) -> None:
    """Of the published ones only zero is a counter that an offset can reach: it counts four words, in 63 bits."""
    zero = np.zeros(1, np.uint64)
    assert np.array_equal(run_words(words_kernel, device, zero, zero, zero), KNOWN_WORDS[:, :1])


def test_words_of_any_seed_offset_and_position(device) -> None:
    seeds = [0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, -1, -(2**63), 0x0123456789ABCDEF]
    offsets = [0, 4, 7, 2**32 - 4, 2**34, 2**34 + 8, 2**63 - 4]
    quads = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**33 + 5, 2**61 - 1]
    triples = np.array([(s, o, q) for s in seeds for o in offsets for q in quads], np.int64)
    extra = np.random.default_rng(0).integers(0, 2**61, (1024 - len(triples), 3))
    inputs = np.concatenate((triples, extra)).T
    words = run_words(words_kernel, device, *inputs)
    assert np.array_equal(words, expected_words(*inputs))


def test_all_words_are_used_and_no_two_are_one(device) -> None:
    """The 16384 words of 4096 counters: 0.03 pairs would be equal by chance; none is for this seed."""
    words = run_words(words_kernel, device, np.full(4096, 7), np.full(4096, 8), np.arange(4096))
    assert len(np.unique(words)) == words.size
    following = run_words(words_kernel, device, np.full(4096, 7), np.full(4096, 12), np.arange(4096))
    assert not np.isin(following, words).any(), "the next call's counters are others"


# --- normals ----------------------------------------------------------------------------------------------------------


@triton.jit
def box_muller_kernel(radius_ptr, angle_ptr, normals_ptr, COUNT: tl.constexpr, FAST: tl.constexpr):
    i = tl.arange(0, COUNT)
    radius_word = tl.load(radius_ptr + i).to(tl.uint32)
    first, second = box_muller(radius_word, tl.load(angle_ptr + i).to(tl.uint32), FAST)
    tl.store(normals_ptr + i, first)
    tl.store(normals_ptr + COUNT + i, second)


@triton.jit
def normals_kernel(
    normals_ptr, seed: tl.int64, offset: tl.int64, COUNT: tl.constexpr, QUADS: tl.constexpr, FAST: tl.constexpr
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * COUNT
    position = first + tl.arange(0, COUNT)
    if QUADS:
        quad = (first >> 2) + tl.arange(0, COUNT // 4)[None, :]
        normals = tl.reshape(normals_of_quads(seed, offset, quad, FAST), [COUNT])
    else:
        normals = normals_of_elements(seed, offset, position, FAST)
    tl.store(normals_ptr + position, normals)


def draw(count: int, seed: int, offset: int, device, quads: bool = True) -> Tensor:
    """`count` normals from the kernels' functions; the interpreter pays for programs, a GPU for large blocks."""
    block = min(count, 1 << 16 if INTERPRETED else 1 << 10)
    normals = torch.empty(count, device=device)
    normals_kernel[(count // block,)](normals, seed, offset, COUNT=block, QUADS=quads, FAST=FAST)
    return normals


def test_extreme_words_give_finite_normals(device) -> None:
    """The largest normal is sqrt(66 ln 2) = 6.76; a uniform number of 0 would make an infinite one."""
    extremes = [0, 1, 2, 255, 2**24 - 1, 2**24 + 1, 2**30, 2**31 - 1, 2**31, 2**31 + 1]
    extremes += [3 * 2**30, 2**32 - 2**8, 2**32 - 129, 2**32 - 128, 2**32 - 2, 2**32 - 1]
    radius, angle = (words.reshape(-1) for words in np.meshgrid(*2 * [np.array(extremes, np.int64)]))
    normals = torch.empty(2, radius.size, device=device)
    inputs = (torch.from_numpy(np.ascontiguousarray(words)).to(device) for words in (radius, angle))
    box_muller_kernel[(1,)](*inputs, normals, COUNT=radius.size, FAST=FAST)
    normals = normals.cpu().double().numpy()
    assert np.isfinite(normals).all()
    assert np.abs(normals).max() < 6.8
    assert np.abs(normals).max() > 6.7
    expected, error = expected_pair(radius, angle)
    assert (np.abs(normals - expected) <= error).all()


@pytest.mark.parametrize("quads", [True, False], ids=["quads", "elements"])
def test_normals_are_those_of_the_words(quads, device) -> None:
    actual = draw(4096, -5, 2**40, device, quads).cpu().double()
    expected, error = expected_noise(-5, 2**40, 4096)
    assert ((actual - expected).abs() <= error).all()


@pytest.fixture(scope="module")
def samples() -> dict[str, np.ndarray]:
    """Four times 2^18 normals: of two seeds, and of two calls in a row."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    states = {"first": (0, 0), "next call": (0, 4), "next seed": (1, 0), "large seed": (-(2**40), 2**35)}
    return {name: draw(1 << 18, *state, device).cpu().double().numpy() for name, state in states.items()}


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1])


STREAMS = ("first", "next call", "next seed", "large seed")


@pytest.mark.parametrize("name", STREAMS)
def test_moments_and_distribution(name, samples) -> None:
    """Within 4 standard errors of those of n standard normals; the seeds are fixed: nothing is by chance."""
    normals = samples[name]
    n = normals.size
    assert abs(normals.mean()) < 4 * math.sqrt(1 / n)
    assert abs(normals.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs(scipy.stats.skew(normals)) < 4 * math.sqrt(6 / n)
    assert abs(scipy.stats.kurtosis(normals)) < 4 * math.sqrt(24 / n)
    assert scipy.stats.kstest(normals, "norm").pvalue > 1e-4
    for place in range(4):  # each of the four normals of a counter, which are made differently
        assert scipy.stats.kstest(normals[place::4], "norm").pvalue > 1e-4


@pytest.mark.parametrize("name", STREAMS)
def test_no_correlation_within_a_call(name, samples) -> None:
    """Of the numbers and of their squares, which share a radius in pairs; also between the places of one counter."""
    for values in (samples[name], samples[name] ** 2):
        for lag in range(1, 9):
            assert abs(correlation(values[:-lag], values[lag:])) < 4 / math.sqrt(values.size)
        quads = np.corrcoef(values.reshape(-1, 4).T)
        assert np.abs(quads - np.eye(4)).max() < 4 / math.sqrt(values.size / 4)


@pytest.mark.parametrize("other", STREAMS[1:])
def test_no_correlation_between_calls_and_seeds(other, samples) -> None:
    first, second = samples["first"], samples[other]
    for shift in range(-4, 5):
        assert abs(correlation(first, np.roll(second, shift))) < 4 / math.sqrt(first.size)


# --- z ----------------------------------------------------------------------------------------------------------------


def reserve_always(state: PhiloxState, monkeypatch) -> None:
    monkeypatch.setattr(random, "reserve", lambda device, generator: state)


def in_memory_order(tensor: Tensor) -> Tensor:
    return tensor.detach().as_strided((tensor.numel(),), (1,)).cpu().double()


def check_sample(z: Tensor, mu: Tensor, logvar: Tensor, seed: int, offset: int) -> None:
    """z = mu + exp(logvar / 2) * noise at each place of z's memory, within the roundings of both (docstring: z 6)."""
    noise, error = expected_noise(seed, offset, z.numel())
    mu, logvar = (in_memory_order(torch.empty_like(z).copy_(tensor)) for tensor in (mu, logvar))
    std = torch.exp(logvar / 2)
    expected = mu + std * noise
    scale = mu.abs() + std * (1 + logvar.abs() / 2) * noise.abs()
    excess = (in_memory_order(z) - expected).abs() - (ulp(expected, z.dtype) + 6 * 2.0**-24 * scale + std * error)
    assert (excess <= 0).all()


# Rows whose length is a multiple of 4 and not, alone and by rows, in more than one program, in both orders of memory.
CALLS = {
    "one row": lambda randn: (randn(1, 26), randn(1, 26)),
    "rows, multiple of 4": lambda randn: (randn(5, 8), randn(5, 8)),
    "rows, odd": lambda randn: (randn(5, 7), randn(5, 7)),
    "several programs, odd": lambda randn: (randn(133, 13), randn(133, 13)),
    "several chunks": lambda randn: (randn(2, 4102), randn(2, 4102)),
    "rows with gaps": lambda randn: (randn(5, 9)[:, :6], randn(5, 9)[:, 2:8]),
    "channels_last": lambda randn: tuple(randn(2, 3, 2, 5, 3).permute(0, 1, 4, 2, 3)),
    "transposed": lambda randn: (randn(7, 3).t(), randn(7, 3).t()),
}


@pytest.mark.parametrize("operation", [F.gaussian_sample, F.gaussian_sample_kl], ids=["sample", "sample_kl"])
@pytest.mark.parametrize("call", CALLS)
def test_samples_are_made_of_the_words_at_their_place(call, operation, device, triton_backend, monkeypatch) -> None:
    """In memory: the noise of one place is the same in every layout."""
    seed, offset = 2**62 + 12345, 2**33 + 4
    reserve_always(PhiloxState(None, None, seed, offset), monkeypatch)
    mu, logvar = CALLS[call](lambda *shape: torch.randn(shape).to(device))
    z = operation(mu, logvar)
    check_sample(z if isinstance(z, Tensor) else z[0], mu, logvar, seed, offset)


@pytest.mark.parametrize(
    ("shape", "order", "dim"),
    [((5, 14), (0, 1), 1), ((5, 16), (0, 1), 1), ((2, 2, 3, 6), (0, 3, 1, 2), 1), ((2, 3, 10), (0, 1, 2), 2)],
    ids=["odd", "multiple of 4", "channels_last", "last of three"],
)
def test_packed_samples_are_made_of_the_same_words(shape, order, dim, device, triton_backend, monkeypatch) -> None:
    seed, offset = -3, 400
    reserve_always(PhiloxState(None, None, seed, offset), monkeypatch)
    packed = torch.randn(shape).to(device).permute(order)
    z, _ = F.gaussian_sample_kl_packed(packed, dim=dim)
    check_sample(z, *packed.chunk(2, dim), seed, offset)


@pytest.mark.parametrize("shape", [(2, 26), (2, 28)], ids=["odd", "multiple of 4"])
def test_samples_of_every_tile(shape, device, triton_backend, monkeypatch) -> None:
    seed, offset = 9, 16
    reserve_always(PhiloxState(None, None, seed, offset), monkeypatch)
    mu, logvar = torch.randn(2, *shape).to(device)
    plan_anew(monkeypatch)
    for columns in (4, 16, 32):
        monkeypatch.setattr(moments, "cut", lambda rows, length, itemsize, c=columns: Tiling(rows, length, 1, c, 4))
        check_sample(F.gaussian_sample_kl(mu, logvar)[0], mu, logvar, seed, offset)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("offset", [0, 2**32 - 4, 2**62])
def test_noise_by_value_is_that_by_pointer(seed, offset, device, triton_backend, monkeypatch) -> None:
    """In z and in its gradient; a pointer's offset and the value are added."""
    mu, logvar = torch.randn(2, 3, 5).to(device)
    logvar.requires_grad_()
    split = min(offset, 12)
    pointers = (torch.tensor(number, device=device) for number in (seed, offset - split))
    results = []
    for state in (PhiloxState(None, None, seed, offset), PhiloxState(*pointers, 0, split)):
        reserve_always(state, monkeypatch)
        z = F.gaussian_sample(mu, logvar)
        results.append((z.detach(), *torch.autograd.grad(z.sum(), logvar)))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    check_sample(results[0][0], mu, logvar.detach(), seed, offset)


def test_two_calls_differ_and_half_precision_sees_the_same_noise(device, triton_backend) -> None:
    zero = torch.zeros(4, 6, device=device)
    first, second = F.gaussian_sample(zero, zero), F.gaussian_sample(zero, zero)
    assert (first != second).all()
    for dtype in (torch.bfloat16, torch.float16):
        torch.manual_seed(0)
        half = F.gaussian_sample(zero.to(dtype), zero.to(dtype))
        assert ((half.double() - first.double()).abs() <= ulp(first.double(), dtype)).all()


# --- torch's generators -----------------------------------------------------------------------------------------------


def reserve(device, generator: torch.Generator | None = None) -> tuple[int, int]:
    """The pair (seed, offset), whichever way it comes."""
    seed_tensor, offset_tensor, seed, offset = random.reserve(device, generator)
    if seed_tensor is not None:
        seed, offset = seed_tensor.item(), offset_tensor.item() + offset
    return seed, offset


def default_state(device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_default_state(state: Tensor, device) -> None:
    torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)


def test_no_counter_is_used_twice(device) -> None:
    """Also not by numbers that torch draws in between."""
    states = []
    for _ in range(32):
        states.append(reserve(device))
        torch.randn(1000, device=device)
    assert len({(seed, offset // 4) for seed, offset in states}) == 32
    assert all(-(2**63) <= number < 2**63 for state in states for number in state)


def test_manual_seed_and_set_rng_state_repeat(device) -> None:
    torch.manual_seed(5)
    kept = default_state(device)
    first, second = reserve(device), reserve(device)
    assert first != second
    set_default_state(kept, device)
    assert (reserve(device), reserve(device)) == (first, second)
    torch.manual_seed(5)
    assert reserve(device) == first
    torch.manual_seed(6)
    assert reserve(device) != first


def test_fork_rng_leaves_nothing_behind(device) -> None:
    devices = [device] if device.type == "cuda" else []
    before = default_state(device)
    with torch.random.fork_rng(devices):
        inside = reserve(device)
    assert torch.equal(default_state(device), before)
    assert reserve(device) == inside


def test_a_generator_is_used_alone(device) -> None:
    before = default_state(device)
    generator = torch.Generator(device).manual_seed(5)
    first, second = reserve(device, generator), reserve(device, generator)
    assert first != second
    assert torch.equal(default_state(device), before)
    assert reserve(device, generator.manual_seed(5)) == first


def test_given_noise_draws_nothing(device, triton_backend) -> None:
    x = torch.randn(3, 4, device=device)
    before = default_state(device)
    F.gaussian_sample(x, x, eps=x)
    F.gaussian_sample_kl(x, x, eps=x)
    F.gaussian_sample_kl_packed(torch.cat((x, x), 1), eps=x)
    F.gaussian_kl(x, x)
    assert torch.equal(default_state(device), before)
    F.gaussian_sample(x, x)
    assert not torch.equal(default_state(device), before)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["not reentrant", "reentrant"])
@pytest.mark.parametrize("packed", [False, True], ids=["pair", "packed"])
def test_activation_checkpointing_draws_the_same_again(packed, use_reentrant, device, triton_backend) -> None:
    """The gradient of sin(z) * z needs z itself, which is made again from the generator's restored state."""

    def loss(first: Tensor, second: Tensor) -> Tensor:
        if packed:
            z, kl = F.gaussian_sample_kl_packed(torch.cat((first, second), 1))
            return (z.sin() * z).sum() + kl.sum()
        z = F.gaussian_sample(first, second)
        return (z.sin() * z).sum()

    inputs = [tensor.requires_grad_() for tensor in torch.randn(2, 3, 6).to(device)]
    torch.manual_seed(7)
    expected = torch.autograd.grad(loss(*inputs), inputs)
    torch.manual_seed(7)
    value = checkpoint(loss, *inputs, use_reentrant=use_reentrant, preserve_rng_state=True)
    torch.randn(3, device=device)  # others draw before the backward pass
    value.backward()
    assert all(torch.equal(tensor.grad, gradient) for tensor, gradient in zip(inputs, expected, strict=True))


# --- CUDA's generators, with stand-ins --------------------------------------------------------------------------------

CUDA = torch.device("cuda", 0)


class CudaGenerator:
    """What `random.reserve` uses of a CUDA generator; its offset cannot be touched while a graph is captured."""

    def __init__(self, seed: int = 0, offset: int = 0) -> None:
        self.seed, self.offset, self.capturing = seed, offset, False

    def initial_seed(self) -> int:
        return self.seed

    def get_offset(self) -> int:
        assert not self.capturing
        return self.offset

    def set_offset(self, offset: int) -> None:
        assert not self.capturing
        self.offset = offset


@pytest.fixture
def cuda_generator(monkeypatch) -> CudaGenerator:
    """The default generator of a CUDA device that need not be there."""
    generator = CudaGenerator(seed=11, offset=40)
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: generator.capturing)
    return generator


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The calls of `random._drawn`, which has no device to draw on."""
    calls = []
    monkeypatch.setattr(random, "_drawn", lambda device, generator: calls.append((device, generator)) or "drawn")
    return calls


def test_cuda_advances_the_offset_by_one_counter(cuda_generator) -> None:
    assert random.reserve(CUDA, None) == PhiloxState(None, None, 11, 40)
    assert random.reserve(CUDA, None) == PhiloxState(None, None, 11, 44)
    assert cuda_generator.offset == 48
    own = CudaGenerator(seed=3)
    assert random.reserve(CUDA, own) == PhiloxState(None, None, 3, 0)
    assert (own.offset, cuda_generator.offset) == (4, 48)


@pytest.mark.parametrize(
    ("seed", "argument"), [(0, 0), (2**63 - 1, 2**63 - 1), (2**63, -(2**63)), (2**64 - 1, -1)], ids=str
)
def test_cuda_seeds_become_signed(seed, argument, cuda_generator) -> None:
    cuda_generator.seed = seed
    assert random.reserve(CUDA, None).seed == argument


def test_capture_takes_the_public_pointers(cuda_generator, drawn, monkeypatch) -> None:
    cuda_generator.capturing = True
    pointers = torch.tensor(1), torch.tensor(2)
    asked = []
    cuda_generator.philox_state = lambda increment: asked.append(increment) or (*pointers, torch.tensor(12))
    state = random.reserve(CUDA, None)
    assert state[0] is pointers[0] and state[1] is pointers[1] and state[2:] == (0, 12)
    assert asked == [4] and not drawn


def test_capture_takes_the_pointers_of_inductor(cuda_generator, drawn, monkeypatch) -> None:
    cuda_generator.capturing = True
    pointers = torch.tensor(1), torch.tensor(2)
    asked = []

    def reserve_rng_state(generator, increment):
        asked.append((generator, increment))
        return (*pointers, torch.tensor(8))

    namespace = SimpleNamespace(inductor_reserve_rng_state=reserve_rng_state)
    monkeypatch.setattr(torch.ops, "inductor_prims", namespace)
    state = random.reserve(CUDA, None)
    assert state[0] is pointers[0] and state[1] is pointers[1] and state[2:] == (0, 8)
    assert asked == [(cuda_generator, 4)] and not drawn


def test_capture_draws_where_there_are_no_pointers(cuda_generator, drawn, monkeypatch) -> None:
    cuda_generator.capturing = True
    monkeypatch.setattr(torch.ops, "inductor_prims", SimpleNamespace())
    assert random.reserve(CUDA, None) == "drawn"
    assert drawn == [(CUDA, cuda_generator)]


def test_capture_is_that_of_the_tensors_device(cuda_generator, drawn, monkeypatch) -> None:
    """The question goes to the current stream of the tensor's device, also when another device is current."""
    entered = []

    class device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *error):
            entered.append(None)

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: entered[-1:] == [torch.device("cuda", 1)])
    monkeypatch.setattr(torch.ops, "inductor_prims", SimpleNamespace())
    own = CudaGenerator()
    assert random.reserve(torch.device("cuda", 1), own) == "drawn"
    assert entered == [torch.device("cuda", 1), None]


def test_what_runs_before_a_capture_draws_too(cuda_generator, drawn) -> None:
    """Its kernels read the seed through a pointer, as those that are captured do."""
    with random.by_pointer():
        assert random.reserve(CUDA, None) == "drawn"
    assert drawn == [(CUDA, cuda_generator)] and cuda_generator.offset == 40
    assert random.reserve(CUDA, None) == PhiloxState(None, None, 11, 40)


def test_compiled_code_draws(cuda_generator, drawn, monkeypatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert random.reserve(CUDA, None) == "drawn"
    assert drawn == [(CUDA, None)] and cuda_generator.offset == 40


# --- CUDA itself ------------------------------------------------------------------------------------------------------


def capture(step) -> torch.cuda.CUDAGraph:
    """A graph of `step`, after the usual warm-up on a side stream: a capture can load no kernel."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), random.by_pointer():
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


@pytest.mark.gpu
def test_replays_of_a_graph_draw_new_noise(device, triton_backend) -> None:
    """And repeat it after the same seed; backward inside of the graph makes the noise of its own replay again."""
    packed = torch.randn(8, 64, device=device, requires_grad=True)
    results = {}

    def step() -> None:
        z, kl = F.gaussian_sample_kl_packed(packed)
        (gradient,) = torch.autograd.grad(z.sum(), packed)
        results.update(z=z.detach(), kl=kl.detach(), gradient=gradient)

    def replay() -> dict[str, Tensor]:
        graph.replay()
        return {name: result.clone() for name, result in results.items()}

    graph = capture(step)
    torch.manual_seed(11)
    first, second = replay(), replay()
    assert (first["z"] != second["z"]).all()
    assert torch.equal(first["kl"], second["kl"])
    torch.manual_seed(11)
    again = replay()
    assert all(torch.equal(first[name], again[name]) for name in first)

    mu, logvar = (half.detach().double() for half in packed.chunk(2, 1))
    for result in (first, second):
        z, gradient = result["z"].double(), result["gradient"].double()
        scale = mu.abs() + (z - mu).abs() * (1 + logvar.abs() / 2)
        allowed = ulp(z, torch.float32) + (6 + 14) * 2.0**-24 * scale
        assert ((gradient[:, 32:] - (z - mu) / 2).abs() <= allowed).all()
        assert (gradient[:, :32] == 1).all()


@pytest.mark.gpu
def test_two_samples_in_one_graph_differ(device, triton_backend) -> None:
    zero = torch.zeros(8, 64, device=device)
    results = {}

    def step() -> None:
        results.update(first=F.gaussian_sample(zero, zero), second=F.gaussian_sample(zero, zero))

    capture(step).replay()
    assert (results["first"] != results["second"]).all()


@pytest.mark.gpu
def test_a_draw_takes_four_of_the_generators_offset(device, triton_backend) -> None:
    """So that torch's own draws before and after it use other counters."""
    zero = torch.zeros(8, 64, device=device)
    generator = torch.cuda.default_generators[device.index]
    for _ in range(2):
        before = generator.get_offset()
        z = F.gaussian_sample(zero, zero)
        assert generator.get_offset() == before + 4
        check_sample(z, zero, zero, generator.initial_seed(), before)
        torch.randn(1000, device=device)
        assert generator.get_offset() >= before + 8


@pytest.mark.gpu
def test_eager_draws_do_not_synchronise(device, triton_backend) -> None:
    packed = torch.randn(8, 64, device=device, requires_grad=True)

    def step() -> None:
        z, kl = F.gaussian_sample_kl_packed(packed)
        torch.autograd.backward((z, kl), (torch.ones_like(z), torch.ones_like(kl)))

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
