"""What torch does around the operations changes no number: hooks of saved tensors, torch.func transforms (inside
torch.compile too), traces, fake tensors and tensors without memory.
"""

from __future__ import annotations

import io

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import fastvae
import fastvae.functional as F
from fastvae.operations import named, of_each_kind, operations

ROWS = (5, 3)


@pytest.fixture(params=["triton", "reference"])
def backend(request):
    with fastvae.use_backend(request.param):
        yield request.param


@pytest.fixture
def fused():
    with fastvae.use_backend("triton"):
        yield


# --- hooks of saved tensors ---------------------------------------------------------------------------------------

LAYOUTS = {
    "contiguous": lambda: torch.randn(2, 6, 4, 5),
    "channels_last": lambda: torch.randn(2, 6, 4, 5).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(2, 6, 5, 4).transpose(2, 3),
    "batch inside": lambda: torch.randn(6, 4, 5, 2).permute(3, 0, 1, 2),
    "expanded": lambda: torch.randn(2, 6, 1, 5).expand(2, 6, 4, 5),
    "a slice": lambda: torch.randn(2, 6, 4, 9)[..., :5],
}
SAMPLES = {
    "gaussian_sample": lambda m: F.gaussian_sample(m[:, :3], m[:, 3:]),
    "gaussian_sample of a part": lambda m: F.gaussian_sample(m[:, :3], m[:, 3:], batch_offset=1),
    "gaussian_sample_kl": lambda m: F.gaussian_sample_kl(m[:, :3], m[:, 3:])[0],
    "gaussian_sample_kl_packed": lambda m: F.gaussian_sample_kl_packed(m)[0],
    "per_dimension": lambda m: sum_of_both(F.gaussian_sample_kl_packed(m, reduction="per_dimension", free_bits=0.1)),
}
HOOKS = {
    "contiguous": (lambda t: t, lambda t: t.contiguous()),
    "other strides": (lambda t: t, lambda t: t.transpose(0, -1).contiguous().transpose(0, -1)),
    "copied": (lambda t: t.numpy().copy(), torch.from_numpy),
}


def sum_of_both(outputs):
    """z, with 0 times kl, so that the backward pass of both runs."""
    return outputs[0] + 0.0 * outputs[1].sum()


def assert_gradient_of_the_sample(z, moments, **options):
    """d z / d mu = 1 and d z / d logvar = (z - mu) / 2, whatever the noise was."""
    weight = torch.linspace(-1, 1, z.numel(), device=z.device).view(z.shape)
    (gradient,) = torch.autograd.grad((z * weight).sum(), moments, **options)
    mu = moments.detach()[:, :3]
    torch.testing.assert_close(gradient.detach(), torch.cat((weight, 0.5 * weight * (z.detach() - mu)), 1))


@pytest.mark.parametrize("hooks", HOOKS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operation", SAMPLES)
def test_saved_tensors_may_come_back_with_other_strides(operation, layout, hooks, backend):
    moments = LAYOUTS[layout]().requires_grad_()
    pack, unpack = HOOKS[hooks]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: pack(t.detach()), unpack):
        z = SAMPLES[operation](moments)
    assert_gradient_of_the_sample(z, moments, create_graph=False, retain_graph=True)
    assert_gradient_of_the_sample(z, moments, create_graph=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_on_the_cpu(layout, fused):
    moments = LAYOUTS[layout]().requires_grad_()
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        z, _ = F.gaussian_sample_kl_packed(moments)
    assert_gradient_of_the_sample(z, moments)


def test_hooks_around_a_compiled_function(fused):
    torch._dynamo.reset()
    moments = LAYOUTS["channels_last"]().requires_grad_()
    sample = torch.compile(lambda m: F.gaussian_sample_kl_packed(m)[0], backend="aot_eager", fullgraph=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.contiguous()):
        z = sample(moments)
    assert_gradient_of_the_sample(z, moments)


def test_saved_images_may_come_back_with_other_strides(backend):
    logits = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    target = torch.rand(2, 3, 5, 4).transpose(2, 3).requires_grad_()
    kl = torch.rand(2, requires_grad=True)

    def loss():
        values = F.elbo_loss(logits, target, kl, beta=0.3)
        return values.loss + F.sigmoid_mse_loss(logits, target, reduction="mean")

    expected = torch.autograd.grad(loss(), (logits, target, kl))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.contiguous()):
        changed = loss()
    for actual, wanted in zip(torch.autograd.grad(changed, (logits, target, kl)), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


# --- torch.func ---------------------------------------------------------------------------------------------------

EPS, TARGET, MU = (torch.randn(ROWS, generator=torch.Generator().manual_seed(seed)) for seed in range(3))


def of_two(operation, **options):
    """The operation as a function of two tensors, both of which it differentiates."""

    def function(a, b):
        given = {
            "moments": lambda: torch.cat((a, b), 1),
            "prior": lambda: torch.cat((b, a), 1),
            "eps": lambda: EPS,
            "logvar": lambda: b,
            "prior_mu": lambda: b,
            "target": lambda: b,
            "kl": lambda: b.sum(1),
        }
        return operation(F, *[given.get(name, lambda: a)() for name in operation.arguments], **options)

    return function


LIST = [it for it in of_each_kind(operations()) if it.backward and (it.likelihood is None or "target" in it.gradients)]
DETERMINISTIC = {
    it.name: of_two(it, **({"eps": EPS.expand(it.shape_of_z(EPS.shape))} if it.draws_noise else {})) for it in LIST
}
OPERATIONS = {**DETERMINISTIC, "gaussian_sample drawn": of_two(named(LIST)["gaussian_sample"])}


def scalar(function):
    return lambda *arguments: sum(output.sin().sum() for output in function(*arguments))


@pytest.mark.parametrize(
    "name", ["gaussian_sample_kl", "gaussian_kl_free_bits", "sigmoid_mse_loss_target", "elbo_loss_target"]
)
def test_transforms_inside_a_compiled_function(name, fused):
    """One argument is what is differentiated, the other is made of it: an operation that torch.compile inlines without
    its backward pass would lose a gradient, and all of a second one.
    """
    first = torch.func.grad(scalar(lambda mu: OPERATIONS[name](mu, 0.5 * mu)))
    second = torch.func.grad(lambda mu: first(mu).sin().sum())
    for transformed in (first, second):
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(transformed, backend="eager")(MU), transformed(MU))


def test_a_pull_back_inside_a_compiled_function(fused):
    torch._dynamo.reset()
    pulled = lambda mu: torch.func.vjp(F.gaussian_kl, mu, mu)[1](torch.ones(()))[0]  # noqa: E731
    assert fastvae.backend_for(MU).name == "triton"
    torch.testing.assert_close(torch.compile(pulled, backend="aot_eager")(MU), MU / 5)


@pytest.mark.parametrize("which", ["both", "the second"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_pull_back_under_no_grad(name, which, fused):
    logvar = MU.flip(0)
    function = OPERATIONS[name] if which == "both" else lambda b: OPERATIONS[name](MU, b)
    outputs, pull = torch.func.vjp(function, *((MU, logvar) if which == "both" else (logvar,)))
    upstream = tuple(map(torch.ones_like, outputs))
    expected = pull(upstream)
    with torch.no_grad():
        actual = pull(upstream)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_what_has_its_gradient_is_not_transformed(backend):
    image, kl = torch.rand(2, 1, 4, 4), torch.rand(2)
    with pytest.raises(NotImplementedError, match="elbo_value_and_grad"):
        torch.func.grad(lambda image: F.elbo_value_and_grad(image, image, kl)[0].loss)(image)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_vmap_of_the_reference(name):
    """The specification is plain PyTorch, which is mapped as any; the fused path refuses, because it is batched."""
    mu, logvar = MU + torch.arange(3.0).view(3, 1, 1), MU * torch.arange(3.0).view(3, 1, 1)
    with fastvae.use_backend("reference"):
        mapped = torch.vmap(OPERATIONS[name])(mu, logvar)
        one_by_one = [OPERATIONS[name](a, b) for a, b in zip(mu, logvar, strict=True)]
    for actual, wanted in zip(mapped, zip(*one_by_one, strict=True), strict=True):
        torch.testing.assert_close(actual, torch.stack(wanted))


# --- tensors that a kernel cannot read -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATIONS)
def test_fake_tensors(name, fused):
    expected = OPERATIONS[name](MU, MU)
    with FakeTensorMode(allow_non_fake_inputs=True):
        leaves = [torch.randn(ROWS, requires_grad=True) for _ in range(2)]
        outputs = OPERATIONS[name](*leaves)
        real = OPERATIONS[name](MU, MU)  # in the mode, of tensors made outside of it
        scalar(lambda *outputs: outputs)(*outputs).backward()
    for fake, other, wanted in zip(outputs, real, expected, strict=True):
        assert fake.shape == other.shape == wanted.shape and fake.stride() == wanted.stride()
    assert all(leaf.grad.shape == ROWS for leaf in leaves)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_zero_tensors(name, fused):
    """Zeros that torch knows of without storing them."""
    zeros = torch._efficientzerotensor(ROWS)
    for actual, wanted in zip(OPERATIONS[name](zeros, MU), OPERATIONS[name](torch.zeros(ROWS), MU), strict=True):
        torch.testing.assert_close(actual, wanted)
    leaves = [MU.clone().requires_grad_(), MU.clone().requires_grad_()]
    outputs = OPERATIONS[name](*leaves)
    gradients = torch.autograd.grad(outputs, leaves, [torch._efficientzerotensor(o.shape) for o in outputs])
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize("name", OPERATIONS)
def test_subclasses_anywhere(name, fused):
    """In the second argument only, and in the upstream gradients only."""
    pair = TwoTensor(MU, MU.clone())
    assert all(isinstance(output, TwoTensor) for output in OPERATIONS[name](MU, pair))
    leaves = [MU.clone().requires_grad_(), MU.clone().requires_grad_()]
    outputs = OPERATIONS[name](*leaves)
    upstream = [TwoTensor(torch.ones_like(o), torch.ones_like(o)) for o in outputs]
    gradients = torch.autograd.grad(outputs, leaves, upstream, retain_graph=True)
    for gradient, wanted in zip(
        gradients, torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs]), strict=True
    ):
        torch.testing.assert_close(gradient.a, wanted)


def test_a_subclass_as_a_weight(fused):
    kl, beta = torch.rand(5), TwoTensor(torch.tensor(0.3), torch.tensor(0.3))
    values, _ = F.elbo_value_and_grad(MU, TARGET, kl, beta=beta, reconstruction_weight=2)
    wanted, _ = F.elbo_value_and_grad(MU, TARGET, kl, beta=0.3, reconstruction_weight=2)
    torch.testing.assert_close(values.loss.a, wanted.loss)


# --- torch.jit.trace ----------------------------------------------------------------------------------------------


class Posterior(torch.nn.Module):
    def forward(self, moments):
        return F.gaussian_sample_kl_packed(moments)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_saved_trace_draws_anew(backend):
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(Posterior(), torch.zeros(5, 6), check_trace=False), buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    moments = torch.cat((MU, 0.1 * MU), 1)
    first, second = loaded(moments), loaded(moments)
    torch.testing.assert_close(first[1], F.gaussian_kl(MU, 0.1 * MU, reduction="none"))
    assert (first[0] != second[0]).any()
