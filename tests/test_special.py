"""The special functions of likelihoods against 80-digit arithmetic: the kernels' forms and those in plain PyTorch."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

import mpmath
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.kernels import INTERPRETED, numerics, special
from fastvae.likelihoods import Likelihood, Term, check
from fastvae.reference import counts
from fastvae.reference import special as reference
from special_values import BOUNDS, Points, errors, gamma_points, points

FAST = torch.cuda.is_available()
PORTABLE, APPROXIMATE, PYTORCH = range(3)
BLOCK = 1024


@triton.jit
def differences_kernel(
    FUNCTION: tl.constexpr, t_ptr, d_ptr, value_ptr, slope_ptr, size, FAST: tl.constexpr, BLOCK: tl.constexpr
):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    t = tl.load(t_ptr + place, mask=place < size, other=1.0)
    value, slope = FUNCTION(t, tl.load(d_ptr + place, mask=place < size, other=1.0), FAST)
    tl.store(value_ptr + place, value, mask=place < size)
    tl.store(slope_ptr + place, slope, mask=place < size)


@triton.jit
def pair_kernel(FUNCTION: tl.constexpr, x_ptr, value_ptr, slope_ptr, size, FAST: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value, slope = FUNCTION(tl.load(x_ptr + place, mask=place < size, other=1.0), FAST)
    tl.store(value_ptr + place, value, mask=place < size)
    tl.store(slope_ptr + place, slope, mask=place < size)


@triton.jit
def value_kernel(FUNCTION: tl.constexpr, x_ptr, value_ptr, size, FAST: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = FUNCTION(tl.load(x_ptr + place, mask=place < size, other=1.0), FAST)
    tl.store(value_ptr + place, value, mask=place < size)


def computed(kernel, function, inputs, outputs) -> list[Tensor]:
    """What a Triton function has for these inputs, float32 [N] each."""
    inputs = [x.to("cuda" if FAST else "cpu") for x in inputs]
    size = inputs[0].numel()
    results = [torch.empty_like(inputs[0]) for _ in range(outputs)]
    kernel[(triton.cdiv(size, BLOCK),)](function, *inputs, *results, size, FAST=FAST, BLOCK=BLOCK)
    return results


def of_kernels(name: str, module=special) -> tuple[dict[str, Tensor], Points]:
    if name == "gamma differences":
        at = gamma_points()
        value, slope = computed(differences_kernel, module.gamma_differences, at.inputs, 2)
        return {"gamma difference": value, "digamma difference": slope}, at
    at = points(name)
    function = getattr(module, name.replace(" ", "_"))
    results = computed(pair_kernel if len(at.results) == 2 else value_kernel, function, at.inputs, len(at.results))
    return dict(zip(at.results, results, strict=True)), at


def assert_bounds(found: dict[str, Tensor], at: Points, form: int) -> None:
    for name, error in errors(found, at).items():
        assert error <= BOUNDS[name][form], f"{name} is {error:.3g} * 2^-24 of its scale off"


KERNELS = ["gamma differences", "log factorial", "log1p", "log1p minus", "softplus", "log1mexp"]


@pytest.mark.parametrize("name", KERNELS)
def test_kernels(name):
    assert_bounds(*of_kernels(name), APPROXIMATE if FAST else PORTABLE)


@triton.jit
def direction(x):
    """1 or -1, by the bits of x."""
    bits = x.to(tl.int32, bitcast=True)
    return 1.0 - 2.0 * (((bits ^ (bits >> 5) ^ (bits >> 11)) & 1).to(tl.float32))


# As far off as NVIDIA documents: lg2.approx 2 ulp, and 2^-22 in (1/2, 2), times a rounded log 2; rcp.approx 1 ulp; and
# ex2.approx 2 ulp.
@triton.jit
def rough_log(x, FAST: tl.constexpr):
    value = tl.log(x)
    near = tl.where((x > 0.5) & (x < 2.0), 1.6525e-7, 0.0)
    return value + direction(x) * tl.maximum(2.682e-7 * tl.abs(value), near)


@triton.jit
def rough_reciprocal(x, FAST: tl.constexpr):
    return (1.0 / x) * (1.0 + 1.1920929e-07 * direction(x))


@triton.jit
def rough_exp(x, FAST: tl.constexpr):
    return tl.exp(x) * (1.0 + 2.3841858e-07 * direction(x))


@pytest.mark.skipif(not INTERPRETED, reason="a GPU has the instructions themselves")
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_with_the_documented_errors_of_fast_instructions(name, monkeypatch):
    for part, rough in (("log", rough_log), ("reciprocal", rough_reciprocal), ("exp", rough_exp)):
        monkeypatch.setattr(numerics, part, rough)
    found, at = of_kernels(name)
    assert_bounds(found, at, APPROXIMATE)
    exceeded = [error > BOUNDS[part][PORTABLE] for part, error in errors(found, at).items()]
    assert any(exceeded), "the errors were not planted"


# A coefficient that is wrong by so much, relatively, is found. The last ones of a series matter less. The first two
# stand twice, once for a and once for b, and one of them is changed; the third is of Stirling's series from 6 on; the
# fourth is of log1p_minus.
SEEN = 3e-3
SEEN_OF = {
    "6.054756813682616e-04": 3e-2,
    "-2.5013317354023457e-03": 1e-2,
    "2.4305555555555555e-03": 0.3,
    "0.1342574901": 3e-2,
}
LITERAL = re.compile(r"(?<![\w.])-?\d+\.\d+(?:e[-+]\d+)?")


def coefficients(function: str) -> list[tuple[int, int, str]]:
    """Where the source of a Triton function has numbers of more digits than a human chooses."""
    source = Path(special.__file__).read_text()
    start = source.index(f"def {function}(")
    end = source.find("@triton.jit", start)
    body = source.index('"""', source.index('"""', start) + 3)
    found = LITERAL.finditer(source, body, end if end >= 0 else len(source))
    return [(it.start(), it.end(), it[0]) for it in found if len(it[0]) > 6]


FAULTS = [
    (name, place)
    for name, function in (
        ("gamma differences", "gamma_polynomials"),
        ("log factorial", "log_factorial"),
        ("log1p minus", "log1p_minus"),
    )
    for place in coefficients(function)
]


@pytest.mark.skipif(not INTERPRETED, reason="compiles each")
@pytest.mark.parametrize(("name", "place"), FAULTS, ids=[f"{name} {text}" for name, (_, _, text) in FAULTS])
def test_a_wrong_coefficient_is_found(name, place, tmp_path):
    start, end, text = place
    source = Path(special.__file__).read_text()
    wrong = float(text) * (1 + SEEN_OF.get(text, SEEN))
    (tmp_path / "wrong.py").write_text(f"{source[:start]}{wrong!r}{source[end:]}")
    specification = importlib.util.spec_from_file_location("wrong", tmp_path / "wrong.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    found = errors(*of_kernels(name, module))
    assert any(error > BOUNDS[part][PORTABLE] for part, error in found.items())


@triton.jit
def log_value(x, FAST: tl.constexpr):
    return numerics.log(x, FAST)


def test_edges():
    infinity, nan = float("inf"), float("nan")
    d = torch.tensor([1e-6, 1.0, 3.7, 1e8])
    for value in computed(differences_kernel, special.gamma_differences, [torch.zeros(4), d], 2):
        assert torch.equal(value.cpu(), torch.zeros(4))
    assert computed(value_kernel, special.log_factorial, [torch.tensor([0.0, 1.0])], 1)[0].tolist() == [0, 0]
    t, d = torch.tensor([nan, 1.0, 2.0]), torch.tensor([1.0, nan, 0.0])
    value, slope = computed(differences_kernel, special.gamma_differences, [t, d], 2)
    assert value[:2].isnan().all() and slope[:2].isnan().all() and (value[2], slope[2]) == (-infinity, infinity)
    assert computed(value_kernel, special.log1p_minus, [torch.zeros(1)], 1)[0] == 0
    assert computed(value_kernel, special.log1p_minus, [torch.tensor([nan])], 1)[0].isnan()
    x = torch.tensor([nan, infinity])
    for function in (special.log1p, special.log_factorial, log_value):
        (value,) = computed(value_kernel, function, [x], 1)
        assert value[0].isnan() and value[1] == infinity
    value, slope = computed(pair_kernel, special.softplus, [torch.tensor([nan, infinity, -infinity])], 2)
    assert value[0].isnan() and slope[0].isnan()
    assert value[1:].tolist() == [infinity, 0] and slope[1:].tolist() == [1, 0]
    value, slope = computed(pair_kernel, special.log1mexp, [torch.tensor([nan, infinity])], 2)
    assert value[0].isnan() and slope[0].isnan() and (value[1], slope[1]) == (0, 0)


def of_reference(name: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], Points]:
    """With the derivatives that torch finds."""
    at = gamma_points() if name == "gamma differences" else points(name)
    inputs = [x.to(dtype) for x in at.inputs]
    x = inputs[-1].requires_grad_()
    if name in ("log factorial", "log1p minus"):
        function = reference.log_factorial if name == "log factorial" else counts.log1p_minus
        return {name: function(x)}, at
    if name == "gamma differences":
        value = reference.gamma_difference(*inputs)
    else:
        value = {"softplus": reference.softplus, "log1mexp": reference.log1mexp}[name](x)
    (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    results = dict(zip(at.results, (value, slope), strict=False))
    if name == "gamma differences":
        (results["trigamma difference"],) = torch.autograd.grad(slope.sum(), x)
        with torch.no_grad():  # nothing is kept for a gradient
            assert torch.equal(reference.gamma_difference(*inputs), value)
            assert torch.equal(reference.digamma_difference(*inputs), slope)
    return results, at


REFERENCES = ["gamma differences", "log factorial", "softplus", "log1mexp"]


@pytest.mark.parametrize("name", [*REFERENCES, "log1p minus"])
def test_plain_pytorch_in_float32(name):
    assert_bounds(*of_reference(name, torch.float32), PYTORCH)


@pytest.mark.parametrize("name", REFERENCES)
def test_plain_pytorch_in_float64(name):
    """It is what the kernels are compared with."""
    for error in errors(*of_reference(name, torch.float64)).values():
        assert error * 2.0**-24 < 3e-15


@pytest.mark.parametrize("part", ["value", "slope"])
def test_a_wrong_coefficient_of_plain_pytorch_is_found(part, monkeypatch):
    table = reference.APPROXIMATIONS[torch.float32]
    for k, coefficient in enumerate(getattr(table, part)):
        wrong = [c * (1.01 if j == k else 1) for j, c in enumerate(getattr(table, part))]
        monkeypatch.setitem(reference.APPROXIMATIONS, torch.float32, table._replace(**{part: tuple(wrong)}))
        found = errors(*of_reference("gamma differences", torch.float32))
        del found["trigamma difference"]
        assert any(error > BOUNDS[name][PYTORCH] for name, error in found.items()), coefficient


def test_coefficients_of_stirlings_series():
    table = reference.APPROXIMATIONS[torch.float64]
    for k in range(1, 8):
        bernoulli = float(mpmath.bernoulli(2 * k))
        assert table.value[2 * k - 2] == pytest.approx(bernoulli / (2 * k * (2 * k - 1)), rel=1e-15)
        assert table.slope[2 * k - 1] == pytest.approx(-bernoulli / (2 * k), rel=1e-15)


def test_gradients_of_plain_pytorch():
    """Of both arguments, of a `d` smaller than `t`, of first and second order, also by torch.func."""
    t = torch.tensor([[0.0, 1.0, 2.5], [7.0, 0.25, 30.0]], dtype=torch.float64)
    d = torch.tensor([0.5, 2.0, 1e3], dtype=torch.float64)
    leaves = t.clone().requires_grad_(), d.clone().requires_grad_()
    for function in (reference.gamma_difference, reference.digamma_difference):
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)
    slope = reference.digamma_difference(t, d)
    value, backward = torch.func.vjp(lambda x: reference.gamma_difference(t, x), d)
    torch.testing.assert_close(backward(torch.ones_like(value))[0], slope.sum(0))
    jacobian = torch.func.jacrev(lambda x: reference.gamma_difference(t, x))(d)
    torch.testing.assert_close(jacobian, torch.diag_embed(slope))
    twice = torch.func.jacrev(torch.func.jacrev(lambda x: reference.gamma_difference(t, x).sum()))(d)
    bend = torch.polygamma(1, t + d) - torch.polygamma(1, d)
    torch.testing.assert_close(twice, torch.diag(bend.sum(0)))
    several = torch.vmap(lambda x: reference.gamma_difference(t, x))(torch.stack([d, 2 * d]))
    torch.testing.assert_close(several[1], reference.gamma_difference(t, 2 * d))


def test_plain_pytorch_compiles_as_one_graph():
    def loss(t, d):
        return (reference.gamma_difference(t, d) - reference.log_factorial(t)).sum()

    t, d = torch.tensor([[0.0, 1.0], [7.0, 30.0]]), torch.tensor([0.5, 2.0])
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = d.clone().requires_grad_()
        value = function(t, leaf)
        results.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
    torch.testing.assert_close(results[1], results[0])


def test_dtypes_of_plain_pytorch():
    """Half precision and integers are computed in float32; gradients come in the dtype of their argument."""
    t, d = torch.tensor([0, 1, 200], dtype=torch.uint8), torch.tensor([0.5, 1.0, 3.0], dtype=torch.bfloat16)
    leaf = d.clone().requires_grad_()
    value = reference.gamma_difference(t, leaf)
    value.sum().backward()
    assert value.dtype is torch.float32 and leaf.grad.dtype is torch.bfloat16
    assert torch.equal(value.detach(), reference.gamma_difference(t.float(), d.float()))
    assert reference.log_factorial(t).dtype is torch.float32
    assert reference.gamma_difference(t.float(), d.double()).dtype is torch.float64


@Term
def poisson(parameters, target, SETTINGS: tl.constexpr, FAST: tl.constexpr):
    rate = numerics.exp(parameters[0], FAST)
    return tl.fma(-target, parameters[0], rate) + special.log_factorial(target, FAST), (rate - target,)


@dataclass(frozen=True)
class Counts(Likelihood):
    parameters = ("log_rate",)
    target = "number"
    roundings = (14, 5)
    term = poisson

    def formula(self, log_rate: Tensor, target: Tensor) -> Tensor:
        return torch.exp(log_rate) - target * log_rate + reference.log_factorial(target)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        log_rate = 0.7 * torch.randn(shape, generator=generator)
        return log_rate, torch.poisson(torch.exp(log_rate), generator)


def test_a_term_has_them(device):
    del globals()["special"]  # `Term` puts it there
    check(Counts(), device=device)
    assert globals()["special"] is special
