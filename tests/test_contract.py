"""Every operation of `fastvae.operations` against its specification in float64, within the bound of bounds.py.

`check` is the heart of this file: it runs an operation forward and backward and compares everything that comes out of
it. Most tests only choose its inputs. What is particular to a family is tested in its own file; autograd and errors in
`test_contract_autograd.py`; launches, bytes, torch.compile and the compiled code in the files of these names, over the
same list.
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastvae
import fastvae.functional as F
from conftest import Launches, plan_anew
from fastvae.kernels import INTERPRETED, tiles
from fastvae.kernels import launch as launching
from fastvae.likelihoods import SigmoidMSE
from fastvae.operations import Operation, Spec, kernel_names, operations
from layouts import LAYOUTS, assert_strides_of, memory, same_bits
from oracle import check_results, oracle
from own_likelihood import OWN

EVERY = operations(OWN)
DOCUMENTED = [it for it in EVERY if it.computes]  # without the variants of what is given
OF_LIKELIHOOD = [it for it in EVERY if it.likelihood]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def each(operations: Any = EVERY) -> Any:
    """Of the likelihoods but the first, only the loss is tried without --slow: the bound has the same two kernels."""

    def is_slow(operation: Operation) -> bool:
        first = operation.likelihood in (None, SigmoidMSE())
        return not first and (operation.function != "negative_log_likelihood" or "target" in operation.gradients)

    marked = [pytest.param(it, marks=pytest.mark.slow if is_slow(it) else (), id=it.name) for it in operations]
    return pytest.mark.parametrize("operation", marked)


def reductions(operation: Operation) -> list[dict[str, str]]:
    """The options of a call with each reduction."""
    return [{"reduction": it} for it in operation.reductions] or [{}]


def default_and_each_sample(operation: Operation) -> list[dict[str, str]]:
    return [{}, {"reduction": "none"}] if "none" in operation.reductions else [{}]


def noise(operation: Operation, spec: Spec) -> dict[str, Tensor]:
    """The noise of a call, given, so that float64 has the same."""
    if not operation.draws_noise:
        return {}
    generator = torch.Generator().manual_seed(spec.seed + 1)
    return {"eps": torch.randn(spec.shape, generator=generator).to(spec.device)}


def upstream_of(name: str, output: Tensor) -> Tensor:
    """A gradient of widely different sizes and signs, but not 0 for one that is alone."""
    count = output.numel()
    values = torch.linspace(2.0, -1.5, max(count, 1))[:count].to(output.device, output.dtype)
    return values.view(output.shape) * {"reconstruction": -0.6, "kl": 1.25}.get(name, 1.0)


def run(
    operation: Operation, tensors: tuple[Tensor, ...], upstream: dict[str, Tensor | None] | None = None, **options: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What comes out of a call and its backward pass, by name, and the upstream gradients. `upstream`: those that are
    not to be chosen here; None for an output that is not used.
    """
    tensors = [
        t.detach().requires_grad_(name in operation.gradients and t.is_floating_point())
        for name, t in zip(operation.arguments, tensors, strict=True)
    ]
    outputs = dict(zip(operation.outputs, operation(F, *tensors, **options), strict=True))
    grads = {name: upstream_of(name, output.detach()) for name, output in outputs.items() if output.requires_grad}
    grads = {name: grad for name, grad in {**grads, **(upstream or {})}.items() if grad is not None}
    results = {name: output.detach() for name, output in outputs.items()}
    if grads:
        leaves = dict(zip(operation.arguments, tensors, strict=True))
        leaves = {name: tensor for name, tensor in leaves.items() if tensor.requires_grad}
        gradients = torch.autograd.grad(
            [outputs[name] for name in grads], list(leaves.values()), list(grads.values()), materialize_grads=True
        )
        results |= {f"{name}_grad": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return results, grads


def check(
    operation: Operation, tensors: tuple[Tensor, ...], upstream: dict[str, Tensor | None] | None = None, **options: Any
) -> None:
    """Values, dtypes and strides of what comes out; and that the inputs and upstream gradients are as they were."""
    every = [t for t in (*tensors, *(upstream or {}).values(), *options.values()) if isinstance(t, Tensor)]
    before = [memory(tensor).clone() for tensor in every]
    results, grads = run(operation, tensors, upstream, **options)
    check_results(results, oracle(operation, tensors, grads, **options))
    arguments = dict(zip(operation.arguments, tensors, strict=True))
    for name, result in results.items():
        of = arguments.get(name.removesuffix("_grad"))
        if name.endswith("_grad"):
            assert result.dtype is of.dtype, name
            assert_strides_of(of, result)
        else:
            assert result.dtype is (tensors[0].dtype if name == "z" else torch.float32), name
    for tensor, bytes_before in zip(every, before, strict=True):
        assert torch.equal(memory(tensor), bytes_before), "an input was written"


def check_spec(operation: Operation, spec: Spec, **options: Any) -> None:
    check(operation, operation.inputs(spec), **noise(operation, spec), **options)


@contextmanager
def launching_nothing() -> Iterator[None]:
    """The fused path is asked for and nothing is launched."""
    before = Launches.count
    with fastvae.use_backend("triton"):
        yield
    assert Launches.count == before


# ------------------------------------------------------------------------------------------------ values and gradients


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@each()
def test_values_and_gradients(operation, dtype, triton_backend, device) -> None:
    for options in reductions(operation):
        check_spec(operation, Spec((5, 7), dtype, device=device), **options)
    check_spec(operation, Spec((3, 4, 2, 5), dtype, device=device))


@pytest.mark.parametrize("target_dtype", [*FLOATS, torch.uint8], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@each(OF_LIKELIHOOD)
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
# of those sizes that 16 does not divide, the rest is a tail.
SIZES = [((1, 1), torch.float32), ((300, 1), torch.float32), ((2, 3, 2, 2, 4), torch.bfloat16)]
SIZES += [((1, n), torch.float32) for n in (3, 1023, 1025, 4097)] + [
    ((2, 2049), torch.float16),
    ((1, 4115), torch.float32),
    ((2, 2063), torch.bfloat16),
]


@pytest.mark.parametrize(("shape", "dtype"), SIZES, ids=str)
@each(DOCUMENTED)
def test_sizes(operation, shape, dtype, triton_backend, device) -> None:
    for options in default_and_each_sample(operation):
        check_spec(operation, Spec(shape, dtype, device=device), **options)


@pytest.mark.parametrize("shape", [(0, 5), (0, 2, 3), (0, 0), (3, 0), (2, 3, 0, 4)], ids=str)
@each()
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
@pytest.mark.parametrize("shape", [(3, 5), (2, 4, 3, 2), (1, 6, 1, 4)], ids=str)
@each(DOCUMENTED)
def test_layouts(operation, shape, layout, triton_backend, device) -> None:
    """Of all tensors, and of each alone."""
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
@each([it for it in EVERY if "kl" in it.arguments])
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
@each([it for it in DOCUMENTED if it.backward])
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
@each(DOCUMENTED)
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
    "target": (0.0, 1.0, *INFINITIES),
    "kl": (1.0, *INFINITIES),
}
PARAMETER = (0.0, 1e4, -1e4, *INFINITIES)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")  # numpy's, of the interpreter
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@each([it for it in DOCUMENTED if it.likelihood is None or not it.likelihood.grouped])
def test_extreme_values(operation, dtype, triton_backend, device) -> None:
    """Every pair is a sample, or a dimension, of its own; a call of its own where all are summed, because one would
    hide behind another.
    """
    packed = operation.arguments == ("moments",)
    names = ["mu", "logvar"] if packed else [name for name in operation.arguments if name != "kl"]
    pairs = list(itertools.product(*(EXTREMES.get(name, PARAMETER) for name in names)))
    columns = list(torch.tensor(pairs, device=device).to(dtype).T[..., None])
    tensors = [torch.cat(columns, 1)] if packed else columns
    options: dict[str, Any] = {}
    if "none" in operation.reductions:
        options["reduction"] = "none"
    elif "per_dimension" in operation.reductions:
        options["reduction"] = "per_dimension"
        tensors = [torch.cat(columns).T] if packed else [column.T for column in columns]
    if operation.draws_noise:
        options["eps"] = torch.full_like(tensors[0].chunk(2, 1)[0] if packed else tensors[0], -0.7)
    if "kl" not in operation.arguments:
        check(operation, tuple(tensors), **options)
        return
    divergences = [1.0] * len(pairs)
    for kl in EXTREMES["kl"]:
        divergences.append(kl)
        tensors = [torch.cat((t, t[:1])) for t in tensors]
    step = 1 if dtype is torch.float32 else 3
    for i, kl in list(enumerate(divergences))[::step]:
        check(operation, (*[t[i : i + 1] for t in tensors], torch.full((1,), kl, device=device)))


def cut_bits(x: Tensor) -> Tensor:
    """float32 to bfloat16 as Triton's interpreter does it, which has twice the error of rounding."""
    return (x.view(torch.int32) & -(1 << 16)).view(torch.float32)


def squared_errors(operation: Operation, spec: Spec, **options: Any) -> tuple[dict[str, float], dict[str, float]]:
    """The mean square of the error of each result, of the fused operation and of the reference in float32."""
    tensors, options = operation.inputs(spec), {**noise(operation, spec), **options}
    fused, grads = run(operation, tensors, **options)
    exact = oracle(operation, tensors, grads, **options)
    with fastvae.use_backend("reference"):
        wide = tuple(tensor.float() for tensor in tensors)
        plain, _ = run(operation, wide, {name: grad.float() for name, grad in grads.items()}, **options)
    for name, value in fused.items():
        cut = INTERPRETED and value.dtype is torch.bfloat16
        plain[name] = cut_bits(plain[name]) if cut else plain[name].to(value.dtype)
    return tuple(
        {name: (value.double().cpu() - exact[name].value).square().mean().item() for name, value in results.items()}
        for results in (fused, plain)
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@each(DOCUMENTED)
def test_error_is_at_most_twice_that_of_float32_torch(operation, dtype, triton_backend, device) -> None:
    """The RMS error of everything that comes out: of 32 samples, and of what is one number for all of them over 32
    seeds.
    """
    options = {}
    if operation.reductions:
        options["reduction"] = "none" if "none" in operation.reductions else "per_dimension"
    fused, plain = squared_errors(operation, Spec((32, 48), dtype, device=device), **options)
    for seed in range(31) if "reconstruction" in fused else ():
        for total, more in zip(
            (fused, plain), squared_errors(operation, Spec((3, 5), dtype, device=device, seed=seed)), strict=True
        ):
            for name in total:
                total[name] += more[name]
    for name in fused:
        assert fused[name] <= 4 * plain[name], name


# ---------------------------------------------------------------------------------------------------------- reductions


def use_small_tiles(monkeypatch: pytest.MonkeyPatch, tile_rows: int, tile_columns: int) -> None:
    """Cut problems into tiles of this size: several programs for small tensors. Several rows must be whole."""

    def cut(rows: int, columns: int, itemsize: int) -> tiles.Tiling:
        whole = min(tile_rows, tiles.power_of_2(rows)) if columns <= tile_columns else 1
        return tiles.Tiling(rows, columns, whole, tile_columns, 4)

    plan_anew(monkeypatch)
    modules = {name.split(".")[0] for name in kernel_names(operations())} | {"moments"}
    for module in [importlib.import_module(f"fastvae.kernels.{name}") for name in modules]:
        if getattr(module, "cut", None) is tiles.cut:
            monkeypatch.setattr(module, "cut", cut)


@pytest.mark.parametrize("tile", [(1, 8), (1, 64), (2, 64)], ids=str)
@each([it for it in DOCUMENTED if "dimensions" not in it.kernels["forward"]])
def test_any_tile_gives_the_result(operation, tile, triton_backend, device, monkeypatch) -> None:
    use_small_tiles(monkeypatch, *tile)
    for options in default_and_each_sample(operation):
        check_spec(operation, Spec((2, 26), device=device), **options)
    check_spec(operation, Spec((3, 11), device=device, layout=LAYOUTS["sliced_batch"]))


@each(DOCUMENTED)
def test_repeats_bit_by_bit_and_leaves_the_ticket_at_zero(operation, triton_backend, device, monkeypatch) -> None:
    use_small_tiles(monkeypatch, 1, 16)
    tensors = operation.inputs(Spec((2, 40), device=device))
    seeds = [{"generator": torch.Generator(device).manual_seed(1)} if operation.draws_noise else {} for _ in range(2)]
    for options in default_and_each_sample(operation):
        (first, _), (second, _) = (run(operation, tensors, **seed, **options) for seed in seeds)
        assert all(same_bits(first[name], second[name]) for name in first)
    assert all(ticket.item() == 0 for ticket in launching._tickets.values())


@pytest.mark.skipif(not INTERPRETED, reason="a kernel can be made to raise on the interpreter only")
@each([it for it in DOCUMENTED if it.outputs != ("z",) and not (it.draws_noise and "dim" in it.kernels["forward"])])
def test_an_aborted_launch_does_not_poison_the_next(operation, triton_backend, device, monkeypatch) -> None:
    use_small_tiles(monkeypatch, 1, 16)
    # Of the divergence of dimensions the samples are cut.
    spec = Spec((40, 64) if "dimensions" in operation.kernels["forward"] else (1, 48), device=device)
    tensors, options = operation.inputs(spec), noise(operation, spec)
    expected, _ = run(operation, tensors, **options)
    module, name = operation.kernels["forward"].split(".")
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


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    operation=st.sampled_from(EVERY),
    shape=st.lists(st.integers(0, 5), min_size=2, max_size=5).map(tuple),
    layouts=st.lists(st.sampled_from(list(LAYOUTS)), min_size=4, max_size=4),
    dtype=st.sampled_from(FLOATS),
    target_dtype=st.sampled_from([*FLOATS, torch.uint8]),
    data=st.data(),
)
def test_any_input(triton_backend, device, operation, shape, layouts, dtype, target_dtype, data) -> None:
    options = data.draw(st.sampled_from(reductions(operation)))
    spec = Spec(shape, dtype, target_dtype, device=device)
    tensors = [
        LAYOUTS[layout](t.detach()) if t.ndim > 1 else t
        for t, layout in zip(operation.inputs(spec), layouts, strict=False)
    ]
    if operation.arguments == ("moments",):
        dim = data.draw(st.integers(1, len(shape) - 1))
        options = {**options, "dim": dim}
        tensors = [LAYOUTS[layouts[0]](torch.cat([t for t in tensors[0].detach().chunk(2, 1)], dim))]
    check(operation, tuple(tensors), **noise(operation, spec), **options)
