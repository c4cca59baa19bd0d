"""torch.compile: whole graphs, fresh noise, right gradients, no needless recompilation; and the registered operations
it sees.
"""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fastvae
import fastvae.functional as F
from fastvae import nn
from fastvae.likelihoods import Bernoulli

# Inductor's partitioner and its elimination of common subexpressions, without its slow code generation.
PARTITIONED = "aot_eager_decomp_partition"


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["triton", "reference"])
def backend(request):
    with fastvae.use_backend(request.param):
        yield request.param


def inputs(device, batch=6):
    moments = torch.randn(batch, 8, device=device, requires_grad=True)
    logits = torch.randn(batch, 1, 5, 5, device=device, requires_grad=True)
    return moments, logits, torch.rand(batch, 1, 5, 5, device=device)


# name: a function of (moments, logits, target, scalar, eps) made of one public function, returning tensors.
FUNCTIONS = {
    "gaussian_sample": lambda m, l, t, s, eps: F.gaussian_sample(*m.chunk(2, 1), eps=eps),
    "gaussian_kl": lambda m, l, t, s, eps: F.gaussian_kl(*m.chunk(2, 1)),
    "gaussian_kl none": lambda m, l, t, s, eps: F.gaussian_kl(*m.chunk(2, 1), reduction="none"),
    "gaussian_sample_kl": lambda m, l, t, s, eps: F.gaussian_sample_kl(*m.chunk(2, 1), eps=eps),
    "gaussian_sample_kl_packed": lambda m, l, t, s, eps: F.gaussian_sample_kl_packed(m, eps=eps),
    "sigmoid_mse_loss": lambda m, l, t, s, eps: F.sigmoid_mse_loss(l, t, reduction="none"),
    "elbo_loss": lambda m, l, t, s, eps: F.elbo_loss(l, t, m.sum(1), beta=s, reconstruction_weight=2 * s),
    "elbo_value_and_grad": lambda m, l, t, s, eps: F.elbo_value_and_grad(l, t, m.sum(1), beta=s, grad_scale=s)[0],
}


def flat(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


def value_and_gradients(function, arguments):
    outputs = flat(function(*arguments))
    leaves = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
    differentiable = [o.sum() for o in outputs if o.requires_grad]
    gradients = torch.autograd.grad(sum(differentiable), leaves, allow_unused=True) if differentiable else []
    return [*outputs, *gradients]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_compiles_whole_and_is_the_same(name, backend, device):
    arguments = (*inputs(device), 0.3, torch.randn(6, 4, device=device))
    expected = value_and_gradients(FUNCTIONS[name], arguments)
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, backend=PARTITIONED)
    for actual, wanted in zip(value_and_gradients(compiled, arguments), expected, strict=True):
        assert (actual is None) == (wanted is None)
        if wanted is not None:
            assert actual.stride() == wanted.stride()
            torch.testing.assert_close(actual, wanted)


@pytest.mark.slow
def test_inductor_compiles_a_training_step(backend, device):
    def step(moments, logits, target, beta, eps):
        z, kl = F.gaussian_sample_kl_packed(moments, eps=eps)
        return F.elbo_loss(logits, target, kl, beta=beta).loss + z.square().sum()

    arguments = (*inputs(device), 0.3, torch.randn(6, 4, device=device))
    expected = value_and_gradients(step, arguments)
    actual = value_and_gradients(torch.compile(step, fullgraph=True), arguments)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_compiled_strides_are_those_of_eager(memory_format, backend, device):
    moments = torch.randn(2, 6, 4, 5, device=device).to(memory_format=memory_format).requires_grad_()
    eps = torch.randn(2, 3, 4, 5, device=device)

    def function(moments):
        return F.gaussian_sample_kl_packed(moments * 1, eps=eps)

    for a, e in zip(
        value_and_gradients(torch.compile(function, fullgraph=True, backend=PARTITIONED), (moments,)),
        value_and_gradients(function, (moments,)),
        strict=True,
    ):
        assert a.stride() == e.stride()
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("name", ["triton", "reference"])
def test_the_context_manager_traces_inside_a_compiled_function(name, device):
    moments = torch.randn(6, 8, device=device)
    operations = []

    def record(graph, example_inputs):
        operations.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    def function(moments):
        with fastvae.use_backend(name):
            return F.gaussian_kl(*moments.chunk(2, 1))

    with fastvae.use_backend("reference"):
        torch.compile(function, fullgraph=True, backend=record)(moments)
        assert fastvae.backend_for(torch.empty(1)).name == "reference", "the choice must end with the block"
    assert any("fastvae" in operation for operation in operations) == (name == "triton")


def test_changing_the_backend_recompiles(device):
    moments = torch.randn(6, 8, device=device)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda m: F.gaussian_kl(*m.chunk(2, 1)), fullgraph=True, backend=counter)
    for name in ("reference", "triton", "reference", "triton"):
        with fastvae.use_backend(name):
            compiled(moments)
    assert counter.frame_count == 2


@pytest.mark.parametrize("grad", [True, False])
def test_two_samples_of_the_same_inputs_differ(grad, backend, device):
    mu, logvar = torch.zeros(6, 8, device=device, requires_grad=grad).chunk(2, 1)

    @torch.compile(fullgraph=True, backend=PARTITIONED)
    def twice(mu, logvar):
        return F.gaussian_sample(mu, logvar), F.gaussian_sample(mu, logvar)

    first, second = twice(mu, logvar)
    third, _ = twice(mu, logvar)
    assert (first != second).any() and (first != third).any()


def test_compiled_noise_follows_the_seed(backend, device):
    moments = torch.randn(6, 8, device=device)
    sample = torch.compile(lambda m: F.gaussian_sample_kl_packed(m)[0], fullgraph=True, backend=PARTITIONED)
    torch.manual_seed(1)
    first = sample(moments)
    torch.manual_seed(1)
    assert torch.equal(sample(moments), first)


def test_backward_regenerates_the_noise_of_the_compiled_forward(backend, device):
    """For the loss sin(z) z with mu = logvar = 0: d loss / d mu is sin(z) + z cos(z), and d loss / d logvar that
    times z / 2.
    """
    moments = torch.zeros(6, 8, device=device, requires_grad=True)

    @torch.compile(fullgraph=True, backend=PARTITIONED)
    def function(moments):
        z, _ = F.gaussian_sample_kl_packed(moments)
        return (z.sin() * z).sum(), z

    check_gradient(function, moments)


@pytest.mark.parametrize("compiler", [PARTITIONED, pytest.param("inductor", marks=pytest.mark.slow)])
def test_gradients_through_a_compiled_checkpoint(compiler, backend, device):
    """The sampled z must not leave the checkpoint with other noise than its recomputation draws."""
    moments = torch.zeros(6, 8, device=device, requires_grad=True)

    def block(moments):
        z, _ = F.gaussian_sample_kl_packed(moments)
        return z.sin() * z, z

    @torch.compile(fullgraph=True, backend=compiler)
    def function(moments):
        terms, z = checkpoint(block, moments, use_reentrant=False)
        return terms.sum(), z

    check_gradient(function, moments)


def check_gradient(function, moments):
    loss, z = function(moments)
    (gradient,) = torch.autograd.grad(loss, moments)
    z = z.detach()
    slope = z.sin() + z * z.cos()
    torch.testing.assert_close(gradient, torch.cat((slope, 0.5 * slope * z), 1))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_batch_size_and_scalars_recompile_once_each(name, backend, device):
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, backend=counter)
    frames = []
    for batch, scalar in ((6, 0.1), (7, 0.1), (7, 0.2), (8, 0.3), (9, 0.4), (11, 0.5)):
        compiled(*inputs(device, batch), scalar, torch.randn(batch, 4, device=device))
        frames.append(counter.frame_count)
    assert frames[-1] == frames[2], f"graphs after each call: {frames}"
    assert frames[2] <= 3


@pytest.mark.parametrize("name", ["gaussian_kl", "gaussian_sample", "sigmoid_mse_loss"])
def test_one_tensor_given_twice(name, backend, device):
    function = {
        "gaussian_kl": lambda x, eps: F.gaussian_kl(x, x),
        "gaussian_sample": lambda x, eps: F.gaussian_sample(x, x, eps=eps),
        "sigmoid_mse_loss": lambda x, eps: F.sigmoid_mse_loss(x, x),
    }[name]
    arguments = torch.randn(6, 4, device=device, requires_grad=True), torch.randn(6, 4, device=device)
    expected = value_and_gradients(function, arguments)
    actual = value_and_gradients(torch.compile(function, fullgraph=True, backend=PARTITIONED), arguments)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_a_registered_operation_alone_has_no_gradient(device):
    from fastvae.autograd import gaussian  # noqa: F401 - registers

    mu = torch.randn(6, 4, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"gaussian_kl was differentiated without its autograd\.Function"):
        torch.ops.fastvae.gaussian_kl(mu, mu, "sum", 0.0).backward()


def test_make_fx_sees_the_operation(device, triton_backend):
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(lambda mu, logvar: F.gaussian_kl(mu, logvar))(*torch.randn(2, 6, 4, device=device))
    assert any("fastvae" in str(node.target) for node in graph.graph.nodes)
    F.gaussian_kl(*torch.randn(2, 6, 4, device=device))  # the launch that the fixture asks for


def test_compiled_calls_keep_no_ticket(device, triton_backend):
    """CUDA graphs of torch.compile allocate from a pool in which nothing may stay."""
    from fastvae.kernels import launch

    launch._tickets.clear()
    logits = torch.randn(4, 3000, device=device)
    compiled = torch.compile(lambda x: F.sigmoid_mse_loss(x, x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits), F.sigmoid_mse_loss(logits, logits))
    launch._tickets.clear()
    compiled(logits)
    assert not launch._tickets


def test_modules_compile_whole(backend, device):
    moments, logits, target = inputs(device)
    model = torch.nn.ModuleList([nn.GaussianSamplingKL(), nn.ELBOLoss(beta=0.5)])

    @torch.compile(fullgraph=True, backend=PARTITIONED)
    def function(moments, logits, target):
        z, kl = model[0](moments)
        return model[1](logits, target, kl).loss + z.sum()

    function(moments, logits, target).backward()
    assert moments.grad.isfinite().all() and logits.grad.isfinite().all()


def registered_calls(device):
    """A call of each registered operation, with strides and optional arguments in use."""
    from fastvae.autograd import elbo, gaussian, likelihood  # noqa: F401 - registers

    moments, logits, target = (t.detach() for t in inputs(device))
    image = torch.randn(2, 6, 4, 5, device=device).to(memory_format=torch.channels_last)
    mu, logvar = moments.chunk(2, 1)
    transposed = torch.randn(4, 6, device=device).t()
    seed, offset = torch.tensor(123, device=device), torch.tensor(8, device=device)
    eps, kl, one = torch.randn(6, 4, device=device), torch.rand(6, device=device), torch.ones((), device=device)
    key = Bernoulli().key
    drawn, given = (None, seed, offset, 0, 0, 3), (eps, None, None, 0, 0, 0)
    return {
        "gaussian_sample": [(mu, logvar, *drawn), (transposed, logvar, *given)],
        "gaussian_kl": [
            (mu, logvar, "none", 0.0),
            (transposed, logvar, "mean", 0.0),
            (transposed, logvar, "per_dimension", 0.5),
        ],
        "gaussian_sample_kl": [
            (moments, None, 1, "none", 0.0, *drawn),
            (image, None, 1, "sum", 0.0, *drawn),
            (image, None, 1, "per_dimension", 0.0, *drawn),
            (mu, logvar, 1, "none", 0.0, *given),
        ],
        "gaussian_backward": [
            (moments, None, moments.stride(), 1, "none", 0.0, eps, kl, None, True, False, *drawn),
            (image, None, image.stride(), 1, "sum", 0.0, None, one, None, True, False, *drawn),
            (transposed, logvar, transposed.stride(), 1, "none", 0.0, eps, None, None, True, True, *given),
            (mu, logvar, mu.stride(), 1, "none", 0.0, eps, kl, None, False, True, *drawn),
            (moments, None, moments.stride(), 1, "per_dimension", 0.5, eps, kl[:4], kl[:4], True, False, *drawn),
            (mu, logvar, mu.stride(), 1, "per_dimension", 0.0, None, kl[:4], None, False, True, *drawn),
        ],
        "negative_log_likelihood": [(key, (logits, target), "none"), (key, (image, image.contiguous()), "mean")],
        "negative_log_likelihood_backward": [
            (key, (logits, target), kl, "none", (True, True)),
            (key, (image, image.contiguous()), one, "mean", (False, True)),
        ],
        "elbo_loss": [(key, (logits, target), kl, one, one)],
        "elbo_value_and_grad": [
            (key, (logits, target), kl, one, one, None),
            (key, (logits, target.to(torch.bfloat16)), kl, one, one, one),
        ],
        "elbo_backward": [
            (key, (logits, target), kl, one, None, None, one, one, (True, True), True),
            (key, (logits, target), kl, None, one, one, one, one, (False, False), True),
        ],
    }


@pytest.mark.parametrize(
    "name",
    [
        "gaussian_sample", "gaussian_kl", "gaussian_sample_kl", "gaussian_backward", "negative_log_likelihood",
        "negative_log_likelihood_backward", "elbo_loss", "elbo_value_and_grad", "elbo_backward",
    ],
)  # fmt: skip
def test_opcheck(name, device, triton_backend):
    calls = registered_calls(device)[name]
    for arguments in calls:
        torch.library.opcheck(getattr(torch.ops.fastvae, name).default, arguments)


def test_every_registered_operation_is_checked(device):
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastvae::")}
    assert names == {f"fastvae::{name}" for name in registered_calls(device)}
