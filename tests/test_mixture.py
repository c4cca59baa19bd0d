"""The log-density of a mixture of diagonal Gaussians, against its definition in float64, on both paths."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import mpmath
import pytest
import torch
from torch import Tensor

import fastvae
import fastvae.functional as F
from bounds import assert_within
from fastvae.kernels import mixture_log_prob as kernels
from fastvae.reference import mixture as reference
from memory_meters import allocations, peak_memory
from pairs import levels, pair_terms

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from traffic import metered

pytestmark = pytest.mark.usefixtures("on_the_device")

NAMES = ("z", "mu", "logvar", "log_weights")


@pytest.fixture(params=["triton", "reference"])
def backend(request, monkeypatch):
    """Both paths: that of the CPU in blocks of a few pairs, with a rest."""
    monkeypatch.setattr(reference, "block_size", lambda: 20)
    monkeypatch.setattr(reference, "_PAIRS", 50)
    with fastvae.use_backend(request.param):
        yield request.param


def draw(rows, components, dims, weighted=True, dtype=torch.float32, device=None) -> list[Tensor]:
    shapes = [(rows, dims), (components, dims), (components, dims), (components,)][: 4 if weighted else 3]
    return [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]


def run(tensors, upstream=None, needed=None):
    """The value and the gradients of all tensors, or of those that are needed."""
    value = F.gaussian_mixture_log_prob(*tensors)
    upstream = (
        torch.linspace(-1, 2, value.numel(), device=value.device).view(value.shape) if upstream is None else upstream
    )
    wanted = tensors if needed is None else [tensors[k] for k in needed]
    return value, torch.autograd.grad(value, wanted, upstream.to(value.dtype))


def check(tensors, value, gradients) -> None:
    """Each number within the bound of its roundings, in units of the sum of absolute terms."""
    z, mu, logvar, *rest = (tensor.detach().double() for tensor in tensors)
    weights = rest[0] if rest else torch.full((len(mu),), -math.log(len(mu)), dtype=torch.float64)
    given = [x.clone().requires_grad_() for x in (z, mu, logvar, weights)]
    z_, mu_, logvar_, weights_ = given
    terms = weights_ - 0.5 * ((z_[:, None] - mu_) ** 2 * torch.exp(-logvar_) + logvar_ + math.log(2 * math.pi)).sum(-1)
    expected = torch.logsumexp(terms, 1)
    g = torch.linspace(-1, 2, len(z)).double()
    of_expected = torch.autograd.grad(expected, given, g)

    found, scale, r, factor = pair_terms(z, mu, logvar, weights)
    p = torch.softmax(found, 1)
    below = found.amax(1, keepdim=True) - found
    of_value = (p * (scale + below + 1)).sum(1) + expected.detach().abs() + math.log(len(mu))
    # A term: 13 roundings of r^2, see the kernel, and one for each dimension; the value has 6 more.
    k = 20 + z.shape[1] + levels(len(mu))
    assert_within(value, expected, of_value, k, "value")
    w = (g[:, None] * p).abs() * (scale + of_value[:, None] + 1)
    condition = 1 + logvar.abs()
    scales = [
        (w[..., None] * (r * factor).abs() * condition).sum(1),
        (w[..., None] * (r * factor).abs() * condition).sum(0),
        0.5 * (w[..., None] * (r.square() + 1) * condition).sum(0),
        w.sum(0),
    ]
    for name, gradient, wanted, of_gradient in zip(NAMES, gradients, of_expected, scales, strict=False):
        assert_within(gradient, wanted, of_gradient, k + levels(max(len(z), len(mu))), f"{name}_grad")


@pytest.mark.parametrize(
    ("rows", "components", "dims", "weighted"),
    [(1, 1, 1, True), (5, 9, 3, True), (7, 1, 2, False), (35, 3, 2, False), (3, 40, 2, True), (2, 3, 300, True)],
)
def test_values_and_gradients(rows, components, dims, weighted, backend, monkeypatch):
    if dims == 300:  # else 75 steps on the interpreter
        for tile in ("_OF_VALUES", "_OF_ROWS", "_OF_COMPONENTS"):
            monkeypatch.setattr(kernels, tile, (*getattr(kernels, tile)[:2], 64))
        monkeypatch.setattr(kernels, "plan_mixture", kernels.plan_mixture.__wrapped__)
    tensors = draw(rows, components, dims, weighted)
    check(tensors, *run(tensors))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_gradients_are_rounded_once(dtype, backend):
    tensors = draw(5, 6, 3, dtype=dtype)
    value, gradients = run(tensors)
    assert value.dtype is torch.float32 and {gradient.dtype for gradient in gradients} == {dtype}
    check(tensors, value, gradients)


def test_dtypes_may_differ(backend):
    z, mu, logvar, weights = draw(5, 6, 3)
    tensors = [z.detach().half().requires_grad_(), mu, logvar, weights.detach().bfloat16().requires_grad_()]
    value, gradients = run(tensors)
    assert [gradient.dtype for gradient in gradients] == [tensor.dtype for tensor in tensors]
    check(tensors, value, gradients)


def test_float64_is_computed_in_float64(monkeypatch):
    monkeypatch.setattr(reference, "block_size", lambda: 20)
    monkeypatch.setattr(reference, "_PAIRS", 50)
    tensors = draw(6, 5, 3, dtype=torch.float64)
    value, gradients = run(tensors)
    expected = torch.logsumexp(
        tensors[3]
        + torch.distributions.Normal(tensors[1], torch.exp(tensors[2] / 2)).log_prob(tensors[0][:, None]).sum(2),
        1,
    )
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, tensors, torch.linspace(-1, 2, 6).double()))
    # one float64 among them is enough
    assert (
        F.gaussian_mixture_log_prob(tensors[0].float(), *[x.detach().float() for x in tensors[1:3]], tensors[3]).dtype
        is torch.float64
    )


@pytest.mark.parametrize(("programs", "dtype"), [(1, torch.bfloat16), (6, torch.float32), (64, torch.bfloat16)])
def test_any_number_of_tiles_and_parts(programs, dtype, monkeypatch, triton_backend):
    """One part each, several that are joined in the same launch, and as many as there are tiles."""
    for tile in ("_OF_VALUES", "_OF_ROWS", "_OF_COMPONENTS"):
        monkeypatch.setattr(kernels, tile, (2, 2, 4))
    monkeypatch.setattr(kernels, "_PROGRAMS", programs)
    monkeypatch.setattr(kernels, "plan_mixture", kernels.plan_mixture.__wrapped__)
    tensors = draw(5, 6, 2, dtype=dtype)
    value, gradients = run(tensors)
    check(tensors, value, gradients)


def test_parts_depend_on_the_problem_only():
    assert kernels.divided(32, 16) == (256, 2, 8)
    assert kernels.divided(1000, 16) == (1000, 16, 1)
    assert kernels.divided(1, 7) == (7, 1, 7)
    assert kernels.divided(100, 3) == (200, 2, 2)


def test_one_component_is_the_density_of_a_gaussian(backend):
    z, mu, logvar = draw(4, 1, 3, weighted=False)
    expected = torch.distributions.Normal(mu, torch.exp(logvar / 2)).log_prob(z).sum(1)
    torch.testing.assert_close(F.gaussian_mixture_log_prob(z, mu, logvar), expected)


def test_copies_of_a_component_change_nothing(backend):
    z, mu, logvar = (x.detach() for x in draw(4, 1, 3, weighted=False))
    alone = F.gaussian_mixture_log_prob(z, mu, logvar)
    torch.testing.assert_close(F.gaussian_mixture_log_prob(z, mu.expand(7, 3), logvar.expand(7, 3)), alone)


def test_against_mpmath(backend):
    """Narrow and wide components, far from zero, of which the square of the differences is small."""
    z = torch.tensor([[1e4 + 2**-6, -3.0], [1e4, 5.0]])
    mu = torch.tensor([[1e4, -3.0], [1e4 + 2**-7, 5.0], [0.0, 0.0]])
    logvar = torch.tensor([[-8.0, -100.0], [-7.0, 100.0], [17.0, 0.5]])
    weights = torch.tensor([-1.0, 0.25, 3.0])
    found = F.gaussian_mixture_log_prob(z, mu, logvar, weights)
    with mpmath.workdps(50):
        for row, actual in zip(z.tolist(), found.tolist(), strict=True):
            terms = [
                mpmath.mpf(w) - sum(((mpmath.mpf(x) - m) ** 2 * mpmath.exp(-v) + v + mpmath.log(2 * mpmath.pi)) / 2
                                    for x, m, v in zip(row, means, variances, strict=True))
                for w, means, variances in zip(weights.tolist(), mu.tolist(), logvar.tolist(), strict=True)
            ]  # fmt: skip
            expected = float(mpmath.log(sum(map(mpmath.exp, terms))))
            assert abs(actual - expected) < 4e-6 * abs(expected)


@pytest.mark.parametrize("shift", [0.0, 1e4])
@pytest.mark.parametrize("logvar", [-100.0, -89.0, 0.0, 100.0])
def test_extreme_variances_and_far_latents(logvar, shift, backend):
    """z on a component: the value and the gradients are finite, and those of z and mu are 0 there."""
    z = (torch.tensor([[0.0, 1.0]]) + shift).requires_grad_()
    mu = torch.cat((z.detach(), z.detach() + 2.0**-9 * math.exp(min(logvar, 0.0) / 2))).requires_grad_()
    tensors = [z, mu, torch.full((2, 2), logvar).requires_grad_()]
    value, gradients = run(tensors)
    assert value.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)
    check(tensors, value, gradients)


def test_a_component_without_weight_has_no_part(backend):
    """Not even where its squares overflow, or its differences do."""
    z, mu, logvar, weights = (x.detach() for x in draw(5, 4, 3))
    mu[2], logvar[2], weights[2] = 3e38, -100.0, -torch.inf
    mu[3], logvar[3] = 1e30, -30.0  # its weight is finite, and its term is -infinity
    value, gradients = run([x.requires_grad_() for x in (z, mu, logvar, weights)])
    alone = [x.detach()[:2].requires_grad_() for x in (mu, logvar, weights)]
    expected, of_expected = run([z, *alone])
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradients[0], of_expected[0])
    for gradient, wanted in zip(gradients[1:], of_expected[1:], strict=True):
        torch.testing.assert_close(gradient[:2], wanted)
        assert torch.equal(gradient[2:], torch.zeros_like(gradient[2:]))


def test_a_row_without_a_term_has_minus_infinity_and_no_gradient(backend):
    z, mu, logvar, weights = draw(3, 4, 2)
    value, gradients = run([z, mu, logvar, torch.full((4,), -torch.inf, requires_grad=True)])
    assert (value == -torch.inf).all() and all((gradient == 0).all() for gradient in gradients)
    far = z.detach().clone()
    far[1] = 1e30
    value, gradients = run([far.requires_grad_(), mu, logvar, weights])
    assert value.isinf().tolist() == [False, True, False]
    assert (gradients[0][1] == 0).all() and all(gradient.isfinite().all() for gradient in gradients)


def test_nan_stays_in_its_row(backend, monkeypatch):
    for tile in ("_OF_VALUES", "_OF_ROWS", "_OF_COMPONENTS"):
        monkeypatch.setattr(kernels, tile, (2, 4, 4))
    monkeypatch.setattr(kernels, "plan_mixture", kernels.plan_mixture.__wrapped__)
    tensors = draw(5, 6, 3)
    expected, of_expected = run(tensors)
    z = tensors[0].detach().clone()
    z[3, 1] = torch.nan
    value, gradients = run([z.requires_grad_(), *tensors[1:]])
    others = torch.arange(5) != 3
    assert value.isnan().tolist() == [False, False, False, True, False]
    assert torch.equal(value[others], expected[others])
    assert torch.equal(gradients[0][others], of_expected[0][others]) and gradients[0][3].isnan().all()


def test_nan_in_a_component_is_in_every_row(backend):
    z, mu, logvar, weights = (x.detach() for x in draw(3, 5, 2))
    for tensor, index in ((mu, (4, 1)), (logvar, (0, 0)), (weights, (2,))):
        given = {id(x): x.clone() for x in (mu, logvar, weights)}
        given[id(tensor)][index] = torch.nan
        assert F.gaussian_mixture_log_prob(z, *given.values()).isnan().all()


# ------------------------------------------------------------------------------------------------- layouts and autograd


def test_any_strides(backend):
    """Read as they lie: transposed, sliced, expanded, negated."""
    z, mu, logvar, weights = (x.detach() for x in draw(4, 6, 3))
    expected = run([x.clone().requires_grad_() for x in (z, mu, logvar, weights)])
    wide = torch.randn(4, 7)
    wide[:, 1:7:2] = z
    moved = [
        wide[:, 1:7:2],
        mu.t().contiguous().t(),
        torch.stack((logvar, logvar), 1)[:, 0],
        torch.stack((weights, weights), 1)[:, 1],
    ]
    found = run([x.requires_grad_() for x in moved])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    row, negative = torch.randn(1, 3), torch.complex(mu, -mu).conj().imag
    found = F.gaussian_mixture_log_prob(row.expand(4, 3), negative, logvar)
    assert torch.equal(found, F.gaussian_mixture_log_prob(row.repeat(4, 1), mu, logvar)) and negative.is_neg()


def test_leading_dimensions(backend):
    z, mu, logvar, weights = draw(6, 5, 3)
    expected, of_expected = run([z, mu, logvar, weights])
    folded = z.detach().view(2, 3, 3).requires_grad_()
    value, gradients = run([folded, mu, logvar, weights])
    assert torch.equal(value, expected.view(2, 3)) and torch.equal(gradients[0], of_expected[0].view(2, 3, 3))
    assert F.gaussian_mixture_log_prob(z[0], mu, logvar, weights).shape == ()


def test_an_empty_batch(backend):
    tensors = draw(0, 5, 3)
    value, gradients = run(tensors)
    assert value.shape == (0,) and gradients[0].shape == (0, 3)
    assert all((gradient == 0).all() for gradient in gradients[1:])


def test_launches_and_what_nobody_needs(triton_backend):
    tensors = draw(5, 6, 3)
    before = triton_backend.count
    value = F.gaussian_mixture_log_prob(*tensors)
    assert triton_backend.count - before == 1
    expected = torch.autograd.grad(value.sum(), tensors)
    assert triton_backend.count - before == 3
    for k, name in enumerate(NAMES):
        alone = [tensor.detach().requires_grad_(own == name) for own, tensor in zip(NAMES, tensors, strict=True)]
        value = F.gaussian_mixture_log_prob(*alone)
        before = triton_backend.count
        (gradient,) = torch.autograd.grad(value.sum(), alone[k])
        assert triton_backend.count - before == 1 and torch.equal(gradient, expected[k])


def test_a_gradient_of_a_gradient(backend):
    tensors = draw(3, 4, 2)
    value = F.gaussian_mixture_log_prob(*tensors)
    first = torch.autograd.grad(value.square().sum(), tensors, create_graph=True)
    second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), tensors)
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    exact = reference.formula(*wide)
    of_exact = torch.autograd.grad(exact.square().sum(), wide, create_graph=True)
    expected = torch.autograd.grad(sum(gradient.square().sum() for gradient in of_exact), wide)
    torch.testing.assert_close(second, expected, check_dtype=False, rtol=1e-4, atol=1e-4)


def test_gradcheck(monkeypatch):
    monkeypatch.setattr(reference, "block_size", lambda: 4)
    monkeypatch.setattr(reference, "_PAIRS", 10)
    tensors = draw(3, 4, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(F.gaussian_mixture_log_prob, tensors)
    assert torch.autograd.gradgradcheck(F.gaussian_mixture_log_prob, tensors)


def test_transforms(backend):
    z, mu, logvar, _ = (x.detach() for x in draw(3, 4, 2))
    found = torch.func.grad(lambda z: F.gaussian_mixture_log_prob(z, mu, logvar).sum())(z)
    (expected,) = torch.autograd.grad(reference.formula(z.requires_grad_(), mu, logvar).sum(), z)
    torch.testing.assert_close(found, expected)
    if backend == "triton":
        with pytest.raises(NotImplementedError, match="gaussian_mixture_log_prob does not run under"):
            torch.vmap(lambda z: F.gaussian_mixture_log_prob(z, mu, logvar))(z.detach()[None])


def test_torch_compile(backend):
    torch._dynamo.reset()
    tensors = draw(3, 4, 2)
    compiled = torch.compile(F.gaussian_mixture_log_prob, fullgraph=True, backend="aot_eager_decomp_partition")
    value = compiled(*tensors)
    expected, of_expected = run(tensors)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, tensors, torch.linspace(-1, 2, 3)), of_expected)


def test_the_registered_operations():
    from fastvae.autograd import mixture  # noqa: F401 - registers

    tensors = [x.detach() for x in draw(3, 4, 2)]
    value = torch.ops.fastvae.gaussian_mixture_log_prob(*tensors)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.fastvae.gaussian_mixture_log_prob.default, tuple(tensors), test_utils=tests)
    arguments = (*tensors, value, torch.ones(3), [True, False, True, True])
    torch.library.opcheck(torch.ops.fastvae.gaussian_mixture_log_prob_backward.default, arguments, test_utils=tests)


# --------------------------------------------------------------------------------------------------------------- memory


def test_memory_on_the_cpu():
    """2048 rows and components: one tensor of all pairs would have 16 MB, and one of all differences 160."""
    tensors = draw(2048, 2048, 10)
    with fastvae.use_backend("reference"):
        most = peak_memory(lambda: run(tensors))
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            F.gaussian_mixture_log_prob(*tensors)
        # The meter can fail: it sees what the definition takes.
        with_formula = peak_memory(lambda: reference.formula(*[x[:256] for x in tensors[:1]], *tensors[1:]))
    assert most < 6 * 4 * max(reference.block_size(), reference._PAIRS) + 40 * 4 * tensors[0].numel()
    assert sum(tensor.numel() for tensor in saved) == sum(map(Tensor.numel, tensors)) + 2048
    assert with_formula > 256 * 2048 * 10 * 4


def test_memory_of_the_kernels(monkeypatch):
    """What a call allocates besides its results, of launches that are recorded and not made."""
    monkeypatch.setattr(kernels, "launch", lambda *arguments: None)
    tensors = [x.detach().bfloat16() for x in draw(2048, 2048, 10)]
    with allocations() as allocated:
        value = kernels.mixture_log_prob(*tensors)
        kernels.mixture_log_prob_backward(*tensors, value, value, (True,) * 4)
    of_rows, of_components = kernels.divided(512, 64)[2], kernels.divided(64, 512)[2]
    assert (of_rows, of_components) == (1, 4)
    gradients = (of_rows + 2 * of_components) * 4 + 3 * 2
    assert sum(allocated) < gradients * 2048 * 10 + 30 * 4 * 2048 < 40 * 2048 * 10 + 4 * 2048 * 2048 / 16


def test_bytes_that_the_kernels_move(triton_backend):
    """z once for each tile of components, the components once for each tile of rows; twice in a backward pass."""
    rows, components, dims = 5, 40, 3
    tensors = draw(rows, components, dims)
    with metered() as traffic:
        value = F.gaussian_mixture_log_prob(*tensors)
    # One tile of rows and two of components, which are two parts, each of two numbers a row.
    assert traffic.launches == 1
    read = 4 * (2 * rows * dims + (2 * dims + 1) * components)
    assert 0 <= traffic.loaded - read - 2 * 8 * rows < 32  # and tickets
    assert 0 <= traffic.stored - 4 * rows - 2 * 8 * rows < 32
    with metered() as traffic:
        torch.autograd.grad(value.sum(), tensors)

    # Of each pair of tiles, terms and slopes read what differences need; terms read the weights and two numbers a row.
    def of_pairs(row_tiles: int, component_tiles: int) -> int:
        of_differences = component_tiles * rows * dims + row_tiles * 2 * dims * components
        return 2 * of_differences + row_tiles * components + component_tiles * 2 * rows

    # For z one tile of rows and three of components, which are three parts; for the components five of components and
    # one of rows, which is one part. A part is written, read, and written as the gradient.
    of_z, of_components = rows * dims, (2 * dims + 1) * components
    tickets = 4 * 3
    assert traffic.launches == 2
    assert traffic.loaded == 4 * (of_pairs(1, 3) + of_pairs(1, 5) + 3 * of_z + of_components) + tickets
    assert traffic.stored == 4 * (4 * of_z + 2 * of_components) + tickets + 4


# --------------------------------------------------------------------------------------------------------------- errors

Z, MU = torch.zeros(2, 3), torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], MU, MU), TypeError, "z must be a torch.Tensor, got list"),
        ((Z.int(), MU, MU), TypeError, "z must be float16, bfloat16, float32 or float64, got torch.int32"),
        ((Z[0, 0], MU, MU), ValueError, r"z must have shape \[..., K\] with K at least 1, got \[\]"),
        ((Z[:, :0], MU[:, :0], MU[:, :0]), ValueError, r"z must have shape .* got \[2, 0\]"),
        ((Z, MU[:, :2], MU[:, :2]), ValueError, r"mu must have shape \[N, 3\], .* got \[4, 2\]"),
        ((Z, MU[:0], MU[:0]), ValueError, r"mu must have shape \[N, 3\], N at least 1 .* got \[0, 3\]"),
        ((Z, MU, MU[:3]), ValueError, r"logvar must have the shape of mu, \[4, 3\], got \[3, 3\]"),
        ((Z, MU, MU.half()), TypeError, "logvar must have the dtype of mu, torch.float32, got torch.float16"),
        ((Z, MU, MU, MU), ValueError, r"log_weights must have shape \[4\], got \[4, 3\]"),
        ((Z, MU, MU, MU[:, 0].long()), TypeError, "log_weights must be float16, .* got torch.int64"),
        ((Z, MU.to("meta"), MU.to("meta")), ValueError, "mu must be on the device of z, cpu, got meta"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        F.gaussian_mixture_log_prob(*arguments)


def test_the_module():
    tensors = draw(3, 4, 2)
    assert torch.equal(fastvae.nn.GaussianMixtureLogProb()(*tensors), F.gaussian_mixture_log_prob(*tensors))
