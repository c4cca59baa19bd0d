"""The divergence of each dimension, and free bits: fused against their specification."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastvae.functional as F
from bounds import assert_within
from conftest import Launches, plan_anew
from fastvae import nn, reference
from fastvae.kernels import launch as launching
from fastvae.kernels import posterior
from fastvae.kernels.posterior import cut_columns
from test_gaussian import DTYPES, PACKED, UPSTREAM, Copies, lies_like, no_launch, same_bits  # noqa: F401 - a fixture

# Tiles of float32: 64 columns of 16 rows, or fewer columns of more rows; of half precision, twice as many rows.
SHAPES = {
    "one element": (1, 1),
    "one sample": (1, 300),
    "one column": (1500, 1),  # 256 rows or 512 per program
    "odd": (5, 7),
    "example": (128, 16),
    "one tile of rows": (16, 128),
    "one tile of rows +1": (17, 129),
    "several blocks": (70, 130),
    "rank 4": (33, 2, 5, 3),
    "rank 5": (2, 3, 2, 2, 4),
}


@pytest.fixture
def most_partial_sums(monkeypatch) -> Callable[[int], None]:
    """Sets how many there may be, so that small problems are cut as large ones are."""
    plan_anew(monkeypatch)
    return lambda count: monkeypatch.setattr(posterior, "_MOST_PARTIAL_SUMS", count)


def exact(
    mu: Tensor, logvar: Tensor, eps: Tensor, z_grad: Tensor | None, kl_grad: Tensor, free_bits: float = 0.0
) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Results of the reference in float64, their scales and roundings, as in `test_gaussian.exact`."""
    rows, columns = mu.shape[0], mu[0].numel()
    tiling, blocks = cut_columns(rows, columns, mu.element_size())
    steps = -(-rows // (tiling.tile_rows * blocks)) + math.ceil(math.log2(tiling.tile_rows))
    finishing = -(-blocks * tiling.tile_columns // 4096) + math.ceil(math.log2(4096 // tiling.tile_columns))
    mu, logvar, eps, kl_grad = (tensor.detach().double().cpu() for tensor in (mu, logvar, eps, kl_grad))
    inputs = mu.clone().requires_grad_(), logvar.clone().requires_grad_()
    z, kl = reference.gaussian.gaussian_sample_kl(*inputs, eps=eps, reduction="per_dimension", free_bits=free_bits)
    outputs, upstream = [kl], [kl_grad]
    if z_grad is not None:
        outputs, upstream = [z, kl], [z_grad.double().cpu(), kl_grad]
    mu_grad, logvar_grad = torch.autograd.grad(outputs, inputs, upstream)

    condition = logvar.abs().clamp(max=1e3)
    std = torch.exp(logvar / 2) * (1 + condition / 2)
    exponential = torch.exp(logvar) * (1 + condition)
    series, small = torch.expm1(logvar) - logvar, logvar.abs() < 0.5
    divergence = 0.5 * (mu.square() + torch.where(small, series, exponential + 1 + logvar.abs()))
    slope = torch.where(small, logvar.abs() + series, exponential + 1)
    weight = (torch.where(kl <= free_bits, 0.0, kl_grad) if free_bits else kl_grad) / rows
    upstream_of_z = torch.zeros_like(mu) if z_grad is None else z_grad.double().cpu().abs()
    return {
        "z": (z.detach(), mu.abs() + std * eps.abs(), 6),
        "kl": (kl.detach(), divergence.mean(0), 10 + steps + (finishing if blocks > 1 else 0) + 2),
        "mu_grad": (mu_grad, upstream_of_z + (weight * mu).abs(), 4),
        "logvar_grad": (logvar_grad, 0.5 * (upstream_of_z * std * eps.abs() + weight.abs() * slope), 10),
    }


def problem(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """mu, logvar, eps, z_grad, kl_grad."""
    mu, logvar, z_grad = torch.randn(3, *shape).to(device, dtype)
    return [mu, logvar, torch.randn(shape).to(device), z_grad, torch.randn(shape[1:]).to(device)]


def fused(
    mu: Tensor, logvar: Tensor, eps: Tensor, z_grad: Tensor | None, kl_grad: Tensor, **options
) -> dict[str, Tensor]:
    mu, logvar = mu.detach().requires_grad_(), logvar.detach().requires_grad_()
    z, kl = F.gaussian_sample_kl(mu, logvar, reduction="per_dimension", **options, eps=eps)
    outputs, upstream = ([kl], [kl_grad]) if z_grad is None else ([z, kl], [z_grad, kl_grad])
    mu_grad, logvar_grad = torch.autograd.grad(outputs, (mu, logvar), upstream)
    return {"z": z.detach(), "kl": kl.detach(), "mu_grad": mu_grad, "logvar_grad": logvar_grad}


def check(actual: dict[str, Tensor], expected: dict[str, tuple[Tensor, Tensor, float]]) -> None:
    for name, value in actual.items():
        assert_within(value, *expected[name], name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_values_and_gradients(shape, dtype, device, triton_backend) -> None:
    given = problem(shape, device, dtype)
    before = Launches.count
    actual = fused(*given)
    assert Launches.count == before + 2, "one launch forward and one backward"
    assert actual["z"].dtype == actual["mu_grad"].dtype == actual["logvar_grad"].dtype == dtype
    assert actual["kl"].dtype == torch.float32
    check(actual, exact(*given))


@pytest.mark.parametrize(("most", "blocks"), [(192, 1), (384, 2), (768, 4), (10**9, 5)])
def test_every_cut_gives_the_same(most, blocks, most_partial_sums, device, triton_backend) -> None:
    """Blocks of one tile of rows, blocks that go through several, and one block without partial sums: the same samples
    in every bit, sums within their bound.
    """
    given = problem((70, 130), device)
    usual = fused(*given)
    most_partial_sums(most)
    assert cut_columns(70, 130, 4)[1] == blocks
    actual = fused(*given)
    check(actual, exact(*given))
    assert same_bits(actual["z"], usual["z"])


def test_the_cut_of_large_problems() -> None:
    """No more partial sums than are allowed, and enough programs for a card."""
    for rows, columns, blocks in ((65536, 16, 1024), (4096, 1024, 16), (64, 16384, 1), (10**6, 4, 3907), (2, 10**6, 1)):
        tiling, found = cut_columns(rows, columns, 4)
        assert found == blocks
        assert found == 1 or found * columns <= 16384
        assert tiling.chunks * found >= min(128, tiling.chunks * -(-rows // tiling.tile_rows))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alone", [False, True], ids=["sample_kl", "kl"])
def test_free_bits(dtype, alone, device, triton_backend) -> None:
    """Half of the dimensions are below them: these count as free bits and have no gradient from the divergence."""
    mu, logvar, eps, z_grad, kl_grad = problem((100, 6), device, dtype)
    mu[:, ::2] *= 0.01
    logvar[:, ::2] *= 0.01
    if alone:
        mu, logvar = mu.requires_grad_(), logvar.requires_grad_()
        kl = F.gaussian_kl(mu, logvar, reduction="per_dimension", free_bits=0.25)
        mu_grad, logvar_grad = torch.autograd.grad(kl, (mu, logvar), kl_grad)
        actual = {"kl": kl.detach(), "mu_grad": mu_grad, "logvar_grad": logvar_grad}
        z_grad = None
    else:
        actual = fused(mu, logvar, eps, z_grad, kl_grad, free_bits=0.25)
    expected = exact(mu, logvar, eps, z_grad, kl_grad, 0.25)
    check(actual, expected)
    assert (actual["kl"][::2] == 0.25).all() and (actual["kl"][1::2] > 0.25).all()
    if alone:
        assert not actual["mu_grad"][:, ::2].any() and not actual["logvar_grad"][:, ::2].any()
        assert actual["mu_grad"][:, 1::2].any() and actual["logvar_grad"][:, 1::2].any()


@pytest.mark.parametrize("packed", [False, True], ids=["halves", "packed"])
def test_free_bits_of_the_whole_batch(packed, device, triton_backend) -> None:
    """The sum of what the dimensions count, and its gradient."""
    mu, logvar, eps, z_grad, _ = problem((70, 8), device)
    mu[:, :4] *= 0.01
    logvar[:, :4] *= 0.01
    kl_grad = torch.tensor(0.7, device=device)
    mu, logvar = mu.requires_grad_(), logvar.requires_grad_()
    options = {"reduction": "batchmean", "free_bits": 0.25, "eps": eps}
    if packed:
        z, kl = F.gaussian_sample_kl_packed(torch.cat((mu, logvar), 1), **options)
    else:
        z, kl = F.gaussian_sample_kl(mu, logvar, **options)
        assert same_bits(F.gaussian_kl(mu, logvar, reduction="batchmean", free_bits=0.25), kl)
    assert kl.shape == ()
    mu_grad, logvar_grad = torch.autograd.grad((z, kl), (mu, logvar), (z_grad, kl_grad))
    expected = exact(mu, logvar, eps, z_grad, kl_grad.expand(8), 0.25)
    value, scale, roundings = expected.pop("kl")
    assert_within(kl, value.sum(), scale.sum(), roundings + 3, "kl")
    check({"z": z.detach(), "mu_grad": mu_grad, "logvar_grad": logvar_grad}, expected)


def test_free_bits_of_none_and_of_all(device, triton_backend) -> None:
    mu, logvar, *_ = problem((30, 5), device)
    assert same_bits(
        F.gaussian_kl(mu, logvar, reduction="per_dimension", free_bits=1e-6),
        F.gaussian_kl(mu, logvar, reduction="per_dimension"),
    )
    mu = mu.requires_grad_()
    kl = F.gaussian_kl(mu, logvar, free_bits=100)
    assert kl == 500
    assert not torch.autograd.grad(kl, mu)[0].any()


def test_the_noise_is_that_of_the_other_reductions(device, triton_backend) -> None:
    generator = torch.Generator(device)
    for shape in ((3, 5), (40, 8), (5, 3, 4, 4), (3, 300)):
        mu, logvar = torch.randn(2, *shape, device=device)
        for options in ({}, {"batch_offset": 3}):
            z, _ = F.gaussian_sample_kl(mu, logvar, generator=generator.manual_seed(1), **options)
            same, _ = F.gaussian_sample_kl(
                mu, logvar, reduction="per_dimension", generator=generator.manual_seed(1), **options
            )
            assert same_bits(z, same)


def test_backward_makes_the_noise_again(device, triton_backend) -> None:
    """With drawn noise the gradient of logvar is that of the same noise given."""
    mu, logvar, _, z_grad, kl_grad = problem((9, 12), device)
    generator = torch.Generator(device)
    zero = torch.zeros_like(mu)
    eps = F.gaussian_sample(zero, zero, generator=generator.manual_seed(2))
    given = fused(mu, logvar, eps, z_grad, kl_grad)
    mu, logvar = mu.requires_grad_(), logvar.requires_grad_()
    z, kl = F.gaussian_sample_kl(mu, logvar, reduction="per_dimension", generator=generator.manual_seed(2))
    drawn = torch.autograd.grad((z, kl), (mu, logvar), (z_grad, kl_grad))
    torch.testing.assert_close(drawn, (given["mu_grad"], given["logvar_grad"]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("free_bits", [0.0, 0.9])
@pytest.mark.parametrize("layout", PACKED)
def test_packed_moments(layout, free_bits, device, triton_backend) -> None:
    """In two launches, without a copy, and with one gradient tensor; kl in the order of z."""
    make, dim = PACKED[layout]
    packed = make(lambda *shape: torch.randn(shape).to(device)).requires_grad_()
    mu, logvar = packed.detach().chunk(2, dim)
    # Noise, and gradients as autograd hands them to the operation, with the strides of z.
    eps = torch.randn_like(F.gaussian_sample_kl_packed(packed.detach(), dim=dim)[0])
    z_grad, kl_grad = torch.randn_like(eps), torch.randn_like(eps[0])
    before = Launches.count
    with Copies() as copies:
        z, kl = F.gaussian_sample_kl_packed(packed, dim=dim, reduction="per_dimension", free_bits=free_bits, eps=eps)
        (gradient,) = torch.autograd.grad((z, kl), packed, (z_grad, kl_grad))
    assert Launches.count == before + 2
    assert copies.count == 0
    assert kl.shape == z.shape[1:] and lies_like(kl, z[0])
    mu_grad, logvar_grad = gradient.chunk(2, dim)
    actual = {"z": z.detach(), "kl": kl.detach(), "mu_grad": mu_grad, "logvar_grad": logvar_grad}
    check(actual, exact(mu, logvar, eps, z_grad, kl_grad, free_bits))


@pytest.mark.parametrize("layout", ["contiguous", "reversed", "expanded", "every second", "negative bit"])
def test_upstream_gradient_of_any_layout(layout, device, triton_backend) -> None:
    mu, logvar, eps, z_grad, _ = problem((6, 2, 3, 4), device)
    make = {
        "contiguous": lambda: torch.randn(2, 3, 4),
        "reversed": lambda: torch.randn(4, 3, 2).permute(2, 1, 0),
        "expanded": lambda: torch.randn(()).expand(2, 3, 4),
        "every second": lambda: torch.randn(2, 3, 8)[..., ::2],
        "negative bit": lambda: torch.randn(2, 3, 4, dtype=torch.complex64).conj().imag,
    }
    kl_grad = make[layout]().to(device)
    check(fused(mu, logvar, eps, z_grad, kl_grad), exact(mu, logvar, eps, z_grad, kl_grad))
    channels_last = [t.contiguous(memory_format=torch.channels_last) for t in (mu, logvar)]
    check(fused(*channels_last, eps, z_grad, kl_grad), exact(mu, logvar, eps, z_grad, kl_grad))


@pytest.mark.parametrize("layout", [layout for layout in UPSTREAM if layout != "missing"])
def test_upstream_gradient_of_z_of_any_layout(layout, device, triton_backend) -> None:
    mu, logvar, eps, _, kl_grad = problem((2, 6, 4, 5), device)
    z_grad = UPSTREAM[layout](torch.randn(2, 6, 4, 5)).to(device)
    check(fused(mu, logvar, eps, z_grad, kl_grad), exact(mu, logvar, eps, z_grad, kl_grad))


def test_extreme_and_non_finite_values(device, triton_backend) -> None:
    """Columns of values from underflow to overflow, and NaN, which free bits do not hide."""
    logvar = torch.tensor([-1e4, -200.0, -1e-3, 0.0, 1e-3, 60.0, 80.0, 1e4, math.inf, -math.inf, math.nan])
    logvar = logvar.to(device).expand(3, -1).contiguous()
    mu = torch.tensor([[1e-30], [0.5], [-1e3]], device=device).expand(3, 11).contiguous()
    eps = torch.zeros(3, 11, device=device)
    kl_grad = torch.ones(11, device=device)
    for free_bits in (0.0, 0.1):
        actual = fused(mu, logvar, eps, None, kl_grad, free_bits=free_bits)
        del actual["z"]
        check(actual, exact(mu, logvar, eps, None, kl_grad, free_bits))
        assert actual["kl"][-1].isnan()


def test_only_the_gradients_that_are_needed_and_backward_twice(device, triton_backend) -> None:
    mu, logvar, eps, z_grad, kl_grad = problem((20, 6), device)
    whole = fused(mu, logvar, eps, z_grad, kl_grad, free_bits=0.5)
    for name, tensors in {
        "mu_grad": (mu.requires_grad_(), logvar),
        "logvar_grad": (mu, logvar.requires_grad_()),
    }.items():
        wanted = tensors[name == "logvar_grad"]
        given = [t if t is wanted else t.detach() for t in tensors]
        z, kl = F.gaussian_sample_kl(*given, reduction="per_dimension", free_bits=0.5, eps=eps)
        first = torch.autograd.grad((z, kl), wanted, (z_grad, kl_grad), retain_graph=True)
        second = torch.autograd.grad((z, kl), wanted, (z_grad, kl_grad))
        assert same_bits(first[0], whole[name]) and same_bits(second[0], whole[name])


def test_two_runs_agree_in_every_bit(device, triton_backend) -> None:
    given = problem((300, 40), device)
    first, second = fused(*given), fused(*given)
    assert all(same_bits(first[name], second[name]) for name in first)
    assert launching.ticket(device).item() == 0


@pytest.mark.parametrize("drawn", [False, True], ids=["eps given", "eps drawn"])
def test_gradient_penalty(drawn, device, triton_backend) -> None:
    """Double backward against the reference in float64, around the same noise."""
    mu, logvar, eps, *_ = problem((12, 4), device)
    mu[:, :2] *= 0.01
    logvar[:, :2] *= 0.01
    generator = torch.Generator(device)
    if drawn:
        zero = torch.zeros_like(mu)
        eps = F.gaussian_sample(zero, zero, generator=generator.manual_seed(3))

    def penalty(function, mu, logvar, **noise):
        mu, logvar = mu.detach().requires_grad_(), logvar.detach().requires_grad_()
        z, kl = function(mu, logvar, reduction="per_dimension", free_bits=0.2, **noise)
        gradients = torch.autograd.grad(z.square().sum() + kl.square().sum(), (mu, logvar), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), (mu, logvar))

    noise = {"generator": generator.manual_seed(3)} if drawn else {"eps": eps}
    actual = penalty(F.gaussian_sample_kl, mu, logvar, **noise)
    wide = [tensor.double() for tensor in (mu, logvar)]
    expected = penalty(reference.gaussian.gaussian_sample_kl, *wide, eps=eps.double())
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_torch_func_grad(device, triton_backend) -> None:
    mu, logvar, *_ = problem((7, 3), device)

    def loss(mu, logvar):
        return F.gaussian_kl(mu, logvar, free_bits=0.3)

    got = torch.func.grad(loss, argnums=(0, 1))(mu, logvar)
    with_grad = mu.detach().requires_grad_(), logvar.detach().requires_grad_()
    torch.testing.assert_close(got, torch.autograd.grad(loss(*with_grad), with_grad))


def test_gradcheck_of_the_reference() -> None:
    mu, logvar = torch.randn(2, 5, 4, dtype=torch.float64)
    mu[:, :2] *= 0.01
    logvar[:, :2] *= 0.01
    inputs = mu.requires_grad_(), logvar.requires_grad_()
    for options in (
        {"reduction": "per_dimension"},
        {"reduction": "per_dimension", "free_bits": 0.1},
        {"free_bits": 0.1},
    ):
        assert torch.autograd.gradcheck(lambda m, v, o=options: reference.gaussian.gaussian_kl(m, v, **o), inputs)


def test_the_reference_is_the_formula() -> None:
    """Against torch.distributions, which knows neither this file nor the library."""
    mu, logvar = torch.randn(2, 50, 3, dtype=torch.float64)
    posterior = torch.distributions.Normal(mu, torch.exp(logvar / 2))
    means = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean(0)
    torch.testing.assert_close(reference.gaussian.gaussian_kl(mu, logvar, reduction="per_dimension"), means)
    bound = means.median().item()
    torch.testing.assert_close(
        reference.gaussian.gaussian_kl(mu, logvar, free_bits=bound), means.clamp(min=bound).sum()
    )


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 2, 3)], ids=str)
def test_nothing_is_launched_for_no_elements(shape, device, no_launch) -> None:  # noqa: F811
    mu, logvar = torch.randn(2, *shape, device=device).requires_grad_()
    for free_bits in (0.0, 0.5):
        kl = F.gaussian_kl(mu, logvar, reduction="per_dimension", free_bits=free_bits)
        expected = reference.gaussian.gaussian_kl(mu, logvar, reduction="per_dimension", free_bits=free_bits)
        torch.testing.assert_close(kl, expected, equal_nan=True)
        gradient, _ = torch.autograd.grad(kl.sum(), (mu, logvar))
        assert gradient.shape == shape


def test_whole_under_compile(device, triton_backend) -> None:
    torch._dynamo.reset()
    moments = torch.randn(6, 8, device=device, requires_grad=True)
    eps = torch.randn(6, 4, device=device)

    def function(moments):
        z, kl = F.gaussian_sample_kl_packed(moments, reduction="batchmean", free_bits=0.3, eps=eps)
        return z.square().sum() + kl

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for run in (function, compiled):
        (gradient,) = torch.autograd.grad(run(moments), moments)
        if run is function:
            expected = gradient
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"free_bits": -0.1}, ValueError, "free_bits must be finite in float32 and not negative, got -0.1"),
        ({"free_bits": math.nan}, ValueError, "free_bits must be finite in float32 and not negative, got nan"),
        ({"free_bits": 1e300}, ValueError, "free_bits must be finite in float32 and not negative, got 1e"),
        ({"free_bits": "1"}, TypeError, "free_bits must be a number, got str"),
        ({"free_bits": 0.1, "reduction": "none"}, ValueError, 'reduction must be "batchmean" or "per_dimension"'),
        ({"free_bits": 0.1, "reduction": "mean"}, ValueError, 'reduction must be "batchmean" or "per_dimension"'),
        ({"reduction": "dimension"}, ValueError, "none, batchmean, sum, mean, per_dimension, got 'dimension'"),
    ],
)
@pytest.mark.parametrize("operation", ["gaussian_kl", "gaussian_sample_kl", "gaussian_sample_kl_packed"])
def test_wrong_options_are_refused(operation, options, error, message, device, no_launch) -> None:  # noqa: F811
    x = torch.randn(2, 4, device=device)
    given = (x,) if operation.endswith("packed") else (x, x)
    with pytest.raises(error, match=message):
        getattr(F, operation)(*given, **options)


def test_a_reconstruction_has_no_dimensions(device, no_launch) -> None:  # noqa: F811
    x = torch.randn(2, 4, device=device)
    with pytest.raises(ValueError, match="must be one of none, batchmean, sum, mean, got 'per_dimension'"):
        F.sigmoid_mse_loss(x, x, reduction="per_dimension")


def test_modules(device, triton_backend) -> None:
    mu, logvar, *_ = problem((9, 4), device)
    expected = F.gaussian_kl(mu, logvar, free_bits=0.5)
    module = nn.GaussianKL(free_bits=0.5)
    assert same_bits(module(mu, logvar), expected)
    assert "free_bits=0.5" in repr(module)
    for deterministic in (False, True):
        module = nn.GaussianSamplingKL(reduction="batchmean", free_bits=0.5, deterministic=deterministic)
        z, kl = module(torch.cat((mu, logvar), 1))
        torch.testing.assert_close(kl, expected, rtol=1e-6, atol=0)
        assert torch.equal(z, mu) == deterministic
