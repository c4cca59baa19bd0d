"""What is particular to the kernels of posteriors with another prior, another scale, several samples and log-densities.
`test_contract.py` holds the operations of the list to the rest; `test_prior_and_scale.py` has the formulas.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import fastvae
import fastvae.functional as F
from bounds import assert_within
from conftest import plan_anew
from contract import EVERY, check, launching_nothing
from fastvae import kernels
from fastvae.kernels import posterior as planning
from fastvae.operations import Operation, named
from layouts import same_bits
from test_contract import use_small_tiles
from test_prior_and_scale import each_scale
from traffic import metered

# z, kl and log_q at once, of two samples, with a prior.
EVERYTHING = replace(
    named(EVERY)["gaussian_kl_prior"],
    name="everything",
    function="gaussian_sample_kl",
    outputs=("z", "kl", "log_q"),
    roundings={
        "z": 14, "kl": 42, "log_q": 20,
        "mu_grad": 30, "logvar_grad": 33, "prior_mu_grad": 26, "prior_logvar_grad": 44,
    },
    options={"samples": 2, "log_prob": True, "reduction": "none"},
)  # fmt: skip
PACKED = named(EVERY)["gaussian_sample_kl_packed_prior"]


def drawn(*shape: int, scale: str = "logvar", **_: object) -> Tensor:
    values = torch.randn(shape)
    return values.abs() + 0.1 if scale == "std" else values


def tensors_of(shape: tuple[int, ...], prior_shape: tuple[int, ...], **settings: object) -> tuple[Tensor, ...]:
    return (
        torch.randn(shape), drawn(*shape, **settings), torch.randn(prior_shape), drawn(*prior_shape, **settings),
    )  # fmt: skip


def noise(*shape: int) -> dict[str, Tensor]:
    return {"eps": torch.randn(shape)}


def check_on(device: torch.device, operation: Operation, tensors: tuple[Tensor, ...], **options: object) -> None:
    moved = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    check(operation, tuple(tensor.to(device) for tensor in tensors), **moved)


# ------------------------------------------------------------------------------------------------ values and gradients


@each_scale
@pytest.mark.parametrize("prior_shape", [(5, 7), (1, 7), (7,)], ids=str)
def test_every_scale(prior_shape, settings, device, triton_backend) -> None:
    tensors = tensors_of((5, 7), prior_shape, **settings)
    check_on(device, EVERYTHING, tensors, **noise(2, 5, 7), **settings)
    check_on(device, EVERYTHING, tensors, **noise(2, 5, 7), **settings, reduction="per_dimension")


@pytest.mark.parametrize("tile", [(1, 8), (2, 64)], ids=str)
def test_sums_over_several_programs(tile, device, triton_backend, monkeypatch) -> None:
    """Those of rows of kl and of log_q, and those of columns of a shared prior's gradients."""
    use_small_tiles(monkeypatch, *tile)
    for prior_shape, reduction in (((2, 26), "none"), ((2, 26), "batchmean"), ((26,), "none")):
        check_on(device, EVERYTHING, tensors_of((2, 26), prior_shape), **noise(2, 2, 26), reduction=reduction)


@pytest.mark.parametrize("most", [32, 64, 10**9])
def test_sums_over_the_batch_in_several_blocks(most, device, triton_backend, monkeypatch) -> None:
    """And repeated in every bit."""
    plan_anew(monkeypatch)
    monkeypatch.setattr(planning, "_MOST_PARTIAL_SUMS", most)
    for shapes in (((70, 20), (20,)), ((70, 20), (70, 20))):
        tensors = tensors_of(*shapes)
        options = {**noise(2, 70, 20), "reduction": "per_dimension", "free_bits": 0.5}
        check_on(device, EVERYTHING, tensors, **options)
    leaves = [t.to(device).requires_grad_() for t in tensors_of((70, 20), (20,))]
    kl = F.gaussian_kl(*leaves[:2], prior=tuple(leaves[2:]))
    first, second = (torch.autograd.grad(kl, leaves, retain_graph=True) for _ in range(2))
    assert all(map(same_bits, first, second))


def test_a_prior_of_which_one_half_is_shared(device, triton_backend) -> None:
    mu, logvar, prior_mu, prior_logvar = tensors_of((5, 4, 3), (5, 4, 3))
    for priors in ((prior_mu, prior_logvar[0]), (prior_mu[:1], prior_logvar)):
        check_on(device, EVERYTHING, (mu, logvar, *priors), **noise(2, 5, 4, 3))


@pytest.mark.parametrize("prior_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prior_of_another_dtype(dtype, prior_dtype, device, triton_backend) -> None:
    for prior_shape in ((5, 8), (8,)):
        tensors = tensors_of((5, 8), prior_shape)
        each = (*(t.to(dtype) for t in tensors[:2]), *(t.to(prior_dtype) for t in tensors[2:]))
        check_on(device, EVERYTHING, each, **noise(2, 5, 8))


CHANNELS_LAST = {"memory_format": torch.channels_last}
LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(**CHANNELS_LAST),
    "sliced": lambda t: torch.cat((t, t), 1)[:, : t.shape[1]],
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
}


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("prior_layout", LAYOUTS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_layouts_of_posterior_and_prior(layout, prior_layout, dim, device, triton_backend) -> None:
    """Also of one prior for all samples, and of halves beside a packed posterior."""
    shape = [3, 4, 2, 5]
    shape[dim] *= 2
    moments, prior = torch.randn(2, *shape, device=device)
    moments, prior = LAYOUTS[layout](moments), LAYOUTS[prior_layout](prior)
    eps = noise(3, 4, 2, 5) if dim == 1 else noise(*[n // 2 if d == dim else n for d, n in enumerate(shape)])
    for each in (prior, prior[:1], prior[0]):
        check_on(device, PACKED, (moments, each), dim=dim, **eps)
    check_on(
        device,
        replace(EVERYTHING, options={"log_prob": True, "reduction": "none"}),
        (*moments.chunk(2, dim), *prior.chunk(2, dim)),
        **eps,
    )


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)], ids=str)
@pytest.mark.parametrize("log_prob", [True, "detached"])
def test_empty(shape, log_prob, device) -> None:
    """A shared prior has a gradient also of nothing: 0."""
    mu, logvar, prior_mu, prior_logvar = (t.to(device).requires_grad_() for t in tensors_of(shape, shape[1:]))
    with launching_nothing():
        z, kl, log_q = F.gaussian_sample_kl(mu, logvar, prior=(prior_mu, prior_logvar), samples=2, log_prob=log_prob)
        gradients = torch.autograd.grad(z.sum() + kl.sum() + log_q.sum(), (mu, logvar, prior_mu, prior_logvar))
    assert z.shape == (2, *shape) and not kl.any() and not log_q.any() and log_q.shape == (2, shape[0])
    assert not any(gradient.any() for gradient in gradients)


# --------------------------------------------------------------------------------------------------- noise and samples


@pytest.mark.parametrize("shape", [(3, 8), (3, 5), (2, 3, 3)], ids=str)
def test_samples_are_those_of_a_larger_batch(shape, device, triton_backend) -> None:
    """The noise of sample s is that of the rows behind s batches."""
    mu, logvar = torch.randn(2, *shape, device=device)
    generator = torch.Generator(device)
    z = F.gaussian_sample(mu, logvar, samples=3, generator=generator.manual_seed(1))
    repeated = [t.repeat(3, *[1] * (t.ndim - 1)) for t in (mu, logvar)]
    assert same_bits(z.flatten(0, 1), F.gaussian_sample(*repeated, generator=generator.manual_seed(1)))
    one = F.gaussian_sample(mu, logvar, samples=1, generator=generator.manual_seed(1))
    assert same_bits(one[0], F.gaussian_sample(mu, logvar, generator=generator.manual_seed(1)))


def test_an_offset_in_the_batch_with_a_prior(device, triton_backend) -> None:
    tensors, generator = torch.randn(3, 4, 6, device=device), torch.Generator(device)
    plain = F.gaussian_sample_kl(*tensors[:2], generator=generator.manual_seed(1), batch_offset=5)
    other = F.gaussian_sample_kl(
        *tensors[:2], prior=(tensors[2], tensors[2]), generator=generator.manual_seed(1), batch_offset=5
    )
    assert same_bits(plain[0], other[0])


def test_the_present_calls_and_the_general_ones_agree(device, triton_backend) -> None:
    """A clamp that holds nothing gives the same numbers, by the other kernels."""
    mu, logvar, eps = torch.randn(3, 4, 6, device=device)
    plain = F.gaussian_sample_kl(mu, logvar, eps=eps)
    general = F.gaussian_sample_kl(mu, logvar, eps=eps, scale_clamp=(-30, 20))
    assert same_bits(plain[0], general[0])
    torch.testing.assert_close(plain[1], general[1], rtol=1e-6, atol=0)


# ---------------------------------------------------------------------------------------------------- the log-density


def detached(mu: Tensor, logvar: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    return F.gaussian_sample(mu, logvar, samples=2, log_prob="detached", **options)


@each_scale
def test_the_density_as_a_function_of_z(settings, device, triton_backend) -> None:
    """Its gradient arrives at z, in one launch, and passes through a hook of z; its parameters get no other."""
    mu, logvar = torch.randn(3, 5, device=device), drawn(3, 5, **settings).to(device)
    leaves, eps = [t.requires_grad_() for t in (mu, logvar)], torch.randn(2, 3, 5, device=device)
    upstream = torch.linspace(-1, 2, 6, device=device).view(2, 3)
    z, log_q = detached(*leaves, eps=eps, **settings)
    before = triton_backend.count
    (gradient,) = torch.autograd.grad(log_q, z, upstream, retain_graph=True)
    assert triton_backend.count == before + 1
    wide = [t.detach().double().cpu().requires_grad_() for t in leaves]
    with fastvae.use_backend("reference"):
        wide_z, wide_log_q = detached(*wide, eps=eps.double().cpu(), **settings)
    (wanted,) = torch.autograd.grad(wide_log_q, wide_z, upstream.double().cpu(), retain_graph=True)
    # The argument of the exponential is rounded, and a log-variance that is not the tensor has an error of its own.
    assert_within(gradient, wanted, wanted.abs() * (1 + 4 * logvar.detach().double().cpu().abs() + 10), 26)
    z.register_hook(lambda g: 3 * g)
    wide_z.register_hook(lambda g: 3 * g)
    found = torch.autograd.grad(log_q, leaves, upstream)
    for actual, exact in zip(found, torch.autograd.grad(wide_log_q, wide, upstream.double().cpu()), strict=True):
        torch.testing.assert_close(actual.double().cpu(), exact, rtol=1e-4, atol=1e-5)


def test_the_density_as_a_function_of_z_has_a_second_derivative(device, triton_backend) -> None:
    mu, logvar, eps = torch.randn(3, 2, 4, device=device)
    leaves = [mu.requires_grad_(), logvar.requires_grad_()]
    z, log_q = F.gaussian_sample(*leaves, eps=eps, log_prob="detached")
    (score,) = torch.autograd.grad(log_q.sum(), z, create_graph=True)
    (second,) = torch.autograd.grad(score.sum(), z)
    torch.testing.assert_close(second, -torch.exp(-logvar).detach())


def test_drawn_noise_gives_the_same_score_again(device, triton_backend) -> None:
    """With noise that is made again in backward, from memory of another order too."""
    mu, logvar = (torch.randn(3, 4, 2, 5, device=device).contiguous(**CHANNELS_LAST) for _ in range(2))
    z, log_q = detached(mu.requires_grad_(), logvar.requires_grad_())
    eps = ((z - mu) * torch.exp(-logvar / 2)).detach()
    for create_graph in (False, True):
        (score,) = torch.autograd.grad(log_q.sum(), z, create_graph=create_graph, retain_graph=True)
        torch.testing.assert_close(score.detach(), -eps * torch.exp(-logvar / 2).detach(), rtol=1e-4, atol=1e-4)


def test_compiles_whole(device, triton_backend) -> None:
    mu, logvar, prior = torch.randn(3, 4, 6, device=device)
    eps = torch.randn(2, 4, 6, device=device)

    def step(mu: Tensor, logvar: Tensor, prior: Tensor) -> tuple[Tensor, ...]:
        z, kl, log_q = F.gaussian_sample_kl(
            mu, logvar, prior=(prior, prior), samples=2, log_prob="detached", eps=eps, scale="softplus"
        )
        return z, kl, log_q

    found = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [t.detach().requires_grad_() for t in (mu, logvar, prior)]
        outputs = call(*leaves)
        gradients = torch.autograd.grad([o.square().sum() for o in outputs], leaves)
        found.append([*outputs, *gradients])
    torch.testing.assert_close(found[1], found[0])


def test_the_registered_score_is_what_it_says(device, triton_backend) -> None:
    from fastvae.reference.gaussian import General

    mu, logvar = torch.randn(2, 3, 5, device=device)
    posterior = General(True, False, 1, "none", 0.0, "logvar", 0.0, -math.inf, math.inf, "logvar", 2, True)
    gradients, eps = torch.randn(2, 3, device=device), torch.randn(2, 3, 5, device=device)
    arguments = mu, logvar, mu.stride(), gradients, eps, None, None, 0, 0, 0
    operation = torch.ops.fastvae.general_score.default
    torch.library.opcheck(operation, (*posterior, *arguments), test_utils=("test_schema", "test_faketensor"))


# ----------------------------------------------------------------------------------------------- launches and bytes


def test_launches(device, triton_backend) -> None:
    """A block of a hierarchical VAE is one each way, with gradients to both; and so is a prior for all samples."""
    moments, prior = (torch.randn(4, 6, 2, 2, device=device).requires_grad_() for _ in range(2))
    for each in (prior, prior[:1].detach().requires_grad_(), prior[0].detach().requires_grad_()):
        before = triton_backend.count
        z, kl = F.gaussian_sample_kl_packed(moments, prior=each)
        assert triton_backend.count == before + 1
        torch.autograd.grad(z.sum() + kl.sum(), (moments, each))
        assert triton_backend.count == before + 2
    z, log_q = detached(*moments.chunk(2, 1))
    torch.autograd.grad(z.sum() + log_q.sum(), moments)
    assert triton_backend.count == before + 2 + 1 + 2


@pytest.mark.skipif(not kernels.INTERPRETED, reason="bytes are counted on Triton's interpreter")
def test_bytes_of_what_is_not_in_the_list(device, triton_backend) -> None:
    """Eight samples read the moments once; a shared prior is read once for a tile; a score reads logvar alone."""
    mu, logvar = (torch.randn(32, 64).requires_grad_() for _ in range(2))
    prior = [torch.randn(64).requires_grad_() for _ in range(2)]
    elements = mu.numel()
    with metered() as traffic:
        _, log_q = F.gaussian_sample(mu, logvar, samples=4, log_prob="detached")
    assert 8 <= traffic.loaded / elements < 8.4 and 16 <= traffic.stored / elements < 16.4
    with metered() as traffic:
        torch.autograd.grad(log_q.sum(), (mu, logvar))
    # The score, 4 and 16, and the gradient: logvar, the four gradients of z, and two results.
    assert 24 <= traffic.loaded / elements < 24.4 and traffic.stored == 24 * elements
    with metered() as traffic:
        kl = F.gaussian_kl(mu, logvar, prior=tuple(prior))
    # A tile has 16 rows.
    assert 8.5 <= traffic.loaded / elements < 8.9 and traffic.stored < 0.1 * elements
    with metered() as traffic:
        torch.autograd.grad(kl, (mu, logvar, *prior))
    # For each column of a tile a number of each half, and two sums, which are written and read again.
    assert 9 <= traffic.loaded / elements <= 9.4 and 8.5 <= traffic.stored / elements <= 8.9
