"""Noise by a sample's number in a batch that several processes share."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import fastvae
import fastvae.functional as F
from fastvae.models import VAE
from fastvae.nn import GaussianSampling, GaussianSamplingKL

BACKENDS = ("triton", "reference")

# Rows that start on a quad and not, tiles of whole rows and of parts of one, in both orders of memory.
SHAPES = {
    "rows": ((9, 8), None),
    "odd rows": ((9, 7), None),
    "long rows": ((3, 4104), None),
    "one element": ((9, 1), None),
    "images": ((5, 3, 2, 5), None),
    "channels_last": ((5, 3, 2, 5), torch.channels_last),
    "channels_last, quads": ((5, 4, 2, 2), torch.channels_last),
}


def make_moments(shape, memory_format, dtype, device) -> Tensor:
    """[mu | logvar] along dimension 1."""
    batch, channels, *rest = shape
    moments = torch.randn(batch, 2 * channels, *rest, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    return moments if memory_format is None else moments.contiguous(memory_format=memory_format)


def separate(moments: Tensor, **noise) -> Tensor:
    return F.gaussian_sample(*moments.chunk(2, 1), **noise)


def packed(moments: Tensor, **noise) -> Tensor:
    return F.gaussian_sample_kl_packed(moments, **noise)[0]


def drawn(sample, backend: str, moments: Tensor, batch_offset: int) -> tuple[Tensor, Tensor]:
    """z, and the gradient of its sum of squares, as one process has them."""
    torch.manual_seed(7)
    moments = moments.detach().requires_grad_()
    with fastvae.use_backend(backend):
        z = sample(moments, batch_offset=batch_offset)
        (gradient,) = torch.autograd.grad(z.float().square().sum(), moments)
    return z.detach(), gradient


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sample", [separate, packed])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("call", SHAPES)
def test_parts_of_a_batch_draw_the_noise_of_the_whole(call, dtype, sample, backend, device) -> None:
    moments = make_moments(*SHAPES[call], dtype, device)
    whole = drawn(sample, backend, moments, 0)
    bounds = (0, 1, 2, len(moments))
    parts = [drawn(sample, backend, moments[a:b], a) for a, b in itertools.pairwise(bounds)]
    for joined, expected in zip(zip(*parts, strict=True), whole, strict=True):
        assert torch.equal(torch.cat(joined), expected)


@pytest.mark.parametrize("call", SHAPES)
def test_both_backends_draw_the_same_noise_from_the_same_pair(call, device, monkeypatch) -> None:
    """The specification's noise is the kernels' within the roundings of float32: their own tests give the bound."""
    pair = torch.tensor([2**62 + 12345, 2**61 + 404], device=device)
    monkeypatch.setattr(torch, "randint", lambda *arguments, **named: pair)
    monkeypatch.setattr(fastvae.random, "reserve", lambda device, generator: (*pair.unbind(), 0, 0))
    moments = torch.zeros_like(make_moments(*SHAPES[call], torch.float32, device))
    (fused, _), (reference, _) = (drawn(packed, backend, moments, 11) for backend in BACKENDS)
    assert torch.allclose(fused, reference, rtol=1e-5, atol=1e-5)
    assert reference.stride() == fused.stride()
    assert fused.unique().numel() > 0.99 * fused.numel()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_offset_of_zero_is_the_fused_default(backend, device) -> None:
    moments = make_moments((6, 5), None, torch.float32, device)
    torch.manual_seed(7)
    with fastvae.use_backend("triton"):
        default = packed(moments)
    z, _ = drawn(packed, backend, moments, 0)
    if backend == "triton" or device.type == "cpu":  # on CUDA the specification takes its pair otherwise
        assert torch.allclose(z, default, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_positions_beyond_32_bits(backend, device) -> None:
    """Sample 2^33 of 4 elements is 2^35 elements away: a counter of its own."""
    moments = torch.zeros(2, 8, device=device)
    first, _ = drawn(packed, backend, moments, 0)
    for batch_offset in (2**30, 2**32, 2**33):
        assert not torch.isin(drawn(packed, backend, moments, batch_offset)[0], first).any()


def test_a_generator_may_go_with_it(device, triton_backend) -> None:
    mu = torch.zeros(4, 3, device=device)
    generator = torch.Generator(device)
    whole = F.gaussian_sample(mu, mu, generator=generator.manual_seed(1), batch_offset=0)
    part = F.gaussian_sample(mu[2:], mu[2:], generator=generator.manual_seed(1), batch_offset=2)
    assert torch.equal(part, whole[2:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_compiles(backend, device) -> None:
    moments = make_moments((6, 8), None, torch.float32, device)
    compiled = torch.compile(lambda m, first: packed(m, batch_offset=first), fullgraph=True, backend="aot_eager")
    with fastvae.use_backend(backend):
        torch.manual_seed(7)
        whole = compiled(moments, 0)
        for first in (2, 3, 4):
            torch.manual_seed(7)
            assert torch.equal(compiled(moments[first:], first), whole[first:])


def test_modules_pass_it_on(device, triton_backend) -> None:
    moments = make_moments((6, 4), None, torch.float32, device)

    def same(module, *inputs) -> bool:
        results = []
        for first in (0, 2):
            torch.manual_seed(7)
            result = module(*(tensor[first:] for tensor in inputs), batch_offset=first)
            results.append(result if isinstance(result, Tensor) else result[1 if isinstance(module, VAE) else 0])
        return torch.equal(results[0][2:], results[1])

    assert same(GaussianSampling(), *moments.chunk(2, 1))
    assert same(GaussianSamplingKL(), moments)
    assert same(VAE(torch.nn.Identity(), torch.nn.Identity(), 4), moments)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"batch_offset": -1}, ValueError, "batch_offset must not be negative, got -1"),
        ({"batch_offset": 1.0}, TypeError, "batch_offset must be an integer, got float"),
        ({"batch_offset": True}, TypeError, "batch_offset must be an integer, got bool"),
        ({"batch_offset": 0, "eps": torch.zeros(2, 3)}, ValueError, "eps and batch_offset were both given"),
    ],
    ids=["negative", "float", "bool", "eps"],
)
def test_what_is_refused(arguments, error, words, backend) -> None:
    mu = torch.zeros(2, 3)
    with fastvae.use_backend(backend), pytest.raises(error, match=words):
        F.gaussian_sample(mu, mu, **arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_part(backend, device) -> None:
    z, gradient = drawn(packed, backend, torch.zeros(0, 6, device=device), 4)
    assert z.shape == (0, 3)
    assert gradient.shape == (0, 6)
