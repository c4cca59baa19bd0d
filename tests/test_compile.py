"""torch.compile: whole graphs, fresh noise, right gradients, no needless recompilation; and the registered operations
it sees.
"""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastvae
import fastvae.functional as F
from contract import runs_always
from fastvae import nn
from fastvae.autograd import registration
from fastvae.operations import PAIRWISE, Spec, flattened, named, of_each_kind, operations

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


# Without those of long rows, which differ in the kernels that are launched.
OPERATIONS = named(it for it in of_each_kind(operations()) if not it.long_rows)
# Those of a likelihood of each shape always, the others with --slow.
NAMES = [pytest.param(name, marks=() if runs_always(it) else pytest.mark.slow) for name, it in OPERATIONS.items()]
COMPUTING = [it for it in NAMES if OPERATIONS[it.values[0]].computes]


def of_list(operation):
    """A function of the operation's tensors, a number, and the noise."""

    def function(tensors, scalar, eps):
        options = {"eps": eps} if operation.draws_noise else {}
        if "beta" in operation.options:
            options["beta"] = scalar
        return operation(F, *tensors, **options)

    return function


def arguments(operation, device, batch=6, scalar=0.3):
    shape = (batch, 4) if operation.likelihood is None else (batch, 1, 5, 5)
    eps = torch.randn(operation.shape_of_z(shape), device=device)
    return operation.inputs(Spec(shape, device=device)), scalar, eps


def value_and_gradients(function, arguments):
    outputs = flattened(function(*arguments))
    leaves = [a for a in pytree.tree_leaves(arguments) if isinstance(a, torch.Tensor) and a.requires_grad]
    roots = [output for output in outputs if output.requires_grad]
    upstream = list(map(torch.ones_like, roots))
    gradients = torch.autograd.grad(roots, leaves, upstream, allow_unused=True) if roots else []
    return [*outputs, *gradients]


@pytest.mark.parametrize("name", NAMES)
def test_every_operation_compiles_whole_and_is_the_same(name, backend, device):
    function, given = of_list(OPERATIONS[name]), arguments(OPERATIONS[name], device)
    expected = value_and_gradients(function, given)
    compiled = torch.compile(function, fullgraph=True, backend=PARTITIONED)
    for actual, wanted in zip(value_and_gradients(compiled, given), expected, strict=True):
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


@pytest.mark.parametrize("name", COMPUTING)
def test_batch_size_and_scalars_recompile_once_each(name, backend, device):
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(of_list(OPERATIONS[name]), fullgraph=True, backend=counter)
    frames = []
    for batch, scalar in ((6, 0.1), (7, 0.1), (7, 0.2), (8, 0.3), (9, 0.4), (11, 0.5)):
        compiled(*arguments(OPERATIONS[name], device, batch, scalar))
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
    with pytest.raises(RuntimeError, match=r"gaussian was differentiated without its autograd\.Function"):
        torch.ops.fastvae.gaussian(False, True, 1, "sum", 0.0, mu, mu, None, None, None, 0, 0, 0)[0].backward()


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


class Registered(TorchDispatchMode):
    """Keeps the calls of registered operations, and makes fastvae call them in place of the launchers."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __enter__(self):
        self.before, registration._is_mode_of_a_trace = registration._is_mode_of_a_trace, lambda: True
        return super().__enter__()

    def __exit__(self, *error):
        registration._is_mode_of_a_trace = self.before
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastvae":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


def registered_calls(operation, device):
    """The calls that an operation makes: of dense tensors, and of transposed ones without their first gradient."""
    shape = (4, 6) if operation.likelihood is None else (4, 1, 3, 2)
    with Registered() as registered:
        for layout in (torch.Tensor.contiguous, lambda x: x.transpose(0, -1).contiguous().transpose(0, -1)):
            tensors = operation.inputs(Spec(shape, layout=layout, device=device))
            if layout is not torch.Tensor.contiguous:
                tensors = [t.detach().requires_grad_(t.requires_grad and i > 0) for i, t in enumerate(tensors)]
            roots = [it for it in operation(F, *tensors)[: operation.roots] if it.requires_grad]
            if roots:
                torch.autograd.grad(roots, [t for t in tensors if t.requires_grad], list(map(torch.ones_like, roots)))
    return registered.calls


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, device, triton_backend):
    calls = registered_calls(OPERATIONS[name], device)
    assert len(calls) >= len(OPERATIONS[name].directions)
    for function, args in calls:
        torch.library.opcheck(function, torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, args))


def test_every_registered_operation_is_checked(device, triton_backend):
    checked = {function.name() for it in OPERATIONS.values() for function, _ in registered_calls(it, device)}
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastvae::")}
    # Those of pairs and of samples, and the score of a sample, are checked by their own tests.
    elsewhere = tuple(f"fastvae::{name}" for name in (*PAIRWISE, "general_score"))
    assert checked == {name for name in registered if not name.startswith(elsewhere)}
