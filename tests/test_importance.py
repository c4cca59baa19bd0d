"""The importance-weighted bound and its estimators, on both paths."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastvae
import fastvae.functional as F
from bounds import assert_within
from fastvae.kernels import importance_weighted as kernels
from pairs import levels

pytestmark = pytest.mark.usefixtures("on_the_device")


@pytest.fixture(params=["triton", "reference"])
def backend(request):
    with fastvae.use_backend(request.param):
        yield request.param


def draw(*shape, dtype=torch.float32) -> list[Tensor]:
    return [(3 * torch.randn(shape)).to(dtype).requires_grad_() for _ in range(3)]


def check(tensors, dim=0) -> None:
    value = F.importance_weighted_bound(*tensors, dim)
    g = torch.linspace(-1, 2, value.numel()).view(value.shape)
    gradients = torch.autograd.grad(value, tensors, g.to(value.dtype))
    wide = [tensor.detach().double() for tensor in tensors]
    log_w = wide[0] + wide[1] - wide[2]
    samples = log_w.shape[dim]
    expected = torch.logsumexp(log_w, dim) - math.log(samples)
    scale = sum(tensor.abs() for tensor in wide) + (log_w.amax(dim, keepdim=True) - log_w)
    w = torch.softmax(log_w, dim)
    of_value = (w * (scale + 1)).sum(dim) + expected.abs() + math.log(samples)
    k = 9 + levels(samples)
    assert_within(value, expected, of_value, k, "value")
    of_gradient = g.double().abs().unsqueeze(dim) * w * (scale + of_value.unsqueeze(dim) + 1)
    for sign, gradient in zip((1, 1, -1), gradients, strict=True):
        assert_within(gradient, sign * g.double().unsqueeze(dim) * w, of_gradient, k + 6, "gradient")


@pytest.mark.parametrize(
    ("shape", "dim"), [((1,), 0), ((7,), 0), ((5, 3), 0), ((3, 5), 1), ((2, 4, 3), -2), ((1, 6), 0), ((40, 33), 0)]
)
def test_values_and_gradients(shape, dim, backend):
    check(draw(*shape), dim)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype, backend):
    if dtype is torch.float64 and backend == "triton":
        with pytest.raises(RuntimeError, match="float64 is computed by the reference path only"):
            F.importance_weighted_bound(*draw(3, 2, dtype=dtype))
        return
    tensors = draw(5, 3, dtype=dtype)
    assert F.importance_weighted_bound(*tensors).dtype is (dtype if dtype is torch.float64 else torch.float32)
    check(tensors)


def test_many_samples_are_shared_by_programs(monkeypatch, triton_backend):
    """Of few rows: several parts, joined in the launch."""
    assert kernels.plan_bound(5000, 20, (20, 1) * 3, 0.0)[1] == 157
    monkeypatch.setattr(kernels, "_TILE", 8)
    monkeypatch.setattr(kernels, "plan_bound", kernels.plan_bound.__wrapped__)
    before = triton_backend.count
    check(draw(21, 3))
    assert triton_backend.count - before == 2


def test_one_sample_is_the_elbo(backend):
    tensors = draw(1, 4)
    torch.testing.assert_close(F.importance_weighted_bound(*tensors), (tensors[0] + tensors[1] - tensors[2])[0])


def test_infinities_and_nan_stay_in_their_row(backend):
    tensors = [tensor.detach() for tensor in draw(3, 4)]
    expected = F.importance_weighted_bound(*tensors)
    tensors[0][:, 1] = -torch.inf
    tensors[1][2, 2] = torch.nan
    tensors[0][1, 3] = -torch.inf
    leaves = [tensor.requires_grad_() for tensor in tensors]
    value = F.importance_weighted_bound(*leaves)
    gradients = torch.autograd.grad(value.sum(), leaves)
    assert value[0] == expected[0] and value[1] == -torch.inf and value[2].isnan() and value[3].isfinite()
    for gradient in gradients:
        assert (gradient[:, 1] == 0).all() and gradient[:, 2].isnan().all() and gradient[1, 3] == 0
        assert gradient[:, [0, 3]].isfinite().all()


def test_large_log_densities(backend):
    """As of images: a difference of their exponents, not of their exponentials."""
    tensors = [(tensor.detach() - 5e4).requires_grad_() for tensor in draw(4, 3)]
    check(tensors)


def test_an_empty_batch_and_strides(backend):
    empty = draw(3, 0)
    value = F.importance_weighted_bound(*empty)
    assert value.shape == (0,) and torch.autograd.grad(value.sum(), empty)[0].shape == (3, 0)
    tensors = [tensor.detach() for tensor in draw(4, 6)]
    strided = [tensors[0].t().contiguous().t(), torch.randn(4, 12)[:, ::2].copy_(tensors[1]), tensors[2]]
    assert torch.equal(F.importance_weighted_bound(*strided), F.importance_weighted_bound(*tensors))
    shared = tensors[1][:, :1].expand(4, 6)
    expected = F.importance_weighted_bound(tensors[0], shared.contiguous(), tensors[2])
    assert torch.equal(F.importance_weighted_bound(tensors[0], shared, tensors[2]), expected)


def test_a_gradient_of_a_gradient_and_transforms(backend):
    tensors = draw(4, 3)
    value = F.importance_weighted_bound(*tensors)
    first = torch.autograd.grad(value.square().sum(), tensors, create_graph=True)
    second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), tensors)
    exact = torch.logsumexp(tensors[0] + tensors[1] - tensors[2], 0) - math.log(4)
    of_exact = torch.autograd.grad(exact.square().sum(), tensors, create_graph=True)
    expected = torch.autograd.grad(sum(gradient.square().sum() for gradient in of_exact), tensors)
    torch.testing.assert_close(second, expected, rtol=1e-4, atol=1e-4)
    found = torch.func.grad(lambda x: F.importance_weighted_bound(x, *tensors[1:]).sum())(tensors[0].detach())
    torch.testing.assert_close(found, torch.softmax(tensors[0] + tensors[1] - tensors[2], 0).detach())


def test_only_what_is_needed_is_written(triton_backend):
    tensors = draw(4, 3)
    expected = torch.autograd.grad(F.importance_weighted_bound(*tensors).sum(), tensors)
    alone = [tensors[0].detach(), tensors[1].detach(), tensors[2]]
    value = F.importance_weighted_bound(*alone)
    before = triton_backend.count
    (gradient,) = torch.autograd.grad(value.sum(), alone[2])
    assert triton_backend.count - before == 1 and torch.equal(gradient, expected[2])


def test_torch_compile(backend):
    torch._dynamo.reset()
    tensors = draw(4, 3)
    compiled = torch.compile(F.importance_weighted_bound, fullgraph=True, backend="aot_eager_decomp_partition")
    value = compiled(*tensors)
    expected = F.importance_weighted_bound(*tensors)
    torch.testing.assert_close(value, expected)
    found = torch.autograd.grad(value.sum(), tensors)
    torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), tensors))


def test_the_registered_operations():
    from fastvae.autograd import importance  # noqa: F401 - registers

    tensors = [x.detach() for x in draw(3, 4)]
    value = torch.ops.fastvae.importance_weighted_bound(*tensors)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fastvae.importance_weighted_bound.default, tuple(tensors), test_utils=tests)
    arguments = (*tensors, value, torch.ones(4), [True, False, True])
    operation = torch.ops.fastvae.importance_weighted_bound_backward.default
    torch.library.opcheck(operation, arguments, test_utils=tests)


# ----------------------------------------------------------------------------------------------------------- estimators


def of_toy(estimator: str, samples: int, draws: int) -> tuple[Tensor, Tensor]:
    """The gradients of the bound in m and in a of p(z) = N(0, 1), p(x|z) = N(a z, 1), q(z|x) = N(m, 2/3), x = 1, for
    each of the draws. (The posterior of a = 1 is N(1/2, 1/2).)
    """
    a = torch.full((draws,), 0.8, dtype=torch.float64, requires_grad=True)
    m = torch.full((draws,), 0.3, dtype=torch.float64, requires_grad=True)
    std = (2 / 3) ** 0.5
    z = m + std * torch.randn(samples, draws, dtype=torch.float64)
    normal = torch.distributions.Normal
    log_q = normal(m if estimator == "iwae" else m.detach(), std).log_prob(z)
    z_of_dreg = z[..., None]
    if estimator == "dreg":
        log_q = normal(m.detach(), std).log_prob(z_of_dreg[..., 0])
        z = z_of_dreg[..., 0]
    bound = F.importance_weighted_bound(
        normal(a * z, 1.0).log_prob(torch.ones(())), normal(0.0, 1.0).log_prob(z), log_q, 0, estimator,
        z=z_of_dreg if estimator == "dreg" else None,
    )  # fmt: skip
    return torch.autograd.grad(bound.sum(), (m, a))


def test_the_estimators_of_a_linear_gaussian_toy():
    """With one sample, the closed gradient of the ELBO in m: a (x - a m) - m. With four, "dreg" has the mean of "iwae",
    with less variance, and "stl" has another one. The decoder's gradient is the same in mean for all.
    """
    found = {
        (estimator, samples): of_toy(estimator, samples, 200_000)
        for estimator in ("iwae", "stl", "dreg")
        for samples in (1, 4)
    }
    means = {key: [float(x.mean()) for x in pair] for key, pair in found.items()}
    errors = {key: [float(x.std()) / 200_000**0.5 for x in pair] for key, pair in found.items()}
    closed = 0.8 * (1 - 0.8 * 0.3) - 0.3, 0.3 * (1 - 0.8 * 0.3) - 0.8 * 2 / 3
    for estimator in ("iwae", "stl", "dreg"):
        for k in range(2):
            assert abs(means[estimator, 1][k] - closed[k]) < 5 * errors[estimator, 1][k] + 1e-12, (estimator, k)
    iwae, stl, dreg = (means[estimator, 4] for estimator in ("iwae", "stl", "dreg"))
    of_iwae, of_stl, of_dreg = (errors[estimator, 4] for estimator in ("iwae", "stl", "dreg"))
    assert abs(dreg[0] - iwae[0]) < 5 * (of_dreg[0] + of_iwae[0]) and of_dreg[0] < 0.7 * of_iwae[0]
    assert abs(stl[0] - iwae[0]) > 10 * (of_stl[0] + of_iwae[0])
    assert abs(dreg[1] - iwae[1]) < 5 * (of_dreg[1] + of_iwae[1])


def test_dreg_scales_the_gradient_that_arrives_at_z(backend):
    """By the normalised weights, and nothing else; a z that needs no gradient is left alone."""
    z = torch.randn(3, 2, 4, requires_grad=True)
    others = [tensor.detach() for tensor in draw(3, 2)]
    log_q = -z.square().sum(2)
    bound = F.importance_weighted_bound(others[0], others[1], log_q, 0, "dreg", z=z)
    (found,) = torch.autograd.grad(bound.sum(), z)
    w = torch.softmax(others[0] + others[1] - log_q.detach(), 0)[:, :, None]
    torch.testing.assert_close(found, w * w * 2 * z.detach())
    alone = F.importance_weighted_bound(others[0], others[1], log_q.detach(), 0, "dreg", z=z.detach())
    assert torch.equal(alone, bound) and not alone.requires_grad
    half = torch.randn(2, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    bound = F.importance_weighted_bound(others[0].t(), others[1].t(), half.sum(2), 1, "dreg", z=half)
    assert torch.autograd.grad(bound.sum(), half)[0].dtype is torch.bfloat16


# --------------------------------------------------------------------------------------------------------------- errors

X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0], X, X), {}, TypeError, "log_p_x_given_z must be a torch.Tensor, got list"),
        ((X, X.int(), X), {}, TypeError, "log_p_z must be float16, .* got torch.int32"),
        ((X, X, X[:1]), {}, ValueError, r"log_q_z must have the shape of log_p_x_given_z, \[2, 3\], got \[1, 3\]"),
        ((X, X, X), {"dim": 2}, ValueError, r"dim must name a dimension of log_p_x_given_z \[2, 3\], got 2"),
        ((X[:0], X[:0], X[:0]), {}, ValueError, r"at least one sample along dim 0, got \[0, 3\]"),
        ((X, X, X), {"estimator": "vimco"}, ValueError, "estimator must be one of iwae, stl, dreg, got 'vimco'"),
        ((X, X, X), {"estimator": "dreg"}, ValueError, 'z must be given for the estimator "dreg", and for no other'),
        ((X, X, X), {"z": X}, ValueError, "z must be given for the estimator .* got 'iwae'"),
        ((X, X, X), {"estimator": "dreg", "z": X.t()}, ValueError, r"z must have .* \[2, 3\], got \[3, 2\]"),
    ],
)
def test_errors(arguments, options, error, message):
    with pytest.raises(error, match=message):
        F.importance_weighted_bound(*arguments, **options)


def test_the_module():
    tensors = draw(2, 3)
    module = fastvae.nn.ImportanceWeightedBound(dim=1, estimator="stl")
    assert torch.equal(module(*tensors), F.importance_weighted_bound(*tensors, 1, "stl"))
    assert repr(module) == "ImportanceWeightedBound(dim=1, estimator='stl')"
