"""The divergence in three parts, against its definition in float64, on both paths."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastvae
import fastvae.functional as F
from bounds import assert_within
from fastvae.kernels import decomposition as kernels
from fastvae.reference import mixture
from fastvae.reference import total_correlation as reference
from pairs import LOG_2PI, levels, pair_terms
from test_mixture import peak_memory

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from traffic import metered

pytestmark = pytest.mark.usefixtures("on_the_device")

NAMES = ("z", "mu", "logvar")
WEIGHTINGS = ("minibatch", "stratified")


def blocks(monkeypatch, size=20, pairs=50, terms=150) -> None:
    """The path of the CPU takes blocks of a few pairs, with a rest."""
    monkeypatch.setattr(reference, "_AT_ONCE", 0)
    monkeypatch.setattr(mixture, "block_size", lambda: size)
    monkeypatch.setattr(mixture, "_PAIRS", pairs)
    monkeypatch.setattr(reference, "_TERMS", terms)


@pytest.fixture(params=["triton", "blocks", "at once"])
def backend(request, monkeypatch):
    """Both paths, and both forms of that of the CPU."""
    if request.param == "blocks":
        blocks(monkeypatch)
    path = "triton" if request.param == "triton" else "reference"
    with fastvae.use_backend(path):
        yield path


def draw(batch, dims, dtype=torch.float32, device=None) -> list[Tensor]:
    return [torch.randn(batch, dims, device=device).to(dtype).requires_grad_() for _ in NAMES]


def weight_matrix(batch: int, size: int, weighting: str) -> Tensor:
    """As the paper has it, row by row."""
    if weighting == "minibatch":
        return torch.full((batch, batch), 1 / (size * batch), dtype=torch.float64)
    m = batch - 1
    weights = torch.full((batch, batch), 1 / m, dtype=torch.float64)
    for i in range(batch):
        weights[i, i] = 1 / size
        weights[i, (i + 1) % batch] = (size - m) / (size * m)
    return weights


def naive(z, mu, logvar, size, weighting) -> tuple[Tensor, Tensor, Tensor]:
    """The numbers of each row, of all pairs at once."""
    log_w = weight_matrix(len(z), size, weighting).log()
    each = -0.5 * ((z[:, None] - mu) ** 2 * torch.exp(-logvar) + logvar + LOG_2PI)
    own = torch.stack([each[i, i].sum() for i in range(len(z))])
    joint = torch.logsumexp(log_w + each.sum(2), 1)
    marginals = torch.logsumexp(log_w[:, :, None] + each, 1).sum(1)
    return own - joint, joint - marginals, marginals + 0.5 * (z**2 + LOG_2PI).sum(1)


def upstream(batch: int) -> list[Tensor]:
    return [torch.linspace(-1, 2, batch), torch.linspace(3, -2, batch), torch.linspace(0.5, 1, batch)]


def run(tensors, size=100, weighting="minibatch", grads=None):
    """The numbers of each row, and the gradients of all tensors."""
    values = F.total_correlation(*tensors, size, weighting, reduction="none")
    grads = upstream(len(tensors[0])) if grads is None else grads
    return values, torch.autograd.grad(values, tensors, [grad.to(values[0].dtype) for grad in grads])


def check(tensors, size=100, weighting="minibatch") -> None:
    """Each number within the bound of its roundings, in units of the sum of absolute terms."""
    values, gradients = run(tensors, size, weighting)
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected = naive(*wide, size, weighting)
    g = [grad.double() for grad in upstream(len(wide[0]))]
    of_expected = torch.autograd.grad(expected, wide, g)

    z, mu, logvar = (tensor.detach() for tensor in wide)
    batch, dims = z.shape
    log_w = weight_matrix(batch, size, weighting).log()
    joint = pair_terms(z, mu, logvar, log_w)
    each = [pair_terms(z[:, k : k + 1], mu[:, k : k + 1], logvar[:, k : k + 1], log_w) for k in range(dims)]

    def of_log_sum(terms):
        below = terms.values.amax(1, keepdim=True) - terms.values
        p = torch.softmax(terms.values, 1)
        # A weight of 0 takes part in nothing, however far its term is.
        scale = torch.where(p == 0, 0.0, p * (terms.scale + below + 1)).sum(1)
        return p, scale + torch.logsumexp(terms.values, 1).abs() + log_w.abs().amax(1)

    p, of_joint = of_log_sum(joint)
    shares, of_marginals = zip(*map(of_log_sum, each), strict=True)
    of_weights = dims * log_w.abs().amax(1)
    of_own = joint.scale.diagonal()
    of_all = sum(of_marginals) + of_weights
    scales = of_own + of_joint, of_joint + of_all, of_all + 0.5 * z.square().sum(1)
    # A term: 14 roundings, see the kernel, and one for each dimension. A log-sum-exp: 7, and 6 for each tile. The
    # three numbers are sums over dimensions, and of at most 4 terms.
    k = 14 + dims + 7 + 6 * -(-batch // 32) + levels(batch) + levels(dims) + 4
    for name, value, wanted, scale in zip(values._fields, values, expected, scales, strict=True):
        assert_within(value, wanted, scale, k, name)

    of_information, of_correlation, of_dimensions = g
    of_pairs = (of_correlation - of_information).abs()[:, None] * p * (joint.scale + of_joint[:, None] + 1)
    of_pairs = torch.where(p == 0, 0.0, of_pairs) + torch.diag(of_information.abs())
    through = (of_dimensions - of_correlation).abs()[:, None]
    scales = [], [], []
    for terms, q, of_marginal in zip(each, shares, of_marginals, strict=True):
        w = of_pairs + torch.where(q == 0, 0.0, through * q * (terms.scale + of_marginal[:, None] + 1))
        r = torch.where(w == 0, 0.0, terms.r[:, :, 0])
        condition = 1 + logvar[:, len(scales[0])].abs()
        slope = w * (r * terms.factor[:, 0]).abs() * condition
        scales[0].append(slope.sum(1))
        scales[1].append(slope.sum(0))
        scales[2].append(0.5 * (w * (r.square() + 1) * condition).sum(0))
    of_z, of_mu, of_logvar = (torch.stack(scale, 1) for scale in scales)
    of_z = of_z + (of_dimensions[:, None] * z).abs()
    for name, gradient, wanted, scale in zip(NAMES, gradients, of_expected, (of_z, of_mu, of_logvar), strict=True):
        assert_within(gradient, wanted, scale, k + 6 + levels(batch), f"{name}_grad")


@pytest.mark.parametrize(
    ("batch", "dims", "weighting"),
    [(1, 3, "minibatch"), (2, 1, "stratified"), (2, 300, "minibatch"), (9, 5, "minibatch"), (35, 3, "stratified")],
)
def test_values_and_gradients(batch, dims, weighting, backend, monkeypatch):
    if dims == 300:  # else 75 steps on the interpreter
        for tile in ("_OF_VALUES", "_OF_ROWS", "_OF_POSTERIORS"):
            monkeypatch.setattr(kernels, tile, (2, 2, 64))
    check(draw(batch, dims), weighting=weighting)


def test_any_number_of_tiles(monkeypatch, triton_backend):
    monkeypatch.setattr(kernels, "_OF_VALUES", (2, 4, 2))
    monkeypatch.setattr(kernels, "_OF_ROWS", (2, 2, 2))
    monkeypatch.setattr(kernels, "_OF_POSTERIORS", (4, 2, 1))
    check(draw(5, 3, torch.bfloat16), weighting="stratified")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32_and_gradients_are_rounded_once(dtype, backend):
    tensors = draw(5, 3, dtype)
    values, gradients = run(tensors)
    assert {value.dtype for value in values} == {torch.float32} and {x.dtype for x in gradients} == {dtype}
    check(tensors)
    mixed = [tensors[0].detach().float().requires_grad_(), *tensors[1:]]
    assert [x.dtype for x in run(mixed)[1]] == [torch.float32, dtype, dtype]
    check(mixed)


@pytest.mark.parametrize("in_blocks", [True, False])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_float64_is_computed_in_float64(weighting, in_blocks, monkeypatch):
    if in_blocks:
        blocks(monkeypatch)
    tensors = draw(9, 4, torch.float64)
    values, gradients = run(tensors, 50, weighting)
    expected = naive(*tensors, 50, weighting)
    torch.testing.assert_close(tuple(values), expected)
    of_expected = torch.autograd.grad(expected, tensors, [g.double() for g in upstream(9)])
    torch.testing.assert_close(gradients, of_expected)
    assert F.total_correlation(tensors[0].float(), *tensors[1:], 50)[0].dtype is torch.float64


# ----------------------------------------------------------------------------------------------------------- identities


def test_the_weights_of_four_rows_of_ten():
    t = 1 / 3
    given = [[0.1, 0.7 / 3, t, t], [t, 0.1, 0.7 / 3, t], [t, t, 0.1, 0.7 / 3], [0.7 / 3, t, t, 0.1]]
    expected = torch.tensor(given, dtype=torch.float64)
    torch.testing.assert_close(weight_matrix(4, 10, "stratified"), expected)
    weights = reference.log_weights(4, 10, "stratified")
    torch.testing.assert_close(reference._weight_matrix(expected, weights).exp(), expected)


def test_equal_posteriors(backend):
    """The minibatch's weights have a bias, which is known then; the stratified ones have none."""
    batch, dims, size = 6, 3, 50
    mu, logvar = torch.randn(1, dims).repeat(batch, 1), torch.randn(1, dims).repeat(batch, 1)
    z = torch.randn(batch, dims)
    information, correlation, _ = F.total_correlation(z, mu, logvar, size)
    torch.testing.assert_close(information, torch.tensor(math.log(size)))
    torch.testing.assert_close(correlation, torch.tensor((dims - 1) * math.log(size)))
    information, correlation, dimensions = F.total_correlation(z, mu, logvar, size, "stratified")
    zero = torch.zeros(())
    torch.testing.assert_close(information, zero, rtol=0, atol=2e-6)
    torch.testing.assert_close(correlation, zero, rtol=0, atol=4e-6)
    posterior = torch.distributions.Normal(mu, torch.exp(logvar / 2))
    expected = (posterior.log_prob(z) - torch.distributions.Normal(0, 1).log_prob(z)).sum(1).mean()
    torch.testing.assert_close(dimensions, expected)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_parts_sum_to_the_divergence(weighting, backend):
    """Of a sample, with every weighting; and with weights of 1 the gradient is that of the divergence."""
    z, mu, logvar = tensors = draw(6, 4)
    total = sum(F.total_correlation(*tensors, 50, weighting))
    posterior, prior = torch.distributions.Normal(mu, torch.exp(logvar / 2)), torch.distributions.Normal(0, 1)
    expected = (posterior.log_prob(z) - prior.log_prob(z)).sum(1).mean()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(torch.autograd.grad(total, tensors), torch.autograd.grad(expected, tensors))


def test_stratified_estimates_of_all_minibatches_have_the_mean_of_the_data_set():
    """q(z) of the sample of one posterior, over all minibatches that hold it, in every order. The kernels' weights are
    compared with the paper's above.
    """
    size, batch, dims = 5, 3, 2
    z, mu, logvar = (x.detach() for x in draw(size, dims))
    normal = torch.distributions.Normal(mu, torch.exp(logvar / 2))
    found = torch.zeros(size)
    minibatches = list(itertools.permutations(range(size), batch))
    for rows in map(list, minibatches):
        information = F.total_correlation(z[rows], mu[rows], logvar[rows], size, "stratified", reduction="none")[0]
        found[rows] += torch.exp(normal.log_prob(z).sum(1)[rows] - information)
    density = torch.distributions.Normal(mu, torch.exp(logvar / 2)).log_prob(z[:, None]).sum(2).exp().mean(1)
    torch.testing.assert_close(found / (len(minibatches) * batch / size), density)


def test_a_minibatch_is_a_mixture(backend):
    """log q(z) is the log-density of the mixture of the batch's posteriors, with the weights of the minibatch."""
    z, mu, logvar = (x.detach() for x in draw(5, 3))
    information = F.total_correlation(z, mu, logvar, 40, reduction="none")[0]
    own = torch.distributions.Normal(mu, torch.exp(logvar / 2)).log_prob(z).sum(1)
    joint = F.gaussian_mixture_log_prob(z, mu, logvar, torch.full((5,), -math.log(40 * 5)))
    torch.testing.assert_close(own - information, joint)


def test_the_mean(backend):
    """Over the batch, with its gradients; also those of one part alone."""
    tensors = draw(5, 3)
    each, of_each = run(tensors, grads=[torch.full((5,), w / 5) for w in (1.0, 6.0, 0.5)])
    information, correlation, dimensions = means = F.total_correlation(*tensors, 100)
    torch.testing.assert_close(tuple(means), tuple(part.mean() for part in each))
    assert [part.shape for part in means] == [()] * 3
    loss = information + 6 * correlation + 0.5 * dimensions
    torch.testing.assert_close(torch.autograd.grad(loss, tensors), of_each)
    for k in range(3):
        grads = [torch.full((5,), 0.2 if k == own else 0.0) for own in range(3)]
        found = torch.autograd.grad(F.total_correlation(*tensors, 100)[k], tensors)
        torch.testing.assert_close(found, run(tensors, grads=grads)[1])
    means[0].data.zero_()  # the results are three tensors
    assert means[1] != 0 and means[2] != 0


# ------------------------------------------------------------------------------------------------------------- extremes


@pytest.mark.parametrize(("logvar", "shift"), [(-100.0, 0.0), (-89.0, 1e4), (100.0, 1e4)])
def test_extreme_variances_and_far_latents(logvar, shift, backend):
    """Samples next to their posteriors' means, of which two are equal."""
    mu = torch.tensor([[0.0, 1.0], [2.0**-9 * math.exp(min(logvar, 0.0) / 2), 1.0], [0.0, 1.0]]) + shift
    tensors = [mu.clone().requires_grad_(), mu.requires_grad_(), torch.full((3, 2), logvar).requires_grad_()]
    values, gradients = run(tensors, weighting="stratified")
    assert all(x.isfinite().all() for x in (*values, *gradients))
    check(tensors, weighting="stratified")


def test_a_posterior_that_is_too_far_for_a_square_has_no_part(backend):
    """Not even where the difference is infinite in units of its deviation."""
    z, mu, logvar = (x.detach() for x in draw(4, 3))
    z[2] = mu[2] = 1e18
    logvar[2] = -100.0
    check([x.requires_grad_() for x in (z, mu, logvar)])


def test_a_row_that_is_far_from_every_posterior(backend):
    """All its terms are -infinity: no gradient comes from them, and the other rows are as they were."""
    tensors = draw(4, 3)
    expected, of_expected = run(tensors)
    z = tensors[0].detach().clone()
    z[1] = 1e30
    values, gradients = run([z.requires_grad_(), *tensors[1:]])
    others = torch.arange(4) != 1
    for value, wanted in zip(values, expected, strict=True):
        assert value[1].isnan() and torch.equal(value[others], wanted[others])
    assert torch.equal(gradients[0][others], of_expected[0][others])
    torch.testing.assert_close(gradients[0][1], upstream(4)[2][1] * z[1].detach())
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_nan_stays_in_its_row(backend, monkeypatch):
    monkeypatch.setattr(kernels, "_OF_VALUES", (2, 4, 4))
    tensors = draw(5, 3)
    expected, of_expected = run(tensors)
    z = tensors[0].detach().clone()
    z[3, 1] = torch.nan
    values, gradients = run([z.requires_grad_(), *tensors[1:]])
    others = torch.arange(5) != 3
    for value, wanted in zip(values, expected, strict=True):
        assert value[3].isnan() and torch.equal(value[others], wanted[others])
    assert torch.equal(gradients[0][others], of_expected[0][others]) and gradients[0][3].isnan().all()


def test_nan_in_a_posterior_is_in_every_row(backend):
    z, mu, logvar = (x.detach() for x in draw(5, 2))
    for tensor in (mu, logvar):
        given = [x.clone() if x is tensor else x for x in (mu, logvar)]
        given[0 if tensor is mu else 1][4, 1] = torch.nan
        values = F.total_correlation(z, *given, 100, reduction="none")
        assert values[0].isnan().all() and values[1].isnan().all() and values[2].isnan().all()


# ------------------------------------------------------------------------------------------------- layouts and autograd


def test_any_strides(backend):
    """Read as they lie: sliced, transposed, expanded, negated."""
    z, mu, logvar = (x.detach() for x in draw(4, 3))
    expected = run([x.clone().requires_grad_() for x in (z, mu, logvar)])
    wide = torch.randn(4, 7)
    wide[:, 1:7:2] = z
    moved = [wide[:, 1:7:2], mu.t().contiguous().t(), torch.stack((logvar, logvar), 1)[:, 0]]
    found = run([x.requires_grad_() for x in moved])
    torch.testing.assert_close(tuple(found[0]), tuple(expected[0]), rtol=0, atol=0)
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0)
    row, negative = torch.randn(1, 3), torch.complex(mu, -mu).conj().imag
    found = F.total_correlation(z, negative, row.expand(4, 3), 9)
    torch.testing.assert_close(tuple(found), tuple(F.total_correlation(z, mu, row.repeat(4, 1), 9)), rtol=0, atol=0)
    assert negative.is_neg()


def test_upstream_gradients_of_any_layout(backend):
    tensors = draw(4, 3)
    grads = [torch.stack((grad, grad), 1)[:, 0] for grad in upstream(4)]
    grads[1] = torch.complex(grads[1], -grads[1]).conj().imag
    found, expected = run(tensors, grads=grads)[1], run(tensors)[1]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_launches_and_what_nobody_needs(triton_backend):
    tensors = draw(5, 3)
    before = triton_backend.count
    means = F.total_correlation(*tensors, 100, "stratified")
    assert triton_backend.count - before == 1
    loss = means[0] + 6 * means[1]
    expected = torch.autograd.grad(loss, tensors)
    assert triton_backend.count - before == 3
    for k, name in enumerate(NAMES):
        alone = [tensor.detach().requires_grad_(own == name) for own, tensor in zip(NAMES, tensors, strict=True)]
        means = F.total_correlation(*alone, 100, "stratified")
        before = triton_backend.count
        (gradient,) = torch.autograd.grad(means[0] + 6 * means[1], alone[k])
        assert triton_backend.count - before == 1 and torch.equal(gradient, expected[k])


def test_repeats_bit_by_bit(backend):
    tensors = draw(5, 3)
    first, again = run(tensors), run(tensors)
    assert all(map(torch.equal, (*first[0], *first[1]), (*again[0], *again[1])))


@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_a_gradient_of_a_gradient(reduction, backend):
    def second(tensors):
        parts = F.total_correlation(*tensors, 50, "stratified", reduction=reduction)
        loss = sum(part.square().sum() for part in parts[:2])
        first = torch.autograd.grad(loss, tensors, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), tensors)

    tensors = draw(3, 2)
    found = second(tensors)
    with fastvae.use_backend("reference"):
        expected = second([tensor.detach().double().requires_grad_() for tensor in tensors])
    torch.testing.assert_close(found, expected, check_dtype=False, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("in_blocks", [True, False])
def test_gradcheck(in_blocks, monkeypatch):
    if in_blocks:
        blocks(monkeypatch, 4, 6, 12)
    tensors = draw(3, 2, torch.float64)

    def function(*tensors):
        return tuple(F.total_correlation(*tensors, 20, "stratified", reduction="none"))

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


def test_transforms(backend):
    z, mu, logvar = (x.detach() for x in draw(3, 2))
    found = torch.func.grad(lambda z: F.total_correlation(z, mu, logvar, 50)[1])(z)
    (expected,) = torch.autograd.grad(F.total_correlation(z.requires_grad_(), mu, logvar, 50)[1], z)
    torch.testing.assert_close(found, expected)
    if backend == "triton":
        with pytest.raises(NotImplementedError, match="total_correlation does not run under"):
            torch.vmap(lambda z: F.total_correlation(z, mu, logvar, 50))(z.detach()[None])


def test_torch_compile(backend):
    """Once for any batch; on the reference path the weights are numbers of the graph."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager_decomp_partition")
    compiled = torch.compile(F.total_correlation, fullgraph=True, backend=counter, dynamic=backend == "triton")
    for batch in (3, 5) if backend == "triton" else (3,):
        tensors = draw(batch, 2)
        found = compiled(*tensors, 50, "stratified")
        expected = F.total_correlation(*tensors, 50, "stratified")
        torch.testing.assert_close(tuple(found), tuple(expected))
        of_found = torch.autograd.grad(found[0] + 6 * found[1], tensors)
        torch.testing.assert_close(of_found, torch.autograd.grad(expected[0] + 6 * expected[1], tensors))
    assert counter.frame_count == 1


def test_the_registered_operations():
    from fastvae.autograd import total_correlation  # noqa: F401 - registers

    operations = torch.ops.fastvae
    tensors = [x.detach() for x in draw(3, 2)]
    tests = ("test_schema", "test_faketensor")
    settings = (50, "stratified")
    torch.library.opcheck(operations.total_correlation.default, (*tensors, *settings, True), test_utils=tests)
    *_, joint, marginals = operations.total_correlation(*tensors, *settings, False)
    grads = [torch.ones(3), None, torch.ones(3)]
    arguments = (*tensors, joint, marginals, grads, *settings, [True, False, True])
    torch.library.opcheck(operations.total_correlation_backward.default, arguments, test_utils=tests)


# --------------------------------------------------------------------------------------------------------------- memory


def test_memory_on_the_cpu():
    """2048 rows of 10 dimensions: one tensor of all terms would have 168 MB, and one of all pairs 17."""
    tensors = draw(2048, 10, device="cpu")
    saved = []

    def step():
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            parts = F.total_correlation(*tensors, 60000, "stratified")
        torch.autograd.grad(parts[0] + 6 * parts[1] + parts[2], tensors)

    with fastvae.use_backend("reference"):
        most = peak_memory(step)
        # The meter can fail: it sees what the definition takes.
        weights = reference.log_weights(256, 60000, "stratified")
        of_formula = peak_memory(lambda: reference.formula(*(x.detach()[:256] for x in tensors), weights))
    assert most < 64e6
    elements = tensors[0].numel()
    assert sum({id(t): t.nbytes for t in saved}.values()) == 4 * (4 * elements + 2048) < 40 * elements
    assert of_formula > 256 * 256 * 10 * 4


def test_memory_of_the_kernels(monkeypatch):
    """What a call allocates, with its results, of launches that are recorded and not made."""
    allocated = []

    class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            if "empty" in function.__name__:
                allocated.append(result.nbytes)
            return result

    monkeypatch.setattr(kernels, "launch", lambda *arguments: None)
    tensors = [x.detach().bfloat16() for x in draw(2048, 10)]
    weights = reference.log_weights(2048, 60000, "stratified")
    with Allocations():
        *values, joint, marginals = kernels.total_correlation(*tensors, weights, True)
        kernels.total_correlation_backward(*tensors, joint, marginals, values, weights, (True,) * 3)
    # What is kept is 4 bytes an element; each gradient takes 2, and 4 for its sums.
    assert sum(allocated) == (4 + 3 * 6) * 2048 * 10 + 4 * 2048 + 4 * 3 + 4 * 3 * 2048 // 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="the meter is Triton's interpreter")
def test_bytes_that_the_kernels_move(monkeypatch, triton_backend):
    """What the kernels' docstrings say, of 3 tiles of 2 rows or posteriors, against 2 tiles of 4 of the others."""
    monkeypatch.setattr(kernels, "_OF_VALUES", (2, 4, 4))
    monkeypatch.setattr(kernels, "_OF_ROWS", (2, 4, 4))
    monkeypatch.setattr(kernels, "_OF_POSTERIORS", (4, 2, 4))
    batch, dims = 6, 3
    tensors = draw(batch, dims)
    z, posteriors, rows = 4 * batch * dims, 8 * batch * dims, 4 * batch
    with metered() as traffic:
        means = F.total_correlation(*tensors, 100)
    partial, tickets = 4 * 3 * 3, 4 * 3
    assert traffic.launches == 1
    assert traffic.loaded == 2 * (2 * z + 3 * posteriors) + z + posteriors + partial + tickets
    assert traffic.stored == rows + z + partial + 4 * 3 + tickets + 4
    with metered() as traffic:
        torch.autograd.grad(means[1], tensors)
    # Terms and slopes read a pair of tiles each. Of each pair of tiles, log q(z) and log q(z_k) are read once. The
    # upstream gradient is read once by a tile of rows, and the sums where there are some already.
    of_z = 2 * (2 * z + 3 * posteriors) + 2 * (rows + z) + rows + z + z
    of_posteriors = 2 * (3 * z + 2 * posteriors) + 3 * (rows + z) + 3 * rows + posteriors
    assert traffic.launches == 2
    assert traffic.loaded == of_z + of_posteriors
    assert traffic.stored == 2 * z + 2 * posteriors


# --------------------------------------------------------------------------------------------------------------- errors

Z = torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "message"),
    [
        (([1.0], Z, Z, 9), {}, TypeError, "z must be a torch.Tensor, got list"),
        ((Z.int(), Z, Z, 9), {}, TypeError, "z must be float16, bfloat16, float32 or float64, got torch.int32"),
        ((Z[0], Z, Z, 9), {}, ValueError, r"z must have shape \[B, K\] with B and K at least 1, got \[2\]"),
        ((Z[:0], Z[:0], Z[:0], 9), {}, ValueError, r"z must have shape .* got \[0, 2\]"),
        ((Z[:, :0], Z[:, :0], Z[:, :0], 9), {}, ValueError, r"z must have shape .* got \[3, 0\]"),
        ((Z, Z[:2], Z, 9), {}, ValueError, r"mu must have the shape of z, \[3, 2\], got \[2, 2\]"),
        ((Z, Z, Z[:2], 9), {}, ValueError, r"logvar must have the shape of mu, \[3, 2\], got \[2, 2\]"),
        ((Z, Z, Z.half(), 9), {}, TypeError, "logvar must have the dtype of mu, torch.float32, got torch.float16"),
        ((Z, Z.to("meta"), Z, 9), {}, ValueError, "mu must be on the device of z, cpu, got meta"),
        ((Z, Z, Z, 9.0), {}, TypeError, "dataset_size must be an integer, got float"),
        ((Z, Z, Z, torch.tensor(9)), {}, TypeError, "dataset_size must be an integer, got Tensor"),
        ((Z, Z, Z, 0), {}, ValueError, "dataset_size must be at least 1, got 0"),
        ((Z, Z, Z, 9, "mws"), {}, ValueError, "weighting must be one of minibatch, stratified, got 'mws'"),
        ((Z, Z, Z, 9), {"reduction": "sum"}, ValueError, "reduction must be one of batchmean, none, got 'sum'"),
        ((Z[:1], Z[:1], Z[:1], 9, "stratified"), {}, ValueError, "at least 2 rows and at most dataset_size, 9, got 1"),
        ((Z, Z, Z, 2, "stratified"), {}, ValueError, "at least 2 rows and at most dataset_size, 2, got 3"),
    ],
)
def test_errors(arguments, keywords, error, message):
    with pytest.raises(error, match=message):
        F.total_correlation(*arguments, **keywords)


def test_the_module():
    tensors = draw(3, 2)
    module = fastvae.nn.TotalCorrelation(50, "stratified", reduction="none")
    expected = F.total_correlation(*tensors, 50, "stratified", reduction="none")
    assert all(map(torch.equal, module(*tensors), expected))
    assert repr(module) == "TotalCorrelation(dataset_size=50, weighting='stratified', reduction='none')"
