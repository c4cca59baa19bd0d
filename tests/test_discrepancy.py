"""The maximum mean discrepancy, against its definition in float64, on both paths."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastvae
import fastvae.functional as F
from bounds import assert_within
from fastvae.kernels import mean_discrepancy as kernels
from fastvae.reference import discrepancy as reference
from memory_meters import allocations, peak_memory
from pairs import pair_kernels

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from traffic import metered

pytestmark = pytest.mark.usefixtures("on_the_device")

SIDE = 16


@pytest.fixture(params=["triton", "reference"])
def backend(request, monkeypatch):
    """Both paths: that of the CPU in blocks of a few pairs, with a rest."""
    monkeypatch.setattr(reference, "block_size", lambda: SIDE**2)
    with fastvae.use_backend(request.param):
        yield request.param


@pytest.fixture
def tiles_of_4(monkeypatch):
    """Several tiles and parts of small sets."""
    monkeypatch.setattr(kernels, "_TILE", (4, 4))
    monkeypatch.setattr(kernels, "_TILE_OF_GRADIENTS", (4, 4))
    forget_plans(monkeypatch)


def forget_plans(monkeypatch) -> None:
    for name in ("plan_value", "plan_gradients"):
        monkeypatch.setattr(kernels, name, getattr(kernels, name).__wrapped__)


def draw(rows: int, prior_rows: int, dims: int, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    z, prior_z = 0.8 * torch.randn(rows, dims) + 0.3, torch.randn(prior_rows, dims)
    return z.to(dtype).requires_grad_(), prior_z.to(dtype).requires_grad_()


def run(tensors, *arguments, **named) -> tuple[Tensor, tuple[Tensor, ...]]:
    value = F.maximum_mean_discrepancy(*tensors, *arguments, **named)
    return value, torch.autograd.grad(value, tensors, torch.tensor(-1.7, dtype=value.dtype))


def definition(z: Tensor, prior_z: Tensor, kernel: str, scales, unbiased: bool) -> Tensor:
    """With all pairs at once, and with what each row has with itself."""

    def of_pairs(first, second):
        squares = (first[:, None] - second).square().sum(-1)
        each = [2 * z.shape[1] * scale for scale in scales]
        return sum(c / (c + squares) if kernel == "imq" else torch.exp(-squares / c) for c in each)

    def of_set(rows):
        k, n = of_pairs(rows, rows), len(rows)
        return (k - k.diag().diag()).sum() / (n * (n - 1)) if unbiased else k.mean()

    return of_set(z) + of_set(prior_z) - 2 * of_pairs(z, prior_z).mean()


def check(tensors, value, gradients, kernel="imq", scales=None, unbiased=True) -> None:
    """Each number within the bound of its roundings, in units of the sum of absolute terms."""
    scales = reference.SCALES[kernel] if scales is None else scales
    z, prior_z = (tensor.detach().double().requires_grad_() for tensor in tensors)
    n, m, dims = len(z), len(prior_z), z.shape[1]
    expected = definition(z, prior_z, kernel, scales, unbiased)
    of_expected = torch.autograd.grad(expected, (z, prior_z), torch.tensor(-1.7, dtype=torch.float64))

    own, prior, between = (pair_kernels(*pair, kernel, scales) for pair in ((z, z), (prior_z, prior_z), (z, prior_z)))
    less = 1 if unbiased else 0
    weights = 1 / (n * (n - less)), 1 / (m * (m - less)), 2 / (n * m)
    others = [k.scale.fill_diagonal_(0.0).sum() for k in (own, prior)]
    of_value = weights[0] * others[0] + weights[1] * others[1] + weights[2] * between.scale.sum()
    # A kernel: 10 roundings, one for each dimension and one for each scale. A program adds 1024 numbers of its few
    # tiles by levels, and a block of the CPU 256 in up to 40 steps.
    k = 10 + dims + len(scales)
    assert_within(value, expected, of_value, k + 40, "value")

    # A slope: 6 more. A sum: of 32 by levels, and of tiles one after the other; on the CPU all of a block are.
    adds = SIDE + -(-n // SIDE) + -(-m // SIDE)
    for name, own_z, other_z, slopes, cross, weight, wanted, found in (
        ("z", z, prior_z, own, between.scale_of_slopes, weights[0], of_expected[0], gradients[0]),
        ("prior_z", prior_z, z, prior, between.scale_of_slopes.T, weights[1], of_expected[1], gradients[1]),
    ):
        distances = [(own_z[:, None] - x).detach().abs() for x in (own_z, other_z)]
        scale = 4 * 1.7 * weight * (slopes.scale_of_slopes[..., None] * distances[0]).sum(1)
        scale += 2 * 1.7 * weights[2] * (cross[..., None] * distances[1]).sum(1)
        assert_within(found, wanted, scale, k + 6 + adds, f"{name}_grad")


@pytest.mark.parametrize(
    ("rows", "prior_rows", "dims", "kernel", "scales", "unbiased"),
    [
        (2, 2, 1, "imq", None, True),
        (1, 3, 1, "imq", None, False),
        (5, 33, 3, "rbf", None, True),
        (37, 20, 2, "imq", (0.7,), False),
        (33, 34, 5, "rbf", (0.1, 3.0, 20.0), False),
        (3, 2, 300, "imq", None, True),
    ],
)
def test_values_and_gradients(rows, prior_rows, dims, kernel, scales, unbiased, backend, monkeypatch):
    if dims == 300:  # else 75 steps on the interpreter
        monkeypatch.setattr(kernels, "_TILE", (32, 64))
        monkeypatch.setattr(kernels, "_TILE_OF_GRADIENTS", (16, 64))
        forget_plans(monkeypatch)
    tensors = draw(rows, prior_rows, dims)
    value, gradients = run(tensors, kernel, scales, unbiased=unbiased)
    assert value.shape == () and value.dtype is torch.float32
    check(tensors, value, gradients, kernel, scales, unbiased)


# An odd number of tiles, and an even one.
@pytest.mark.parametrize(("rows", "prior_rows", "programs"), [(9, 6, 1), (5, 6, 12), (5, 6, 256), (9, 6, 256)])
def test_any_number_of_tiles_and_parts(rows, prior_rows, programs, tiles_of_4, monkeypatch, triton_backend):
    monkeypatch.setattr("fastvae.kernels.mixture_log_prob._PROGRAMS", programs)
    tensors = draw(rows, prior_rows, 2, torch.bfloat16 if programs == 12 else torch.float32)
    value, gradients = run(tensors)
    check(tensors, value, gradients)


@pytest.mark.parametrize("dtypes", [(torch.float16,) * 2, (torch.bfloat16,) * 2, (torch.float32, torch.float16)])
def test_half_precision_is_computed_in_float32_and_gradients_are_rounded_once(dtypes, backend):
    tensors = [x.detach().to(dtype).requires_grad_() for x, dtype in zip(draw(6, 5, 3), dtypes, strict=True)]
    value, gradients = run(tensors)
    assert value.dtype is torch.float32 and tuple(gradient.dtype for gradient in gradients) == dtypes
    check(tensors, value, gradients)


@pytest.mark.parametrize("kernel", ["imq", "rbf"])
def test_float64_is_computed_in_float64(kernel, monkeypatch):
    monkeypatch.setattr(reference, "block_size", lambda: 3**2)
    z, prior_z = draw(7, 5, 3, torch.float64)
    found = run((z, prior_z), kernel)
    expected = definition(z, prior_z, kernel, reference.SCALES[kernel], True)
    torch.testing.assert_close(found[0], expected)
    torch.testing.assert_close(found[1], torch.autograd.grad(-1.7 * expected, (z, prior_z)))
    # one float64 among them is enough
    value, gradients = run((z.detach().float().requires_grad_(), prior_z), kernel)
    assert value.dtype is torch.float64 and gradients[0].dtype is torch.float32


# ----------------------------------------------------------------------------------------------------------- identities


def pythae(z: Tensor, prior_z: Tensor, kernel: str, bandwidth: float, scales) -> Tensor:
    """As `pythae.models.WAE_MMD` and `INFOVAE_MMD` have it (0.1.2)."""
    n, base = len(z), 2.0 * z.shape[1] * bandwidth**2

    def of_pairs(first, second):
        if kernel == "rbf":
            return torch.exp(-(torch.norm(first[:, None] - second[None], dim=-1) ** 2) / base)
        k = 0
        for scale in scales:
            k += scale * base / (scale * base + torch.norm(first[:, None] - second[None], dim=-1) ** 2)
        return k

    k_z, k_prior, k_cross = of_pairs(z, z), of_pairs(prior_z, prior_z), of_pairs(z, prior_z)
    own = (k_z - k_z.diag().diag()).sum() / ((n - 1) * n)
    return own + (k_prior - k_prior.diag().diag()).sum() / ((n - 1) * n) - 2 * k_cross.sum() / n**2


def test_the_numbers_of_other_libraries(backend):
    z, prior_z = draw(7, 7, 4)
    wide = z.detach().double(), prior_z.detach().double()
    of_wae = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # of the Wasserstein autoencoder's code, C = 2 K s for N(0, I)
    for mine, theirs in (
        (F.maximum_mean_discrepancy(z, prior_z), pythae(*wide, "imq", 1.0, of_wae)),
        (F.maximum_mean_discrepancy(z, prior_z, "rbf"), pythae(*wide, "rbf", 1.0, None)),
        (F.maximum_mean_discrepancy(z, prior_z, scales=(0.5 * 9, 2 * 9)), pythae(*wide, "imq", 3.0, (0.5, 2))),
    ):
        torch.testing.assert_close(mine, theirs, check_dtype=False, rtol=0, atol=4e-6)

    def mmd_vae(x: Tensor, y: Tensor) -> Tensor:
        """compute_mmd of the InfoVAE's code: means of exp(-mean_k d^2 / K)."""

        def mean(a, b):
            return torch.exp(-(a[:, None] - b).square().mean(-1) / a.shape[1]).mean()

        return mean(x, x) + mean(y, y) - 2 * mean(x, y)

    mine = F.maximum_mean_discrepancy(z, prior_z, "rbf", (4 / 2,), unbiased=False)
    torch.testing.assert_close(mine, mmd_vae(*wide), check_dtype=False, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kernel", ["imq", "rbf"])
def test_a_set_with_itself(kernel, backend):
    z, _ = draw(20, 2, 3)
    value = F.maximum_mean_discrepancy(z, z, kernel, unbiased=False)
    copy = z.detach().flip(0).requires_grad_()
    gradients = torch.autograd.grad(F.maximum_mean_discrepancy(z, copy, kernel, unbiased=False), (z, copy))
    terms = 4 * len(reference.SCALES[kernel])
    assert abs(value) <= terms * 2**-24 and all(gradient.abs().max() < terms * 2**-24 for gradient in gradients)
    # One row is all that is left of each set.
    row = z[:1]
    assert F.maximum_mean_discrepancy(row, row, kernel, unbiased=False).abs() <= terms * 2**-24
    value, gradients = run((row.detach().requires_grad_(), copy[:1].detach().requires_grad_()), kernel, unbiased=False)
    check((row, copy[:1]), value, gradients, kernel, unbiased=False)


def test_equal_rows_have_no_slope(backend):
    """And no distance: the sums are integers, which are weighted in float64."""
    row = torch.tensor([[0.25, -3.0, 1e4]])
    z, prior_z = row.repeat(5, 1).requires_grad_(), row.repeat(3, 1).requires_grad_()
    for kernel in ("imq", "rbf"):
        value, gradients = run((z, prior_z), kernel)
        assert value.abs() < 1e-12 and all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("kernel", ["imq", "rbf"])
def test_far_rows(kernel, backend):
    """Close to each other, far from 0; and so far from each other that the squared distance overflows."""
    tensors = [(x.detach() * 2**-6 + 1e4).requires_grad_() for x in draw(5, 6, 3)]
    check(tensors, *run(tensors, kernel, (1e-3,)), kernel, (1e-3,))
    z, prior_z = (x.detach().clone() for x in draw(6, 5, 3))
    z[0], z[1], z[2], prior_z[0] = 1e30, 3e38, -3e38, 1e18
    value, gradients = run((z.requires_grad_(), prior_z.requires_grad_()), kernel)
    check((z, prior_z), value, gradients, kernel)
    assert all((gradient == 0).all() for gradient in (gradients[0][:3], gradients[1][0]))


@pytest.mark.parametrize("of_prior", [False, True])
def test_nan_in_a_row_is_in_the_value(of_prior, tiles_of_4, backend):
    tensors = [x.detach().clone() for x in draw(6, 5, 3)]
    tensors[of_prior][4, 1] = torch.nan
    value, gradients = run([x.requires_grad_() for x in tensors])
    assert value.isnan() and gradients[of_prior][4].isnan().any()


# ------------------------------------------------------------------------------------------------- layouts and autograd


def test_any_strides(backend):
    """Read as they lie: transposed, sliced, expanded, negated."""
    z, prior_z = (x.detach() for x in draw(6, 5, 3))
    expected = run([x.clone().requires_grad_() for x in (z, prior_z)])
    wide = torch.randn(6, 7)
    wide[:, 1:7:2] = z
    moved = [wide[:, 1:7:2].requires_grad_(), prior_z.t().contiguous().t().requires_grad_()]
    torch.testing.assert_close(run(moved), expected, rtol=0, atol=0)
    row, negative = torch.randn(1, 3), torch.complex(prior_z, -prior_z).conj().imag
    found = F.maximum_mean_discrepancy(row.expand(4, 3), negative)
    assert torch.equal(found, F.maximum_mean_discrepancy(row.repeat(4, 1), prior_z)) and negative.is_neg()


def test_launches_and_what_nobody_needs(triton_backend, tiles_of_4):
    tensors = draw(5, 3, 3)
    before = triton_backend.count
    value = F.maximum_mean_discrepancy(*tensors)
    assert triton_backend.count - before == 1
    expected = torch.autograd.grad(value, tensors)
    assert triton_backend.count - before == 2
    for k in range(2):
        alone = [tensor.detach().requires_grad_(own == k) for own, tensor in enumerate(tensors)]
        value = F.maximum_mean_discrepancy(*alone)
        before = triton_backend.count
        (gradient,) = torch.autograd.grad(value, alone[k])
        assert triton_backend.count - before == 1
        torch.testing.assert_close(gradient, expected[k])


def test_work_of_the_prior_is_left_out(triton_backend, tiles_of_4):
    """z's gradient alone reads and stores less than half of what both take."""
    tensors = draw(4, 8, 2)
    with metered() as both:
        torch.autograd.grad(F.maximum_mean_discrepancy(*tensors), tensors)
    with metered() as of_z:
        torch.autograd.grad(F.maximum_mean_discrepancy(tensors[0], tensors[1].detach()), tensors[0])
    with metered() as of_value:
        F.maximum_mean_discrepancy(*tensors)
    assert of_z.loaded - of_value.loaded < (both.loaded - of_value.loaded) / 2


def test_the_same_bits_from_every_call(backend):
    tensors = draw(37, 20, 3)
    first, second = run(tensors), run(tensors)
    assert torch.equal(first[0], second[0]) and all(map(torch.equal, first[1], second[1]))


@pytest.mark.parametrize("unbiased", [True, False])
def test_a_gradient_of_a_gradient(unbiased, backend):
    tensors = draw(3, 4, 2)
    value = F.maximum_mean_discrepancy(*tensors, unbiased=unbiased)
    first = torch.autograd.grad(value.square(), tensors, create_graph=True)
    second = torch.autograd.grad(sum(gradient.square().sum() for gradient in first), tensors)
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    exact = definition(*wide, "imq", reference.SCALES["imq"], unbiased)
    of_exact = torch.autograd.grad(exact.square(), wide, create_graph=True)
    expected = torch.autograd.grad(sum(gradient.square().sum() for gradient in of_exact), wide)
    torch.testing.assert_close(second, expected, check_dtype=False, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", ["imq", "rbf"])
def test_gradcheck(kernel, monkeypatch):
    monkeypatch.setattr(reference, "block_size", lambda: 2**2)

    def function(z, prior_z):
        return F.maximum_mean_discrepancy(z, prior_z, kernel, (0.3, 2.0))

    tensors = draw(3, 4, 2, torch.float64)
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


def test_transforms(backend):
    z, prior_z = (x.detach() for x in draw(3, 4, 2))
    found = torch.func.grad(F.maximum_mean_discrepancy)(z, prior_z)
    wide = z.double().requires_grad_()
    exact = definition(wide, prior_z.double(), "imq", reference.SCALES["imq"], True)
    torch.testing.assert_close(found, torch.autograd.grad(exact, wide)[0].float())
    if backend == "triton":
        with pytest.raises(NotImplementedError, match="maximum_mean_discrepancy does not run under"):
            torch.vmap(lambda z: F.maximum_mean_discrepancy(z, prior_z))(z[None])


def test_torch_compile(backend):
    torch._dynamo.reset()
    tensors = draw(3, 4, 2)
    compiled = torch.compile(F.maximum_mean_discrepancy, fullgraph=True, backend="aot_eager_decomp_partition")
    value = compiled(*tensors, "rbf", (0.5, 2), unbiased=False)
    expected, of_expected = run(tensors, "rbf", (0.5, 2), unbiased=False)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, tensors, torch.tensor(-1.7)), of_expected)


def test_the_registered_operations():
    from fastvae.autograd import discrepancy  # noqa: F401 - registers

    tensors = [x.detach() for x in draw(3, 4, 2)]
    settings = "imq", [0.5, 0.1], True
    tests = ("test_schema", "test_faketensor")
    arguments = (*tensors, *settings)
    torch.library.opcheck(torch.ops.fastvae.maximum_mean_discrepancy.default, arguments, test_utils=tests)
    for needed in ([True, False], [True, True]):
        arguments = (*tensors, torch.ones(()), *settings, needed)
        torch.library.opcheck(torch.ops.fastvae.maximum_mean_discrepancy_backward.default, arguments, test_utils=tests)


# --------------------------------------------------------------------------------------------------------------- memory


def test_memory_on_the_cpu():
    """1024 rows of each: one tensor of all pairs would have 4 MB, and one of all differences 40."""
    tensors = draw(1024, 1024, 10)
    with fastvae.use_backend("reference"):
        most = peak_memory(lambda: run(tensors))
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            F.maximum_mean_discrepancy(*tensors)
        # The meter can fail: it sees what the definition takes.
        few = [x[:256] for x in tensors]
        with_formula = peak_memory(lambda: reference.formula(*few, "imq", (0.1,), True))
    assert most < 8 * 4 * reference.block_size() + 40 * tensors[0].numel() < 4 * 1024**2
    assert sum(tensor.numel() for tensor in saved) == sum(map(Tensor.numel, tensors))
    assert with_formula > 256 * 256 * 10 * 4


def test_memory_of_the_kernels(monkeypatch):
    """What a call allocates, its results among it, of launches that are recorded and not made."""
    monkeypatch.setattr(kernels, "launch", lambda *arguments: None)
    z, prior_z = (x.detach().bfloat16() for x in draw(2048, 2048, 10))
    settings = "imq", (0.1, 1.0), True
    with allocations() as allocated:
        value = kernels.mean_discrepancy(z, prior_z, *settings)
        kernels.mean_discrepancy_backward(z, prior_z, value, *settings, (True, False))
    # 64 tiles of rows, so four programs for each, of which each has sums of its own.
    assert (
        sum(allocated)
        < (4 * 4 + 2) * 2048 * 10
        + 4 * 4 * kernels.plan_value.__wrapped__(2048, 2048, 10, (10, 1, 10, 1), "imq", True)[1]
    )
    assert sum(allocated) < 40 * 2048 * 10


def test_bytes_that_the_kernels_move(triton_backend):
    """Each two tiles' rows, once for the value, twice for a gradient."""
    rows, prior_rows, dims = 20, 5, 3
    z, prior_z = draw(rows, prior_rows, dims)
    with metered() as traffic:
        value = F.maximum_mean_discrepancy(z, prior_z.detach())
    # Two tiles, so four programs, of which one has nothing left. Each has two sums, which are read once.
    pairs_of_tiles = 4 * dims * (2 * rows + 2 * prior_rows + rows + prior_rows)
    tickets = 4 * 4
    assert traffic.launches == 1
    assert traffic.loaded == pairs_of_tiles + 4 * 8 + tickets
    assert traffic.stored == 4 * 8 + 4 + tickets + 4
    with metered() as traffic:
        torch.autograd.grad(value, z)
    # Two tiles of 16 and 4 rows, each with all three, in three parts, which are written, read, and written as one.
    pairs_of_tiles = 2 * 4 * dims * (3 * rows + 2 * (rows + prior_rows))
    sums, tickets, upstream = 4 * rows * dims, 6 * 4, 6 * 4
    assert traffic.launches == 1
    assert traffic.loaded == pairs_of_tiles + 3 * sums + tickets + upstream
    assert traffic.stored == 4 * sums + tickets + 4


# --------------------------------------------------------------------------------------------------------------- errors

Z, PRIOR = torch.zeros(2, 3), torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0], PRIOR), TypeError, "z must be a torch.Tensor, got list"),
        ((Z.int(), PRIOR), TypeError, "z must be float16, bfloat16, float32 or float64, got torch.int32"),
        ((Z[0], PRIOR), ValueError, r"z must have shape \[n, K\], .* got \[3\]"),
        ((Z[:1], PRIOR), ValueError, r"z must have shape \[n, K\], n at least 2 with unbiased=True, .* got \[1, 3\]"),
        ((Z[:, :0], PRIOR[:, :0]), ValueError, r"K at least 1, got \[2, 0\]"),
        ((Z, PRIOR[:, :2]), ValueError, r"prior_z must have shape \[m, 3\], .* got \[4, 2\]"),
        ((Z, PRIOR[:1]), ValueError, r"prior_z must .* m at least 2 with unbiased=True .* got \[1, 3\]"),
        ((Z, PRIOR.long()), TypeError, "prior_z must be float16, .* got torch.int64"),
        ((Z, PRIOR.to("meta")), ValueError, "prior_z must be on the device of z, cpu, got meta"),
        ((Z, PRIOR, "laplace"), ValueError, "kernel must be one of imq, rbf, got 'laplace'"),
        ((Z, PRIOR, "imq", 1.0), TypeError, r"scales must be a sequence of numbers, such as \(1.0,\), got float"),
        ((Z, PRIOR, "imq", "1"), TypeError, "scales must be a sequence of numbers, .* got str"),
        ((Z, PRIOR, "imq", ()), ValueError, "scales must have at least one number, got none"),
        ((Z, PRIOR, "imq", (1.0, 0)), ValueError, r"scales\[1\] must be above 0, .* got 0.0"),
        ((Z, PRIOR, "rbf", [-1.0]), ValueError, r"scales\[0\] must be above 0, .* got -1.0"),
        ((Z, PRIOR, "rbf", [float("nan")]), ValueError, r"scales\[0\] must be above 0, .* got nan"),
        ((Z, PRIOR, "rbf", [1e38]), ValueError, r"scales\[0\] must be above 0, and 2 K scale a float32 between"),
        ((Z, PRIOR, "rbf", ["1"]), TypeError, r"scales\[0\] must be a number, got str"),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        F.maximum_mean_discrepancy(*arguments)


def test_no_rows():
    with pytest.raises(ValueError, match=r"n at least 1 with unbiased=False, .* got \[0, 3\]"):
        F.maximum_mean_discrepancy(Z[:0], PRIOR, unbiased=False)


def test_the_module():
    tensors = draw(3, 4, 2)
    module = fastvae.nn.MaximumMeanDiscrepancy("rbf", [0.5, 2], unbiased=False)
    assert torch.equal(module(*tensors), F.maximum_mean_discrepancy(*tensors, "rbf", (0.5, 2), unbiased=False))
    assert repr(module) == "MaximumMeanDiscrepancy(kernel='rbf', scales=(0.5, 2), unbiased=False)"
