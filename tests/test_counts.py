"""The likelihoods of counts against 60-digit arithmetic, and against scVI's formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

import fastvae
import fastvae.functional as F
from count_values import EPS, Points, points
from fastvae.kernels import INTERPRETED, counts, numerics
from fastvae.likelihoods import Likelihood, NegativeBinomial, ZeroInflatedNegativeBinomial, check
from fastvae.likelihoods.checking import exact
from special_values import BOUNDS as OF_SPECIAL
from special_values import UNIT
from test_continuous_likelihoods import values_and_slopes
from test_special import rough_exp, rough_log, rough_reciprocal

BOTH = [NegativeBinomial(), ZeroInflatedNegativeBinomial()]
PORTABLE, APPROXIMATE, PYTORCH = range(3)
# In units of 2^-24 S, of the value and of each slope: of the kernels' portable form, of their fast form if each of
# NVIDIA's instructions is as far off as its documentation allows, and of plain PyTorch in float32. Beside them is what
# scans of 42000 points found. S has no part of the target, which is given, but in the slope by the dispersion in plain
# PyTorch: at a count of 1 and mean << 1 << dispersion that is right to 72 * 2^-24 of t / (2 d^2) only.
BOUNDS = {
    NegativeBinomial(): ((8, 4, 40), (22, 8, 70), (24, 4, 72)),  # 7.7, 3.4, 37.7; 20.3, 7.8, 65.2; 21.9, 3.4, 69.8
    # 6.9, 4.1, 37.7, 4.0; 20.3, 18.2, 65.2, 13.4; 18.1, 5.0, 69.8, 5.4
    ZeroInflatedNegativeBinomial(): ((8, 5, 40, 5), (22, 20, 70, 15), (24, 6, 72, 6)),
}
# The slope by the dispersion for a number between 0 and 1, which is no count, with the part of the target in S: 76.4.
OF_A_FRACTION = 80
OF_LOG_FACTORIAL = OF_SPECIAL["log factorial"]


def of(likelihood: Likelihood) -> Points:
    return points(isinstance(likelihood, ZeroInflatedNegativeBinomial))


def largest_errors(found: list[Tensor], at: Points, likelihood: Likelihood, form: int) -> list[float]:
    """Of each result, over its bound."""
    with_target, target = exact(likelihood, at.inputs), at.inputs[-1]
    fraction = (target > 0) & (target < 1)
    largest = []
    for k, value in enumerate(found):
        bound = torch.full_like(at.results[k], BOUNDS[likelihood][form][k])
        scale = at.scales[k]
        if k == 0:
            scale = scale + fraction.double()  # a number between 0 and 1 has an error of 1, not of S
        elif k == 2:
            scale = torch.where(fraction | (form == PYTORCH), with_target.first[k], scale)
            bound = torch.where(fraction, float(OF_A_FRACTION), bound)
        off = (value.cpu().double() - at.results[k]).abs()
        off = torch.where(at.results[k].abs() < 2.0**-126, 0.0, off)  # may be 0 in float32
        ratio = torch.where(off == 0, 0.0, off / (UNIT * bound * scale))
        largest.append(ratio.nan_to_num(nan=torch.inf).max().item())
    return largest


def computed(likelihood: Likelihood, at: Points, device: torch.device | str) -> list[Tensor]:
    return values_and_slopes(likelihood, *[x.to(device) for x in at.inputs])


OVERFLOW = pytest.mark.filterwarnings("ignore:(overflow|invalid|divide).* encountered:RuntimeWarning")  # numpy's


@OVERFLOW
@pytest.mark.parametrize("likelihood", BOTH, ids=str)
def test_terms(likelihood, triton_backend, device):
    at = of(likelihood)
    errors = largest_errors(computed(likelihood, at, device), at, likelihood, PORTABLE if INTERPRETED else APPROXIMATE)
    assert max(errors) <= 1, errors


@OVERFLOW
@pytest.mark.skipif(not INTERPRETED, reason="a GPU has the instructions themselves")
@pytest.mark.parametrize("likelihood", BOTH, ids=str)
def test_terms_with_the_documented_errors_of_fast_instructions(likelihood, triton_backend, monkeypatch):
    """They are what ``roundings`` counts, with the scale of `checking.exact`."""
    for module in (numerics, counts):
        for part, rough in (("log", rough_log), ("reciprocal", rough_reciprocal), ("exp", rough_exp)):
            if hasattr(module, part):
                monkeypatch.setattr(module, part, rough)
    at = of(likelihood)
    found = computed(likelihood, at, "cpu")
    errors = largest_errors(found, at, likelihood, APPROXIMATE)
    assert max(errors) <= 1, errors
    assert max(largest_errors(found, at, likelihood, PORTABLE)) > 1, "the errors were not planted"

    target = at.inputs[-1]
    count = (target == 0) | (target >= 1)
    for each in (likelihood, replace(likelihood, constant=False)):
        scales, found = exact(each, at.inputs), found if each == likelihood else computed(each, at, "cpu")
        for k, value in enumerate(found):
            allowed = each.roundings[k] * UNIT * scales.scale(k, each.roundings[k]) + 2.0**-126
            if k == 0 and not each.constant:  # what it subtracts may be much larger than what is left
                allowed += OF_LOG_FACTORIAL[APPROXIMATE] * UNIT * torch.lgamma(target.double() + 1).abs()
            error = ((value.double() - scales.results[k]).abs() / allowed)[count].max()
            assert error <= 1, f"{each}, {k}: {error:.3g}"


@pytest.mark.parametrize("likelihood", BOTH, ids=str)
def test_plain_pytorch_in_float32(likelihood):
    at = of(likelihood)
    with fastvae.use_backend("reference"):
        by_autograd = computed(likelihood, at, "cpu")
    own = [by_autograd[0], *likelihood.slopes(*at.inputs)]
    for found in (by_autograd, own):
        errors = largest_errors(found, at, likelihood, PYTORCH)
        assert max(errors) <= 1, errors


@pytest.mark.parametrize("likelihood", BOTH, ids=str)
def test_plain_pytorch_in_float64(likelihood):
    """It is what the terms are compared with."""
    at = of(likelihood)
    wide = [x.double() for x in at.inputs]
    with_target, mean = exact(likelihood, at.inputs), at.inputs[0]
    with fastvae.use_backend("reference"):
        by_autograd = values_and_slopes(likelihood, *wide)
    own = likelihood.slopes(*wide)
    for k, found in [*enumerate(by_autograd), *enumerate(own, 1)]:
        # At a mean of 0 and a count of 1, S of the slope by the dispersion is as small as eps. Of 60 digits of a slope
        # that is 0 there is 1e-60 left.
        scale = torch.where(mean == 0, with_target.first[k], at.scales[k])
        assert ((found - at.results[k]).abs() <= 1e-9 * scale + 1e-50).all(), k


@pytest.mark.parametrize("likelihood", BOTH, ids=str)
def test_terms_of_other_settings_are_their_formulas(likelihood, triton_backend, device):
    for other in (replace(likelihood, constant=False), replace(likelihood, eps=0.0), replace(likelihood, eps=1e-3)):
        check(other, device=device)


def log_nb_positive(x: Tensor, mu: Tensor, theta: Tensor) -> Tensor:
    """scvi-tools', with its names."""
    log_theta_mu_eps = torch.log(theta + mu + EPS)
    return (
        theta * (torch.log(theta + EPS) - log_theta_mu_eps)
        + x * (torch.log(mu + EPS) - log_theta_mu_eps)
        + torch.lgamma(x + theta)
        - torch.lgamma(theta)
        - torch.lgamma(x + 1)
    )


def log_zinb_positive(x: Tensor, mu: Tensor, theta: Tensor, pi: Tensor) -> Tensor:
    """scvi-tools', with its names: pi are the logits."""
    softplus_pi = softplus(-pi)
    log_theta_mu_eps = torch.log(theta + mu + EPS)
    pi_theta_log = -pi + theta * (torch.log(theta + EPS) - log_theta_mu_eps)
    case_zero = softplus(pi_theta_log) - softplus_pi
    case_non_zero = (
        -softplus_pi
        + pi_theta_log
        + x * (torch.log(mu + EPS) - log_theta_mu_eps)
        + torch.lgamma(x + theta)
        - torch.lgamma(theta)
        - torch.lgamma(x + 1)
    )
    return torch.where(x < EPS, case_zero, case_non_zero)


@pytest.mark.parametrize("likelihood", BOTH, ids=str)
def test_against_the_formulas_of_scvi(likelihood, triton_backend, device):
    """In float64, where their parts leave enough digits."""
    *parameters, target = likelihood.draw((4096,), torch.Generator().manual_seed(0))
    wide = [x.double().requires_grad_() for x in parameters]
    theirs = log_nb_positive if len(wide) == 2 else log_zinb_positive
    value = -theirs(target.double(), *wide)
    wanted = [value.detach(), *torch.autograd.grad(value.sum(), wide)]
    of_formula = likelihood.formula(*wide, target.double())
    found = [of_formula.detach(), *torch.autograd.grad(of_formula.sum(), wide)]
    fused = values_and_slopes(likelihood, *[x.to(device) for x in (*parameters, target)])
    scales = exact(likelihood, (*parameters, target))
    for k, exact_value in enumerate(wanted):
        scale = scales.scale(k, likelihood.roundings[k])
        assert ((found[k] - exact_value).abs() <= 1e-8 * scale).all(), k
        assert ((fused[k].cpu().double() - exact_value).abs() <= likelihood.roundings[k] * UNIT * scale).all(), k


@pytest.mark.slow
@pytest.mark.parametrize("likelihood", BOTH, ids=str)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_probabilities_sum_to_1(likelihood, backend, device):
    """And `mean` is their mean."""
    means, dispersions = (0.0, 0.3, 5.0, 40.0, 100.0, 17.0), (2.0, 0.01, 0.7, 3.0, 1e3, 1e7)
    sizes = (8, 1024, 256, 512, 256, 128)  # beyond it the probabilities sum to less than 1e-8
    target = torch.cat([torch.arange(float(size)) for size in sizes]).to(device)
    repeated = torch.tensor((means, dispersions)).repeat_interleave(torch.tensor(sizes), 1).to(device)
    parameters = (*repeated, torch.full_like(target, -0.7))[: len(likelihood.parameters)]
    with fastvae.use_backend(backend):
        value, *_ = values_and_slopes(likelihood, *parameters, target)
    probability, expected = value.double().neg().exp(), likelihood.mean(*parameters)
    for part, numbers, mean in zip(*[x.split(sizes) for x in (probability, target, expected)], strict=True):
        assert part.sum().item() == pytest.approx(1, abs=5e-6)
        assert (part * numbers).sum().item() == pytest.approx(mean[0].item(), rel=2e-5, abs=1e-7)


def few(likelihood: Likelihood) -> tuple[list[Tensor], Tensor]:
    """Parameters of which some are one for each column, and counts, in float64: near and far from each other."""
    mean = torch.tensor([[0.5, 2.0, 30.0], [4.0, 1e-2, 7.0]], dtype=torch.float64)
    dispersion = torch.tensor([0.4, 3.0, 200.0], dtype=torch.float64)
    logits = torch.tensor([[0.3, -2.0, 1.0], [-40.0, 5.0, -3.0]], dtype=torch.float64)
    target = torch.tensor([[0.0, 0.0, 27.0], [0.0, 3.0, 1.0]], dtype=torch.float64)
    return [x.requires_grad_() for x in (mean, dispersion, logits)[: len(likelihood.parameters)]], target


@pytest.mark.parametrize("likelihood", BOTH, ids=str)
def test_gradients_of_the_formula(likelihood):
    leaves, target = few(likelihood)
    assert torch.autograd.gradcheck(lambda *x: likelihood.formula(*x, target), leaves)
    assert torch.autograd.gradgradcheck(lambda *x: likelihood.formula(*x, target), leaves)
    if len(leaves) == 2:
        every = (*leaves, (target + 0.25).requires_grad_())
        assert torch.autograd.gradcheck(likelihood.formula, every)
        assert torch.autograd.gradgradcheck(likelihood.formula, every)


def test_second_derivative_by_logits_of_rare_and_sure_zeros():
    """sigma(l) sigma(-l) of a count, which is no 0 where sigma(l) rounds to 1."""
    logits = torch.tensor([-40.0, -3.0, 0.5, 20.0, 40.0], requires_grad=True)
    value = ZeroInflatedNegativeBinomial().formula(torch.ones(5), torch.ones(5), logits, torch.full((5,), 2.0))
    (slope,) = torch.autograd.grad(value.sum(), logits, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), logits)
    wide = logits.detach().double()
    torch.testing.assert_close(bend.double(), torch.sigmoid(wide) * torch.sigmoid(-wide), rtol=1e-6, atol=0)


@pytest.mark.parametrize("likelihood", BOTH, ids=str)
def test_transforms_of_the_formula(likelihood):
    leaves, target = few(likelihood)

    def loss(*parameters: Tensor) -> Tensor:
        return F.negative_log_likelihood(parameters, target, likelihood, reduction="none")

    with fastvae.use_backend("reference"):
        value = loss(*leaves)
        wanted = torch.autograd.grad(value.sum(), leaves)
        again, backward = torch.func.vjp(loss, *leaves)
        torch.testing.assert_close(again, value)
        for found, expected in zip(backward(torch.ones_like(value)), wanted, strict=True):
            torch.testing.assert_close(found, expected)
        for k, jacobian in enumerate(torch.func.jacrev(loss, argnums=tuple(range(len(leaves))))(*leaves)):
            torch.testing.assert_close(jacobian.sum(0), wanted[k])


@pytest.mark.parametrize("likelihood", BOTH, ids=str)
def test_the_loss_compiles_as_one_graph(likelihood):
    leaves, target = few(likelihood)
    leaves, target = [x.detach().float().requires_grad_() for x in leaves], target.float()

    def loss(*parameters: Tensor) -> Tensor:
        return F.negative_log_likelihood(parameters, target, likelihood)

    results = []
    with fastvae.use_backend("reference"):
        for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
            value = function(*leaves)
            results.append((value.detach(), *torch.autograd.grad(value, leaves)))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("kind", [NegativeBinomial, ZeroInflatedNegativeBinomial])
def test_settings_that_cannot_be(kind):
    for eps, error in ((-1e-8, ValueError), (float("nan"), ValueError), (float("inf"), ValueError), ("0", TypeError)):
        with pytest.raises(error, match=f"eps must be .*{eps}"):
            kind(eps=eps)
