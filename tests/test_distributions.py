"""The posterior as a torch distribution: against Independent(Normal) in float64, and the operations that it makes."""

from __future__ import annotations

import copy
import math
import pickle
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    Categorical,
    Distribution,
    ExpTransform,
    Independent,
    Laplace,
    MixtureSameFamily,
    Normal,
    TransformedDistribution,
    kl_divergence,
)
from torch.utils._python_dispatch import TorchDispatchMode

import fastvae
import fastvae.functional as F
from conftest import Launches
from fastvae import DiagonalGaussian
from test_launches import FREE

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def halves(*shape: int, dtype=torch.float64, device="cpu") -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(2, *shape, dtype=dtype, device=device).unbind())


# Each makes the distribution of (mu, logvar) [3, 4, 2, 6] from one tensor or two.
LAYOUTS = {
    "packed": lambda mu, logvar: DiagonalGaussian(torch.cat((mu, logvar), 1)),
    "packed along the last": lambda mu, logvar: DiagonalGaussian(torch.cat((mu, logvar), -1), dim=-1),
    "packed along another": lambda mu, logvar: DiagonalGaussian(torch.cat((mu, logvar), 2), 2),
    "channels_last": lambda mu, logvar: DiagonalGaussian(
        torch.cat((mu, logvar), 1).contiguous(memory_format=torch.channels_last)
    ),
    "two heads": lambda mu, logvar: DiagonalGaussian.from_mu_logvar(mu, logvar),
}


def peer(mu: Tensor, logvar: Tensor) -> Independent:
    return Independent(Normal(mu, torch.exp(0.5 * logvar)), mu.ndim - 1)


def standard_normal(event_shape, dtype=torch.float64) -> Independent:
    zeros = torch.zeros(event_shape, dtype=dtype)
    return Independent(Normal(zeros, torch.ones_like(zeros)), zeros.ndim)


# What is asked of a distribution and of its peer. Noise, values and the other distribution are the same in both.
QUESTIONS = {
    "mean": lambda q, value, other: q.mean,
    "mode": lambda q, value, other: q.mode,
    "stddev": lambda q, value, other: q.stddev,
    "variance": lambda q, value, other: q.variance,
    "entropy": lambda q, value, other: q.entropy(),
    "log_prob": lambda q, value, other: q.log_prob(value),
    "log_prob of several": lambda q, value, other: q.log_prob(torch.stack((value, -value, 2 * value))),
    "log_prob of one": lambda q, value, other: q.log_prob(value[0]),
    "kl to N(0, I)": lambda q, value, other: kl_divergence(q, standard_normal(q.event_shape)),
    "kl to another": lambda q, value, other: kl_divergence(q, other),
    "kl from another": lambda q, value, other: kl_divergence(other, q),
    "expanded": lambda q, value, other: q.expand((2, 3)).log_prob(value),
    "expanded kl": lambda q, value, other: kl_divergence(q.expand((2, 3)), other),
    "expanded mean": lambda q, value, other: q.expand((2, 3)).mean,
    "expanded entropy": lambda q, value, other: q.expand((2, 3)).entropy(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("question", QUESTIONS)
def test_values_and_gradients_are_those_of_independent_normals(question, layout) -> None:
    ask = QUESTIONS[question]
    inputs = [t.requires_grad_() for t in halves(3, 4, 2, 6)]
    value, other = torch.randn(3, 4, 2, 6, dtype=torch.float64), peer(*halves(3, 4, 2, 6))
    q, p = LAYOUTS[layout](*inputs), peer(*inputs)
    assert (q.batch_shape, q.event_shape) == (p.batch_shape, p.event_shape)
    actual, expected = ask(q, value, other), ask(p, value, other)
    # 1e-12 is 24 to 48 elements' roundings of float64, and the peer's exp and log there and back.
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(expected)
    gradients = [torch.autograd.grad(t, inputs, upstream, materialize_grads=True) for t in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sample_shape", [(), (5,), (2, 0), (2, 3)], ids=str)
@pytest.mark.parametrize("batch_shape", [(3,), (2, 3)], ids=str)
def test_samples_are_mu_plus_std_eps(batch_shape, sample_shape, layout) -> None:
    inputs = [t.requires_grad_() for t in halves(3, 4, 2, 6)]
    mu, logvar = inputs
    q = LAYOUTS[layout](mu, logvar).expand(batch_shape)
    eps = torch.randn(*sample_shape, *batch_shape, 4, 2, 6, dtype=torch.float64)
    z, expected = q.rsample(sample_shape, eps=eps), mu + torch.exp(0.5 * logvar) * eps
    torch.testing.assert_close(z, expected, rtol=1e-13, atol=1e-13)
    upstream = torch.randn_like(eps)
    gradients = [torch.autograd.grad(t, inputs, upstream) for t in (z, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [(layout, torch.float32) for layout in LAYOUTS] + [("packed", dtype) for dtype in DTYPES[1:]],
)
def test_sampling_and_divergence_are_the_operations(layout, backend, dtype, device) -> None:
    """Bit for bit, in their dtypes, with the default generator and with one of the caller's."""
    mu, logvar = halves(3, 4, 2, 6, dtype=dtype, device=device)
    q = LAYOUTS[layout](mu, logvar)
    before = Launches.count
    with fastvae.use_backend(backend):
        mu, logvar = q.mu, q.logvar  # in the memory order from which noise is drawn
        torch.manual_seed(1)
        z, sampled, (z_with, kl_with) = q.rsample(), q.sample(), q.rsample_with_kl()
        torch.manual_seed(1)
        for actual in (z, sampled, z_with):
            assert torch.equal(actual, F.gaussian_sample(mu, logvar))
        for kl in (q.kl(), kl_with):
            assert torch.equal(kl, F.gaussian_kl(mu, logvar, reduction="none"))
        draws = [torch.Generator(device).manual_seed(2) for _ in range(4)]
        expected = F.gaussian_sample(mu, logvar, generator=draws[0])
        assert torch.equal(q.rsample(generator=draws[1]), expected)
        assert torch.equal(q.sample(generator=draws[2]), expected)
        assert torch.equal(q.rsample_with_kl(generator=draws[3])[0], expected)
    assert (Launches.count > before) == (backend == "triton")
    assert z.dtype == q.mean.dtype == q.stddev.dtype == q.variance.dtype == dtype
    assert kl.dtype == q.log_prob(z).dtype == q.entropy().dtype == q.kl(q).dtype == torch.float32


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_expanded_and_repeated_samples_are_drawn_one_by_one(backend, device) -> None:
    """As samples of a larger batch: no noise is shared, and the gradients are their sum."""
    mu, logvar = (t.requires_grad_() for t in halves(1, 5, dtype=torch.float32, device=device))
    q = DiagonalGaussian.from_mu_logvar(mu, logvar)
    with fastvae.use_backend(backend):
        for draw in (lambda: q.expand((6,)).rsample((4,)), lambda: q.rsample((4, 6))[:, :, 0]):
            torch.manual_seed(1)
            z = draw()
            torch.manual_seed(1)
            expected = F.gaussian_sample(mu.expand(24, 5).contiguous(), logvar.expand(24, 5).contiguous())
            assert torch.equal(z, expected.view(4, 6, 5))
            assert len(z.detach().unique()) == z.numel()
            for gradient, summed in zip(
                torch.autograd.grad(z.sum(), (mu, logvar)),
                torch.autograd.grad(expected.sum(), (mu, logvar)),
                strict=True,
            ):
                torch.testing.assert_close(gradient, summed)
        z, kl = q.expand((6,)).rsample_with_kl()
        assert z.shape == (6, 5)
        assert torch.equal(kl, q.kl().expand(6))


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_extreme_logvar(backend, dtype, device) -> None:
    """Finite where twice the result in float64 is a number of float32: it is halved last. exp(logvar) and exp(-logvar)
    leave float32 at 88.
    """
    logvars = torch.tensor([-1e4, -300.0, -200.0, -110.0, -88.0, -1e-3, 0.0, 1e-3, 80.0, 110.0, 1e4])
    # From the smallest normal number on: Triton's interpreter reads smaller ones of bfloat16 as others.
    differences = torch.tensor([0.0, 2e-38, 1e-30, 1e-3, 1.0, 1e4])
    logvar, mu = torch.cartesian_prod(logvars, differences).to(device, dtype).unsqueeze(-1).unbind(1)
    mu.requires_grad_()
    logvar.requires_grad_()
    q = DiagonalGaussian.from_mu_logvar(mu, logvar)
    prior = DiagonalGaussian.from_mu_logvar(torch.zeros_like(mu), logvar.detach() - 1)
    with fastvae.use_backend(backend):
        results = {"log_prob": q.log_prob(torch.zeros_like(mu)), "kl": q.kl(), "kl to another": q.kl(prior)}
        gradients = {
            name: torch.autograd.grad(value.sum(), (mu, logvar), retain_graph=True) for name, value in results.items()
        }
    m, l = mu.detach().double().cpu(), logvar.detach().double().cpu()
    prior_l = prior.logvar.double().cpu()
    # In logarithms, because exp(2 log|d| - l) is in the range of float64 wherever it is in that of float32.
    ratio, prior_ratio = torch.exp(2 * m.abs().log() - l), torch.exp(2 * m.abs().log() - prior_l)
    expected = {
        "log_prob": -0.5 * (ratio + l + math.log(2 * math.pi)),
        "kl": 0.5 * (m.square() + torch.expm1(l) - l),
        "kl to another": 0.5 * (prior_ratio + torch.expm1(l - prior_l) - (l - prior_l)),
    }
    largest = torch.finfo(torch.float32).max
    for name, value in results.items():
        exact = expected[name].squeeze(1)
        representable = 2 * exact.abs() < largest
        assert representable.sum() > len(exact) / 2
        value = value.detach().double().cpu()
        assert not value.isnan().any(), name
        assert torch.equal(value.isinf(), ~representable), name
        # The argument of an exponential is rounded: its error is |logvar| ulps. (The two factors of 1 / std round it
        # four times, and their square twice as much.)
        allowed = 2.0**-24 * (16 + 8 * l.squeeze(1).abs()) * (exact.abs() + l.squeeze(1).abs() + 1)
        assert ((value - exact).abs() <= allowed)[representable].all(), name
        for gradient in gradients[name]:
            assert not gradient.squeeze(1).cpu()[representable].isnan().any(), name


def test_small_differences_keep_their_divergence() -> None:
    """The textbook formula with exp and logs loses all of it in float32."""
    mu, logvar = torch.zeros(4, 1), torch.tensor([[1e-2], [-1e-2], [3e-3], [-3e-3]])
    base = torch.full_like(mu, 0.5)
    q, p = DiagonalGaussian.from_mu_logvar(mu, base + logvar), DiagonalGaussian.from_mu_logvar(mu, base)
    difference = (q.logvar.double() - p.logvar.double()).squeeze(1)
    expected = 0.5 * (torch.expm1(difference) - difference)
    # expm1(x) - x loses log2(2 / x) of 24 bits.
    torch.testing.assert_close(q.kl(p).double(), expected, rtol=2.0**-24 * 4 / 3e-3, atol=0)


# --- what is run ------------------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Everything dispatched, views too."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))

    def computed(self) -> dict[str, int]:
        return {name: count for name, count in self.names.items() if name not in FREE}


@pytest.fixture(autouse=True)
def existing_ticket(device):
    """The counters of the kernels are made once per device, see test_launches."""
    from fastvae.kernels.launch import ticket, zero

    ticket(device)
    zero(device)


def test_nothing_is_computed_before_it_is_asked_for(device, monkeypatch) -> None:
    """Not even a view, also where torch.distributions validate."""
    monkeypatch.setattr(Distribution, "_validate_args", True)  # their default, which torch.compile turns off
    moments, mu, logvar = torch.randn(4, 6, device=device), *halves(4, 3, dtype=torch.float32, device=device)
    with Operations() as made:
        q, p = DiagonalGaussian(moments), DiagonalGaussian.from_mu_logvar(mu, logvar)
        q.expand((2, 4))
    assert not made.names
    with Operations() as read:
        q.mean, p.mode, q.expand((2, 4)).mean
    assert not read.computed()


def test_sampling_with_the_divergence_is_one_launch_each_way(device, triton_backend) -> None:
    moments, eps = torch.randn(4, 6, device=device, requires_grad=True), torch.randn(4, 3, device=device)
    before = triton_backend.count
    with Operations() as forward:
        z, kl = DiagonalGaussian(moments).rsample_with_kl(eps=eps)
    assert not forward.computed()
    upstream = torch.randn_like(z), torch.randn_like(kl)
    with Operations() as backward:
        torch.autograd.grad((z, kl), moments, upstream)
    assert not backward.computed()
    assert triton_backend.count == before + 2


@pytest.mark.parametrize("event", [(3,), (2, 3)], ids=str)
def test_a_divergence_from_another_and_several_samples_are_one_launch(event, device, triton_backend) -> None:
    """From one of each or one of all, with nothing beside it forward; and nothing is expanded or copied."""
    q = DiagonalGaussian.from_mu_logvar(*halves(4, *event, dtype=torch.float32, device=device))
    for shape in ((4, *event), (1, *event)):
        p = DiagonalGaussian.from_mu_logvar(*halves(*shape, dtype=torch.float32, device=device))
        normal = Independent(Normal(p.mu, p.stddev), len(event))
        for ask in (lambda p=p: kl_divergence(q, p), lambda p=p: q.kl(p), lambda p=normal: kl_divergence(q, p)):
            before = triton_backend.count
            with Operations() as made:
                kl = ask()
            assert kl.shape == (4,) and not made.computed() and triton_backend.count == before + 1
    eps = torch.randn(5, 2, 4, *event, device=device)
    for ask in (lambda: q.rsample((5, 2), eps=eps), lambda: q.expand((2, 4)).rsample((5,), eps=eps)):
        before = triton_backend.count
        with Operations() as made:
            z = ask()
        assert z.shape == eps.shape and not made.computed() and triton_backend.count == before + 1


@pytest.mark.parametrize("call", [lambda q: q.rsample(eps=torch.ones_like(q.mu)), lambda q: q.kl()])
def test_either_alone_joins_its_gradients_in_one_operation(call, device, triton_backend) -> None:
    moments = torch.randn(4, 6, device=device, requires_grad=True)
    before = triton_backend.count
    with Operations() as forward:
        result = call(DiagonalGaussian(moments))
    assert set(forward.computed()) <= {"ones_like"}
    upstream = torch.randn_like(result)
    with Operations() as backward:
        torch.autograd.grad(result, moments, upstream)
    assert backward.computed() == {"cat": 1}
    assert triton_backend.count == before + 2


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_compiles_whole(backend, device) -> None:
    """Traced by torch.compile without a break; what the compiler makes of the operations is in test_compile."""

    def step(moments: Tensor, eps: Tensor) -> tuple[Tensor, ...]:
        q = DiagonalGaussian(moments)
        z, kl = q.rsample_with_kl(eps=eps)
        other = DiagonalGaussian.from_mu_logvar(z, q.logvar)
        return z, kl, q.log_prob(z), q.entropy(), q.kl(other), q.rsample((2,), eps=torch.stack((eps, eps)))

    moments, eps = torch.randn(4, 6, device=device), torch.randn(4, 3, device=device)
    with fastvae.use_backend(backend):
        compiled = torch.compile(step, fullgraph=True, backend="eager")(moments, eps)
        torch.testing.assert_close(compiled, step(moments, eps), rtol=0, atol=0)


# --- a distribution like any other ------------------------------------------------------------------------------------


def test_sample_has_no_gradient_and_rsample_has_one() -> None:
    q = DiagonalGaussian(torch.randn(2, 6, requires_grad=True))
    assert q.has_rsample
    assert not q.sample().requires_grad
    assert q.rsample().requires_grad
    assert q.sample((3, 4)).shape == (3, 4, 2, 3)


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))])
def test_copies(make) -> None:
    for q in (DiagonalGaussian(torch.randn(2, 6)), DiagonalGaussian.from_mu_logvar(*halves(2, 3)).expand((4, 2))):
        other = make(q)
        assert (other.batch_shape, other.event_shape, repr(other)) == (q.batch_shape, q.event_shape, repr(q))
        assert torch.equal(other.mu, q.mu)
        assert torch.equal(other.kl(), q.kl())


def test_validation_is_off_unless_asked_for() -> None:
    moments = torch.full((2, 6), math.nan)
    assert DiagonalGaussian(moments).kl().isnan().all()
    with pytest.raises(ValueError, match="Expected parameter mu"):
        DiagonalGaussian(moments, validate_args=True)
    with pytest.raises(ValueError, match="Expected parameter logvar"):
        DiagonalGaussian.from_mu_logvar(torch.zeros(2, 3), torch.full((2, 3), math.nan), validate_args=True)
    q = DiagonalGaussian(torch.zeros(2, 6), validate_args=True)
    for checked in (q, q.expand((4, 2))):
        with pytest.raises(ValueError, match="Expected value argument"):
            checked.log_prob(torch.full((2, 3), math.nan))


def test_divergences_broadcast_and_dispatch() -> None:
    q = DiagonalGaussian(torch.randn(4, 6, dtype=torch.float64))
    mixture = peer(*halves(5, 1, 3)[:2])  # five components, each against each posterior
    mixture = Independent(mixture.base_dist, 1)
    assert kl_divergence(q, mixture).shape == (5, 4)
    assert torch.equal(kl_divergence(q, mixture), q.kl(mixture))
    torch.testing.assert_close(q.kl(), q.kl(standard_normal((3,))), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(
        q.kl(), kl_divergence(q, DiagonalGaussian(torch.zeros(1, 6).double())), rtol=1e-14, atol=1e-14
    )
    assert torch.equal(q.kl(q), torch.zeros(4, dtype=torch.float64))


def test_what_is_broadcast_can_be_written() -> None:
    q = DiagonalGaussian(torch.randn(1, 6)).expand((4,))
    for values in (q.kl(), q.entropy(), q.log_prob(torch.zeros(3)), q.kl(q), q.stddev, q.rsample_with_kl()[1]):
        before = values.clone()
        values[0] = 7.0
        assert torch.equal(values[1:], before[1:])


def test_bytes_are_numbers_and_not_pixels() -> None:
    """Only the target of a likelihood of images is read as t / 255."""
    q = DiagonalGaussian(torch.randn(4, 6))
    value = torch.randint(0, 4, (4, 3), dtype=torch.uint8)
    assert torch.equal(q.log_prob(value), q.log_prob(value.float()))
    prior = Independent(Normal(value, torch.ones(4, 3), validate_args=False), 1)
    wanted = Independent(Normal(value.float(), torch.ones(4, 3)), 1)
    assert torch.equal(q.kl(prior), q.kl(wanted)) and torch.equal(kl_divergence(prior, q), kl_divergence(wanted, q))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q: DiagonalGaussian(torch.zeros(2, 5)), ValueError, "moments must have an even size along dim 1"),
        (lambda q: DiagonalGaussian(torch.zeros(2, 6), 0), ValueError, "dim must name a dimension .*, got 0"),
        (lambda q: DiagonalGaussian(torch.zeros(2, 6).int()), TypeError, "moments must be float16, .*, got torch.int"),
        (lambda q: DiagonalGaussian(q.mu, q.mu), TypeError, r"one tensor, got two .* DiagonalGaussian.from_mu_logvar"),
        (lambda q: DiagonalGaussian.from_mu_logvar(q.mu, q.mu[:1]), ValueError, "logvar must have the shape of mu"),
        (
            lambda q: q.sample(torch.Generator()),
            TypeError,
            r"sample_shape must be a tuple of integers, got Generator \(pass generator=...\)",
        ),
        (lambda q: q.rsample(5), TypeError, "sample_shape must be a tuple of integers, got int$"),
        (
            lambda q: q.rsample((5,), eps=torch.zeros(2, 3)),
            ValueError,
            r"eps must have the shape of z, \[5, 2, 3\], got \[2, 3\]",
        ),
        (lambda q: q.rsample(eps=torch.zeros(5, 2, 3)), ValueError, r"eps must have the shape of z, \[2, 3\]"),
        (lambda q: q.log_prob(torch.zeros(2, 1)), ValueError, r"value must end in event_shape, \[3\], got \[2, 1\]"),
        (lambda q: q.log_prob(torch.zeros(())), ValueError, r"value must end in event_shape, \[3\], got \[\]"),
        (lambda q: q.expand((5,)), ValueError, r"batch_shape must be one to which \[2\] broadcasts, got \[5\]"),
        (lambda q: q.expand((2, 1)), ValueError, r"batch_shape must .* \[2\] broadcasts, got \[2, 1\]"),
        (lambda q: q.expand(()), ValueError, r"batch_shape must .* \[2\] broadcasts, got \[\]"),
        (lambda q: q.expand((3, 2)).expand((2,)), ValueError, r"\[3, 2\] broadcasts, got \[2\]"),
        (
            lambda q: q.kl(DiagonalGaussian(torch.zeros(2, 8))),
            ValueError,
            r"one event_shape, got \[3\] and \[4\]",
        ),
        (lambda q: q.kl(standard_normal((1, 3))), ValueError, r"one event_shape, got \[3\] and \[1, 3\]"),
        (lambda q: q.kl(Normal(0.0, 1.0)), NotImplementedError, r"use q.kl\(\) for N\(0, I\)"),
        (
            lambda q: q.kl(Independent(Laplace(torch.zeros(3), torch.ones(3)), 1)),
            NotImplementedError,
            "to and from an Independent Normal, got Independent Laplace",
        ),
    ],
)
def test_errors(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call(DiagonalGaussian(torch.zeros(2, 6)))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda q: Independent(q, 1).log_prob(torch.ones(4, 3, dtype=torch.float64)),
        lambda q: kl_divergence(Independent(q, 1), Independent(peer(*torch.ones(2, 4, 3).double()), 1)),
        lambda q: TransformedDistribution(q, [AffineTransform(1.0, -2.0), ExpTransform()]).log_prob(
            torch.full((4, 3), 0.3, dtype=torch.float64)
        ),
        lambda q: MixtureSameFamily(Categorical(torch.ones(4)), q, validate_args=False).log_prob(
            torch.tensor([[0.5, -1.0, 2.0], [0.0, 0.1, 0.2]], dtype=torch.float64)
        ),
    ],
    ids=["Independent", "Independents", "TransformedDistribution", "MixtureSameFamily"],
)
def test_inside_other_distributions(wrap) -> None:
    mu, logvar = halves(4, 3)
    torch.testing.assert_close(
        wrap(DiagonalGaussian.from_mu_logvar(mu, logvar)), wrap(peer(mu, logvar)), rtol=1e-12, atol=1e-12
    )
