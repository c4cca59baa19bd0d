"""Every operation of `fastvae.operations` against its specification in float64.

Most tests only choose what `contract.check` is given. What is particular to a family is tested in its own file;
autograd and errors in `test_contract_autograd.py`; launches, bytes, torch.compile and the compiled code in the files of
these names, over the same list.
"""

from __future__ import annotations

import importlib
import itertools
import math
import sys
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastvae
import fastvae.functional as F
from conftest import Launches, plan_anew
from contract import (
    DOCUMENTED,
    EVERY,
    FLOATS,
    OF_LIKELIHOOD,
    ONE_OF_EACH_SHAPE,
    check,
    check_spec,
    default_and_each_sample,
    each,
    noise,
    reductions,
    run,
    small_rows_are_long,  # noqa: F401 - a fixture of every test
    upstream_of,
)
from fastvae.kernels import INTERPRETED, groups, tiles
from fastvae.kernels import launch as launching
from fastvae.likelihoods import Multinomial, NegativeBinomial, ZeroInflatedNegativeBinomial
from fastvae.operations import Operation, Spec
from layouts import LAYOUTS, same_bits, strided
from oracle import in_double

# ------------------------------------------------------------------------------------------------ values and gradients


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@each()
def test_values_and_gradients(operation, dtype, triton_backend, device) -> None:
    shared = operation.likelihood in ONE_OF_EACH_SHAPE and not operation.long_rows
    # A sample of elements that have an axis of their own takes a program: a tenth of a second on the interpreter.
    grouped = operation.likelihood and operation.likelihood.grouped
    for options in reductions(operation) if shared else default_and_each_sample(operation):
        check_spec(operation, Spec((2 if grouped else 5, 7), dtype, device=device), **options)
    check_spec(operation, Spec((2, 4, 1, 3) if grouped else (3, 4, 2, 5), dtype, device=device))


@pytest.mark.parametrize("target_dtype", [*FLOATS, torch.uint8], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@each(OF_LIKELIHOOD, shared=True, long_rows=True)
def test_target_of_another_dtype(operation, dtype, target_dtype, triton_backend, device) -> None:
    check_spec(operation, Spec((3, 17), dtype, target_dtype, device=device))


@each([it for it in OF_LIKELIHOOD if not it.likelihood.grouped])
def test_every_byte(operation, triton_backend, device) -> None:
    """As a fraction of 255, or as a number."""
    tensors = dict(zip(operation.arguments, operation.inputs(Spec((256, 1), device=device)), strict=True))
    tensors["target"] = torch.arange(256, dtype=torch.uint8, device=device)[:, None]
    for options in default_and_each_sample(operation):
        check(operation, tuple(tensors.values()), **options)


# A tile has 4096 bytes of each tensor, 1024 or 2048 elements. Longer rows are cut into such tiles if they exceed 4096;
# of those sizes that 16 does not divide, the rest is a tail. kl is read in blocks of 1024 samples.
SIZES = [((1, 1), torch.float32), ((1030, 1), torch.float32), ((2, 3, 2, 2, 4), torch.bfloat16)]
SIZES += [((1, n), torch.float32) for n in (3, 1023, 1025, 4097)] + [
    ((2, 2049), torch.float16),
    ((1, 4115), torch.float32),
    ((2, 2063), torch.bfloat16),
]


@pytest.mark.parametrize(("shape", "dtype"), SIZES, ids=str)
@each(DOCUMENTED, shared=True)
def test_sizes(operation, shape, dtype, triton_backend, device) -> None:
    for options in default_and_each_sample(operation):
        check_spec(operation, Spec(shape, dtype, device=device), **options)


@pytest.mark.parametrize("shape", [(0, 5), (0, 2, 3), (0, 0), (3, 0), (2, 3, 0, 4)], ids=str)
@each(shared=True)
def test_empty(operation, shape, device) -> None:
    """Sums over nothing are 0 and means NaN, as in torch; gradients are empty. Only a mean of kl is launched for."""
    launches = 1 if shape[0] and "kl" in operation.arguments else 0
    for options in reductions(operation):
        before = Launches.count
        with fastvae.use_backend("triton"):
            check_spec(operation, Spec(shape, device=device), **options)
        assert Launches.count == before + launches * len(operation.directions)


# ----------------------------------------------------------------------------------------------------------- strides


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 4, 3, 2), (1, 6, 1, 4)], ids=str)
@each(DOCUMENTED, shared=True, long_rows=True)
def test_layouts(operation, shape, layout, triton_backend, device) -> None:
    """Of all tensors, and of each alone. A dimension of size 1 has any stride."""
    spec = Spec(shape, device=device)
    plain = operation.inputs(spec)
    laid_out = [t if t.ndim == 1 else LAYOUTS[layout](t.detach()) for t in plain]
    check(operation, tuple(laid_out), **noise(operation, spec))
    for i in range(len(plain)) if len(plain) > 1 and shape == (2, 4, 3, 2) else ():
        check(operation, (*plain[:i], laid_out[i], *plain[i + 1 :]), **noise(operation, spec))


KL_LAYOUTS = {
    "expanded": lambda kl: kl[1:2].expand(3),
    "sliced": lambda kl: torch.stack([kl, kl + 1], 1)[:, 0],
    "column": lambda kl: torch.stack([kl, kl, kl + 1])[2].flip(0),
    "bfloat16": lambda kl: kl.bfloat16(),
    "float16": lambda kl: kl.half(),
}


@pytest.mark.parametrize("layout", KL_LAYOUTS)
@each([it for it in EVERY if "kl" in it.arguments], shared=True)
def test_kl(operation, layout, triton_backend, device) -> None:
    *tensors, kl = operation.inputs(Spec((3, 5), device=device))
    check(operation, (*tensors, KL_LAYOUTS[layout](kl.detach())))


UPSTREAM = {
    "of a sum": lambda grad: grad.new_tensor(0.75).expand(grad.shape),
    "one for all samples": lambda grad: grad[:1].expand(grad.shape),
    "transposed": lambda grad: grad.transpose(0, -1).contiguous().transpose(0, -1),
    "every second": lambda grad: torch.stack((grad, grad), -1)[..., 0],
    "negative": lambda grad: torch._neg_view(-grad),  # as x.conj().imag is: the minus is not in memory
    "missing": lambda grad: None,
}


@pytest.mark.parametrize("layout", UPSTREAM)
@each([it for it in DOCUMENTED if it.backward], shared=True, long_rows=True)
def test_upstream_gradients_of_any_layout(operation, layout, triton_backend, device) -> None:
    """Of each output alone; of a missing one where there are others."""
    spec = Spec((3, 4, 2, 3), device=device)
    tensors = operation.inputs(spec)
    for options in reductions(operation):
        outputs = operation(F, *tensors, **noise(operation, spec), **options)
        for name, output in zip(operation.outputs, outputs, strict=True):
            if (layout == "missing" and len(outputs) > 1) or (layout != "missing" and output.ndim):
                changed = UPSTREAM[layout](upstream_of(name, output.detach()))
                check(operation, tensors, {name: changed}, **noise(operation, spec), **options)


@pytest.mark.parametrize("which", ["first", "last", "all"])
@each(DOCUMENTED, shared=True)
def test_a_minus_that_is_not_yet_in_memory(operation, which, triton_backend, device) -> None:
    spec = Spec((3, 5), device=device)
    tensors = [t.detach() for t in operation.inputs(spec)]
    for i in {"first": [0], "last": [len(tensors) - 1], "all": range(len(tensors))}[which]:
        tensors[i] = torch._neg_view(-tensors[i])
    check(operation, tuple(tensors), **noise(operation, spec))


# -------------------------------------------------------------------------------------------------------- the numbers

INFINITIES = (math.inf, -math.inf, math.nan)
EXTREMES = {
    "mu": (0.0, -1.5, 1e30, *INFINITIES),
    "logvar": (0.0, -0.0, 0.5, -80.0, 80.0, 1e4, -1e4, *INFINITIES),
    "prior_mu": (0.0, -1.5, math.inf, math.nan),
    # Held to a finite exp(-logvar / 4): from -352 on in float32, and from -2836 on in float64, where the specification
    # loses the part of the gradient that is infinite.
    "prior_logvar": (0.0, 80.0, -1e3, 1e4, math.inf, math.nan),
    "target": (0.0, 1.0, *INFINITIES),
    "kl": (1.0, *INFINITIES),
}
PARAMETER = (0.0, 1e4, -1e4, *INFINITIES)
# Their mean and dispersion are positive. Where one of them is infinite, the value is NaN or infinite.
COUNTS = {
    "mean": (0.0, 1e-6, 1.0, 1e4, math.nan),
    "dispersion": (1e-6, 0.5, 1e4, math.nan),
    "zero_logits": (0.0, 40.0, -40.0, 1e4, -1e4, math.nan),
    "target": (0.0, 1.0, 7.0, 1e4, math.nan),
}


def extremes(operation: Operation, name: str) -> tuple[float, ...]:
    if isinstance(operation.likelihood, NegativeBinomial | ZeroInflatedNegativeBinomial) and name != "kl":
        return COUNTS[name]
    if isinstance(operation.likelihood, Multinomial) and name == "target":
        return COUNTS[name]
    return EXTREMES.get(name, PARAMETER)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@each(
    [
        it
        for it in EVERY
        if not ({"kl", "eps", "prior"} & set(it.arguments) or (it.likelihood and it.likelihood.grouped))
    ]
)
def test_extreme_values(operation, dtype, triton_backend, device) -> None:
    """Every combination is a sample, or a dimension, of its own."""
    packed = operation.arguments == ("moments",)
    names = ["mu", "logvar"] if packed else operation.arguments
    pairs = list(itertools.product(*(extremes(operation, name) for name in names)))
    columns = list(torch.tensor(pairs, device=device).to(dtype).T[..., None])
    tensors = [torch.cat(columns, 1)] if packed else columns
    options: dict[str, Any] = {}
    if "none" in operation.reductions:
        options["reduction"] = "none"
    elif "per_dimension" in operation.reductions:
        options["reduction"] = "per_dimension"
        tensors = [torch.cat(columns).T] if packed else [column.T for column in columns]
    if operation.draws_noise:
        z = operation(F, *tensors)[0].detach()
        options["eps"] = torch.full_like(z, -0.7)
    check(operation, tuple(tensors), **options)
    # What was not used adds nothing to a gradient, where a zero times infinity would be NaN.
    for unused in operation.outputs if len(operation.outputs) > 1 else ():
        check(operation, tuple(tensors), {unused: None}, **options)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@each([it for it in EVERY if "kl" in it.arguments], shared=True)
def test_extreme_values_of_one_argument(operation, dtype, triton_backend, device) -> None:
    """Of a sum over all samples: a call for each of them, because one would hide behind another."""
    ordinary = operation.inputs(Spec((1, 1), dtype, device=device))
    for i, (name, tensor) in enumerate(zip(operation.arguments, ordinary, strict=True)):
        for value in extremes(operation, name):
            changed = torch.full_like(tensor.detach(), value)
            check(operation, (*ordinary[:i], changed, *ordinary[i + 1 :]))


def cut_bits(x: Tensor) -> Tensor:
    """float32 to bfloat16 as Triton's interpreter does it, which has twice the error of rounding."""
    return (x.view(torch.int32) & -(1 << 16)).view(torch.float32)


def squared_errors(operation: Operation, spec: Spec, **options: Any) -> tuple[dict[str, float], dict[str, float]]:
    """The mean square of the error of each result, of the fused operation and of the reference in float32."""
    tensors, options = operation.inputs(spec), {**noise(operation, spec), **options}
    fused, grads = run(operation, tensors, **options)
    exact = in_double(operation, tensors, grads, **options).values
    with fastvae.use_backend("reference"):
        wide = tuple(tensor.float() for tensor in tensors)
        plain, _ = run(operation, wide, {name: grad.float() for name, grad in grads.items()}, **options)
    for name, value in fused.items():
        cut = INTERPRETED and value.dtype is torch.bfloat16
        plain[name] = cut_bits(plain[name]) if cut else plain[name].to(value.dtype)
    return tuple(
        {name: (value.double().cpu() - exact[name]).square().mean().item() for name, value in results.items()}
        for results in (fused, plain)
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@each([it for it in DOCUMENTED if "kl" not in it.arguments])
def test_error_is_at_most_twice_that_of_float32_torch(operation, dtype, triton_backend, device) -> None:
    """The RMS error of everything that comes out, of 32 samples or of dimensions. A sample of elements that have an
    axis of their own takes a program, but those that are one element share it.
    """
    grouped = operation.likelihood and operation.likelihood.grouped
    shape = (16, 6) if operation.long_rows else (128, 1) if grouped else (32, 48)
    options = {}
    if operation.reductions:
        options["reduction"] = "none" if "none" in operation.reductions else "per_dimension"
    fused, plain = squared_errors(operation, Spec(shape, dtype, device=device), **options)
    for name in fused:
        assert fused[name] <= 4 * plain[name], name


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@each([it for it in DOCUMENTED if "kl" in it.arguments], shared=True)
def test_error_of_the_bound_is_at_most_twice_that_of_float32_torch(operation, dtype, triton_backend, device) -> None:
    """Over 32 seeds, because each of its values is one number for all samples."""
    errors = [squared_errors(operation, Spec((3, 5), dtype, device=device, seed=seed)) for seed in range(32)]
    for name in errors[0][0]:
        fused, plain = (sum(of[name] for of in each) for each in zip(*errors, strict=True))
        assert fused <= 4 * plain, name


# ---------------------------------------------------------------------------------------------------------- reductions


def use_small_tiles(monkeypatch: pytest.MonkeyPatch, tile_rows: int, tile_columns: int) -> None:
    """Cut problems into tiles of this size: several programs for small tensors. Several rows must be whole."""

    def cut(rows: int, columns: int, itemsize: int, heavy: bool = False) -> tiles.Tiling:
        whole = min(tile_rows, tiles.power_of_2(rows)) if columns <= tile_columns else 1
        return tiles.Tiling(rows, columns, whole, tile_columns, 4)

    plan_anew(monkeypatch)
    importing = [module for name, module in sys.modules.items() if name.startswith("fastvae.kernels.")]
    importing = [module for module in importing if getattr(module, "cut", None) is tiles.cut and module is not tiles]
    assert importing
    for module in importing:
        monkeypatch.setattr(module, "cut", cut)
    monkeypatch.setattr(groups, "cut_elements", lambda elements, *_: min(tile_columns, tiles.power_of_2(elements)))


@pytest.mark.parametrize("tile", [(1, 8), (1, 64), (2, 64)], ids=str)
@each([it for it in DOCUMENTED if "dimensions" not in it.kernels["forward"][0]], shared=True)
def test_any_tile_gives_the_result(operation, tile, triton_backend, device, monkeypatch) -> None:
    use_small_tiles(monkeypatch, *tile)
    for options in default_and_each_sample(operation):
        check_spec(operation, Spec((2, 26), device=device), **options)
    check_spec(operation, Spec((3, 11), device=device, layout=LAYOUTS["sliced_batch"]))


@each(DOCUMENTED, shared=True)
def test_repeats_bit_by_bit_and_leaves_the_ticket_at_zero(operation, triton_backend, device, monkeypatch) -> None:
    use_small_tiles(monkeypatch, 1, 16)
    tensors = operation.inputs(Spec((2, 40), device=device))
    seeds = [{"generator": torch.Generator(device).manual_seed(1)} if operation.draws_noise else {} for _ in range(2)]
    for options in default_and_each_sample(operation):
        (first, _), (second, _) = (run(operation, tensors, **seed, **options) for seed in seeds)
        assert all(same_bits(first[name], second[name]) for name in first)
    assert all(ticket.item() == 0 for ticket in launching._tickets.values())


@pytest.mark.skipif(not INTERPRETED, reason="a kernel can be made to raise on the interpreter only")
@each(
    [it for it in DOCUMENTED if it.outputs != ("z",) and not (it.draws_noise and "dim" in it.kernels["forward"][0])],
    shared=True,
)
def test_an_aborted_launch_does_not_poison_the_next(operation, triton_backend, device, monkeypatch) -> None:
    spec = Spec((40, 64), device=device)  # three programs or more, where the batch is summed
    if "dimensions" not in operation.kernels["forward"][0] and not operation.smaller:
        use_small_tiles(monkeypatch, 1, 16)
        spec = Spec((1, 48), device=device)
    tensors, options = operation.inputs(spec), noise(operation, spec)
    expected, _ = run(operation, tensors, **options)
    module, name = operation.kernels["forward"][0].split(".")
    kernel = getattr(importlib.import_module(f"fastvae.kernels.{module}"), name)
    module = importlib.import_module(kernel.fn.__module__)
    draw_ticket, drawn = module.drew_last_ticket, []

    def draw_or_fail(ticket_ptr: Any) -> Any:
        if len(drawn) == 2:
            raise RuntimeError("the third program fails")
        drawn.append(ticket_ptr)
        return draw_ticket(ticket_ptr)

    with monkeypatch.context() as patch:
        patch.setattr(module, "drew_last_ticket", draw_or_fail)
        with pytest.raises(Exception, match="the third program fails"):
            run(operation, tensors, **options)
    assert launching._tickets == {}
    again, _ = run(operation, tensors, **options)
    assert all(same_bits(again[name], expected[name]) for name in expected)


# -------------------------------------------------------------------------------------------------------- everything


@st.composite
def any_layout(draw: Any, ndim: int) -> Any:
    """A layout by name, or an order of the dimensions in memory, the steps between elements, and what is expanded."""
    if draw(st.booleans()):
        return LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))]
    order = draw(st.permutations(range(ndim)))
    steps = draw(st.lists(st.sampled_from([1, 1, 1, 2]), min_size=ndim, max_size=ndim))
    expanded = draw(st.lists(st.sampled_from([False, False, False, False, True]), min_size=ndim, max_size=ndim))
    return lambda x: strided(x, order, steps, expanded)


@settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    operation=st.sampled_from([it for it in EVERY if it.likelihood in ONE_OF_EACH_SHAPE and not it.long_rows]),
    shape=st.lists(st.integers(0, 5), min_size=2, max_size=5).map(tuple),
    dtype=st.sampled_from(FLOATS),
    target_dtype=st.sampled_from([*FLOATS, torch.uint8]),
    data=st.data(),
)
def test_any_input(triton_backend, device, operation, shape, dtype, target_dtype, data) -> None:
    options = data.draw(st.sampled_from(reductions(operation)))
    spec = Spec(shape, dtype, target_dtype, device=device)
    tensors = [t.detach() for t in operation.inputs(spec)]
    if operation.arguments == ("moments",):
        options = {**options, "dim": data.draw(st.integers(1, len(shape) - 1))}
        tensors = [torch.cat(tensors[0].chunk(2, 1), options["dim"])]
    tensors = [data.draw(any_layout(t.ndim))(t) if t.ndim > 1 else t for t in tensors]
    check(operation, tuple(tensors), **noise(operation, spec), **options)
