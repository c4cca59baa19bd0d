"""sigmoid_mse_loss: the kernels against the reference in float64, within the bound of bounds.py.

`check` is the heart of this file: it runs the fused operation forward and backward and compares everything that comes
out of it. Most tests only choose its inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastvae
import fastvae.functional as F
from bounds import assert_within
from conftest import Launches, plan_anew
from fastvae.kernels import INTERPRETED, elementwise, tiles
from fastvae.kernels import launch as launching
from fastvae.kernels import likelihood as kernels
from fastvae.nn import SigmoidMSELoss
from fastvae.reference import likelihood as reference
from layouts import LAYOUTS, assert_strides_of, memory

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("none", "batchmean", "sum", "mean")
TERM, GRADIENT = 20, 28  # roundings, from the kernels' docstrings
EVENT_4D = (3, 4, 5)


# ------------------------------------------------------------------------------------------------------------ inputs


def draw(shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits of a spread that saturates some sigmoids, and targets in [0, 1], float32 on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(shape, generator=generator), torch.rand(shape, generator=generator)


def make(
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    target_dtype: torch.dtype | None = None,
    layouts: tuple[str, str] = ("contiguous", "contiguous"),
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    logits, target = draw(shape, seed)
    target_dtype = target_dtype or dtype
    target = (255 * target).round().to(torch.uint8) if target_dtype is torch.uint8 else target.to(target_dtype)
    return LAYOUTS[layouts[0]](logits.to(device, dtype)), LAYOUTS[layouts[1]](target.to(device))


# ------------------------------------------------------------------------------------------------------------ oracle


class Oracle(NamedTuple):
    """What float64 says, and the condition scale S of each number."""

    loss: Tensor
    loss_scale: Tensor
    logits_grad: Tensor
    logits_grad_scale: Tensor
    target_grad: Tensor
    target_grad_scale: Tensor


def in_float64(target: Tensor) -> Tensor:
    target = target.detach().cpu()
    return target.double() / 255 if target.dtype is torch.uint8 else target.double()


def levels(n: int) -> int:
    """Roundings of a sum of n terms: one per level of a tree, and three for how its parts are put together."""
    return math.ceil(math.log2(max(n, 1))) + 3


def condition(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The absolute terms of the error y - t, and those of the slope y * (1 - y).

    The relative condition of e^x is |x|, that of y is |x| * (1 - y), and that of the slope at most |x|. At an infinity
    y is exact.
    """
    x, t = logits.detach().double().cpu(), in_float64(target)
    y, tail, size = torch.sigmoid(x), torch.sigmoid(-x), torch.where(x.isinf(), 0.0, x.abs())
    return y * (1 + size * tail) + t.abs(), y * tail * (1 + size)


def oracle(logits: Tensor, target: Tensor, reduction: str, loss_grad: Tensor) -> Oracle:
    x, t = logits.detach().double().cpu().requires_grad_(), in_float64(target).requires_grad_()
    g = loss_grad.detach().double().cpu()
    loss = reference.sigmoid_mse_loss(x, t, reduction=reduction)
    logits_grad, target_grad = torch.autograd.grad(loss, (x, t), g)
    error, slope = condition(logits, target)
    weight = {"batchmean": x.shape[0], "mean": x.numel()}.get(reduction, 1)
    if reduction == "none":
        g = g.view(-1, *[1] * (x.ndim - 1))
    loss_scale = reference.reduce_event(error**2, reduction)
    error_grad = 2 * g.abs() / weight * error
    return Oracle(loss.detach(), loss_scale, logits_grad, error_grad * slope, target_grad, error_grad)


def check(logits: Tensor, target: Tensor, reduction: str = "batchmean", loss_grad: Tensor | None = None) -> None:
    """The fused loss and its gradients: values, dtypes and strides; and that the inputs are as they were."""
    before = memory(logits).clone(), memory(target).clone()
    logits, target = logits.detach().requires_grad_(), target.detach()
    inputs = [logits, target.requires_grad_()] if target.is_floating_point() else [logits]
    loss = F.sigmoid_mse_loss(logits, target, reduction=reduction)
    if loss_grad is None:
        loss_grad = torch.linspace(-1.5, 2.0, max(loss.numel(), 1), device=loss.device)[: loss.numel()].view(loss.shape)
    gradients = torch.autograd.grad(loss, inputs, loss_grad)

    expected = oracle(logits, target, reduction, loss_grad)
    assert loss.dtype is torch.float32
    n = logits[:1].numel() if reduction == "none" else logits.numel()
    assert_within(loss, expected.loss, expected.loss_scale, TERM + levels(n), "loss")
    for name, tensor, gradient, value, scale in zip(
        ("logits_grad", "target_grad"), inputs, gradients, expected[2::2], expected[3::2], strict=False
    ):
        assert gradient.dtype is tensor.dtype
        assert_strides_of(tensor, gradient)
        assert_within(gradient, value, scale, GRADIENT, name)
    assert torch.equal(before[0], memory(logits)) and torch.equal(before[1], memory(target)), "an input was written"


@contextmanager
def launching_nothing() -> Iterator[None]:
    """The fused path is asked for and nothing is launched."""
    before = Launches.count
    with fastvae.use_backend("triton"):
        yield
    assert Launches.count == before


def use_small_tiles(monkeypatch: pytest.MonkeyPatch, tile_rows: int, tile_columns: int) -> None:
    """Cut problems into tiles of this size: several programs for small tensors. Several rows must be whole."""

    def cut(rows: int, columns: int, itemsize: int) -> tiles.Tiling:
        return tiles.Tiling(rows, columns, min(tile_rows, tiles.power_of_2(rows)), tile_columns, 4)

    plan_anew(monkeypatch)
    monkeypatch.setattr(kernels, "cut", cut)


def fail_in_the_third_program(monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
    """Make a kernel of `module` raise after two of its programs drew their tickets."""
    draw_ticket, drawn = module.drew_last_ticket, []

    def draw_or_fail(ticket_ptr: Any) -> Any:
        if len(drawn) == 2:
            raise RuntimeError("the third program fails")
        drawn.append(ticket_ptr)
        return draw_ticket(ticket_ptr)

    monkeypatch.setattr(module, "drew_last_ticket", draw_or_fail)


# ------------------------------------------------------------------------------------------------ values and gradients


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (3, *EVENT_4D)], ids=str)
def test_values_and_gradients(triton_backend, device, shape, dtype, reduction) -> None:
    check(*make(shape, device, dtype), reduction)


@pytest.mark.parametrize("target_dtype", [*FLOATS, torch.uint8], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_target_of_another_dtype(triton_backend, device, dtype, target_dtype) -> None:
    check(*make((3, 17), device, dtype, target_dtype))
    check(*make((3, 17), device, dtype, target_dtype), "none")


def test_every_byte_is_read_as_a_fraction_of_255(triton_backend, device) -> None:
    target = torch.arange(256, dtype=torch.uint8, device=device)[:, None]
    check(torch.zeros(256, 1, device=device), target, "none")


# A tile has 4096 bytes of each tensor, 1024 or 2048 elements. Longer rows are cut into such tiles if they exceed 4096.
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((1, 1), torch.float32), ((3, 1), torch.float32), ((1, 3), torch.float32), ((300, 5), torch.float32)]
    + [((1, n), torch.float32) for n in (1023, 1024, 1025, 4095, 4096, 4097)]
    + [((2, n), torch.float32) for n in (511, 512, 513, 1023, 1024, 1025, 2047, 2049, 4097)]
    + [((2, n), torch.float16) for n in (1023, 1025, 2047, 2048, 2049, 4097)]
    + [((2, 7, 13, 47), torch.bfloat16), ((1030, 1), torch.float16)],
    ids=str,
)
def test_sizes(triton_backend, device, shape, dtype) -> None:
    check(*make(shape, device, dtype), "sum")
    check(*make(shape, device, dtype), "none")


@pytest.mark.parametrize("shape", [(0, 5), (0, 2, 3, 4), (3, 0), (2, 3, 0, 4), (0, 0)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_empty(device, shape, reduction) -> None:
    """Sums over nothing are 0, means NaN, as in torch."""
    with launching_nothing():
        check(*make(shape, device), reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0)], ids=str)
def test_empty_twice_differentiable(device, shape, reduction) -> None:
    logits, target = make(shape, device)
    with launching_nothing():
        loss = F.sigmoid_mse_loss(logits.requires_grad_(), target, reduction=reduction)
        (gradient,) = torch.autograd.grad(loss.sum(), logits, create_graph=True)
    assert gradient.shape == shape


# ----------------------------------------------------------------------------------------------------------- strides


@pytest.mark.parametrize("which", ["logits", "target", "both"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 5), (3, 4, 5), (3, *EVENT_4D), (2, 2, 3, 2, 3)], ids=str)
def test_layouts(triton_backend, device, shape, layout, which) -> None:
    layouts = (layout if which != "target" else "contiguous", layout if which != "logits" else "contiguous")
    check(*make(shape, device, layouts=layouts))
    if which == "both":
        check(*make(shape, device, torch.bfloat16, torch.uint8, layouts=layouts), "none")


@pytest.mark.parametrize("shape", [(1, 5), (1, 1, 5), (2, 1, 1), (1, *EVENT_4D), (5, 1, 4, 1)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dimensions_of_size_one_have_strides_that_mean_nothing(triton_backend, device, shape, layout) -> None:
    check(*make(shape, device, layouts=(layout, layout)))
    check(*make(shape, device, layouts=(layout, "contiguous")), "none")


@pytest.mark.parametrize("shape", [(3, 2500), (3, 2, 30, 20)], ids=str)
def test_rows_with_gaps_in_several_tiles(triton_backend, device, shape) -> None:
    check(*make(shape, device, layouts=("sliced_batch", "sliced_batch")))


@pytest.mark.parametrize("shape", [(6, 5), (3, 1100)], ids=str)
def test_strides_of_the_upstream_gradient(triton_backend, device, shape) -> None:
    inputs, batch = make(shape, device), shape[0]
    g = torch.linspace(-1, 2, batch * 4, device=device)
    for loss_grad in (
        g[:batch],
        g[::4],
        g.view(batch, 4).t()[1],  # transposed
        g[2].expand(batch),  # as .sum().backward() gives it
        g[: 2 * batch].view(batch, 2)[:, 1],
    ):
        check(*inputs, "none", loss_grad)


@pytest.mark.parametrize("which", [(True, False), (False, True), (True, True)], ids=str)
def test_a_minus_that_is_not_yet_in_memory(triton_backend, device, which) -> None:
    """As x.conj().imag is, here with the strides of a dense tensor."""

    def negated(x: Tensor) -> Tensor:
        x = torch._neg_view(-x)
        assert x.is_neg() and x.is_contiguous()
        return x

    tensors = make((3, 5), device)
    check(*(negated(x) if lazy else x for x, lazy in zip(tensors, which, strict=True)))


class CopyCount(TorchDispatchMode):
    """Counts what is dispatched and moves elements, but for what the interpreter does during a launch."""

    copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("copy_", "clone", "_to_copy") and args[0].dtype is not torch.uint8:
            self.copies += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("layouts", "copied"),
    [
        (("contiguous", "contiguous"), 0),
        (("channels_last", "channels_last"), 0),
        (("transposed", "transposed"), 0),
        (("sliced_batch", "sliced_batch"), 0),
        (("expanded_batch", "expanded_batch"), 0),
        (("contiguous", "channels_last"), 1),
        (("channels_last", "contiguous"), 1),
        (("contiguous", "sliced_batch"), 0),
        (("sliced_batch", "contiguous"), 0),
        (("sliced_inner", "contiguous"), 1),
        (("batch_innermost", "contiguous"), 1),
        (("expanded_inner", "contiguous"), 1),
        (("sliced_inner", "sliced_inner"), 2),
        (("sliced_batch", "channels_last"), 1),
    ],
    ids=str,
)
def test_copies(triton_backend, device, layouts, copied) -> None:
    """One copy of each tensor that cannot be read as it lies; forward and backward read the same."""
    logits, target = make((3, *EVENT_4D), device, layouts=layouts)
    with CopyCount() as count:
        loss = F.sigmoid_mse_loss(logits.requires_grad_(), target, reduction="sum")
    assert count.copies == copied
    with CopyCount() as count:
        torch.autograd.grad(loss, logits, torch.ones_like(loss))
    # A gradient has strides of its own only where the input is not dense in any order with the batch outermost.
    assert count.copies == copied + (layouts[0] == "batch_innermost")


# -------------------------------------------------------------------------------------------------------- the numbers


def truncated(x: Tensor) -> Tensor:
    """float32 to bfloat16 as Triton's interpreter does it."""
    return (x.view(torch.int32) & -(1 << 16)).view(torch.float32).bfloat16()


def rms(x: Tensor) -> float:
    return x.double().cpu().square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_error_is_at_most_twice_that_of_float32_torch(triton_backend, device, dtype) -> None:
    """The RMS error over 32 seeds, a row each."""
    rows = [draw((1, 48), seed) for seed in range(32)]
    logits, target = (torch.cat(tensors).to(device, dtype).requires_grad_() for tensors in zip(*rows, strict=True))
    loss_grad = torch.ones(32, device=device)
    expected = oracle(logits, target, "none", loss_grad)

    def errors(function: Callable[..., Tensor], inputs: tuple[Tensor, Tensor], rounded: Callable[[Tensor], Tensor]):
        loss = function(*inputs, reduction="none")
        gradients = [rounded(g) for g in torch.autograd.grad(loss, inputs, loss_grad)]
        exact = expected.loss, expected.logits_grad, expected.target_grad
        return [rms(a.double().cpu() - e) for a, e in zip((loss, *gradients), exact, strict=True)]

    fused = errors(F.sigmoid_mse_loss, (logits, target), lambda g: g)
    if dtype is torch.bfloat16 and INTERPRETED:
        # Truncation alone has twice the error of rounding: the reference is truncated too.
        inputs = logits.detach().float().requires_grad_(), target.detach().float().requires_grad_()
        plain = errors(reference.sigmoid_mse_loss, inputs, truncated)
    else:
        plain = errors(reference.sigmoid_mse_loss, (logits, target), lambda g: g)
    for name, own, allowed in zip(("loss", "logits_grad", "target_grad"), fused, plain, strict=True):
        assert own <= 2 * allowed, f"{name}: RMS error {own:.3g}, float32 torch has {allowed:.3g}"


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, which the interpreter computes with
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_extreme_values(triton_backend, device, dtype) -> None:
    inf, nan = math.inf, math.nan
    x = torch.tensor([0.0, 1e4, -1e4, inf, -inf, nan]).to(dtype)
    t = torch.tensor([0.0, 1.0, inf, -inf, nan]).to(dtype)
    logits, target = (v.reshape(-1, 1).to(device).requires_grad_() for v in torch.meshgrid(x, t, indexing="ij"))
    loss = F.sigmoid_mse_loss(logits, target, reduction="none")
    gradients = torch.autograd.grad(loss, (logits, target), torch.ones_like(loss))
    expected = oracle(logits, target, "none", torch.ones_like(loss))
    for actual, value, scale in zip((loss, *gradients), expected[::2], expected[1::2], strict=True):
        assert_within(actual, value, scale, GRADIENT)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("x", [0.0, 17.0, -17.0, 40.0, -40.0, 80.0])
def test_gradient_where_the_sigmoid_rounds_to_1(device, x, create_graph, backend) -> None:
    """2 (y - t) y (1 - y), with 1 - y = 1 / (1 + e^x) and not what is left of 1 - 1; and its own gradient."""
    logits = torch.full((2, 3), x, device=device, requires_grad=True)
    target = torch.full_like(logits, 0.25).detach()
    wide = logits.detach().double().requires_grad_()
    y, tail = torch.sigmoid(wide), torch.sigmoid(-wide)
    wanted = (2 * (y - 0.25) * y * tail).detach()
    with fastvae.use_backend(backend):
        loss = F.sigmoid_mse_loss(logits, target, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, logits, create_graph=create_graph)
        kl = torch.zeros(2, device=device)
        _, (fast, _) = F.elbo_value_and_grad(logits.detach(), target, kl, reconstruction_weight=2.0)
    scale = wanted.abs() * (1 + abs(x))
    assert_within(gradient, wanted, scale, GRADIENT)
    assert_within(fast, wanted, scale, GRADIENT)
    if create_graph:
        (second,) = torch.autograd.grad(gradient.sum(), logits)
        slope = y * tail
        exact = 2 * slope * (slope + (y - 0.25) * (tail - y))
        assert_within(second, exact, exact.abs() * (1 + abs(x)) ** 2, GRADIENT)


def test_slope_does_not_cancel(triton_backend, device) -> None:
    """y * (1 - y) is e^-|x| far out on both sides, where 1 - y is 0 in float32 (and in float64 from 37 on)."""
    x = torch.tensor([20.0, 40.0, 60.0, 80.0, -20.0, -40.0, -60.0, -80.0]).view(-1, 1)
    logits = x.to(device).requires_grad_()
    loss = F.sigmoid_mse_loss(logits, torch.full_like(logits, 0.5), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, logits)
    expected = 2 * (torch.sigmoid(x.double()) - 0.5) * torch.sigmoid(x.double()) * torch.sigmoid(-x.double())
    error, slope = condition(x, torch.full_like(x, 0.5))
    assert_within(gradient, expected, 2 * error * slope, GRADIENT)


@pytest.mark.parametrize("shape", [(4, 9), (2, *EVENT_4D)], ids=str)
def test_mean_is_mse_loss(triton_backend, device, shape) -> None:
    logits, target = make(shape, device)
    loss = F.sigmoid_mse_loss(logits, target, reduction="mean")
    expected = torch.nn.functional.mse_loss(torch.sigmoid(logits.double().cpu()), target.double().cpu())
    scale = (condition(logits, target)[0] ** 2).mean()
    assert_within(loss, expected, scale, TERM + levels(logits.numel()))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck_of_the_reference(reduction) -> None:
    inputs = [x.double().requires_grad_() for x in draw((3, 2, 2))]

    def function(logits: Tensor, target: Tensor) -> Tensor:
        return reference.sigmoid_mse_loss(logits, target, reduction=reduction)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


# -------------------------------------------------------------------------------------------------------- reductions


@pytest.mark.parametrize("reduction", ["none", "batchmean"])
@pytest.mark.parametrize("tile", [(1, 4), (1, 8), (1, 32), (1, 64), (2, 64), (4, 64)], ids=str)
def test_any_tile_gives_the_result(triton_backend, device, monkeypatch, tile, reduction) -> None:
    use_small_tiles(monkeypatch, *tile)
    check(*make((5, 37), device), reduction)
    check(*make((3, 11), device, layouts=("sliced_batch", "sliced_batch")), reduction)


@pytest.mark.parametrize("blocks", [(1, 2), (2, 4), (4, 16)], ids=str)
def test_partial_sums_are_read_in_blocks(triton_backend, device, monkeypatch, blocks) -> None:
    use_small_tiles(monkeypatch, 1, 8)
    monkeypatch.setattr(
        kernels, "sum_blocks", lambda groups, count: dict(zip(("GROUPS", "BLOCK"), blocks, strict=True))
    )
    check(*make((3, 21), device), "none")
    check(*make((3, 21), device), "sum")


def run(logits: Tensor, target: Tensor, reduction: str = "sum") -> tuple[Tensor, ...]:
    logits, target = logits.detach().requires_grad_(), target.detach().requires_grad_()
    loss = F.sigmoid_mse_loss(logits, target, reduction=reduction)
    return loss.detach(), *torch.autograd.grad(loss.sum(), (logits, target))


def assert_equal(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> None:
    """Bit by bit."""
    assert len(first) == len(second)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_repeats_bit_by_bit_and_leaves_the_ticket_at_zero(triton_backend, device, monkeypatch, reduction) -> None:
    use_small_tiles(monkeypatch, 1, 16)
    inputs = make((5, 50), device)
    assert_equal(run(*inputs, reduction), run(*inputs, reduction))
    assert launching._tickets
    assert all(ticket.item() == 0 for ticket in launching._tickets.values())


@pytest.mark.skipif(not INTERPRETED, reason="a kernel can be made to raise on the interpreter only")
def test_an_aborted_launch_does_not_poison_the_next(triton_backend, device, monkeypatch) -> None:
    use_small_tiles(monkeypatch, 1, 16)
    inputs = make((1, 80), device)
    expected = run(*inputs)
    with monkeypatch.context() as patch:
        fail_in_the_third_program(patch, elementwise)
        with pytest.raises(Exception, match="the third program fails"):
            run(*inputs)
    assert launching._tickets == {}
    assert_equal(run(*inputs), expected)


# ---------------------------------------------------------------------------------------------------------- autograd


@pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True)], ids=str)
def test_one_launch_forward_and_one_backward_for_what_is_needed(triton_backend, device, needs) -> None:
    inputs = make((5, 300), device)
    both = run(*inputs)[1:]
    needed = [x.requires_grad_() for x, need in zip(inputs, needs, strict=True) if need]
    before = triton_backend.count
    loss = F.sigmoid_mse_loss(*inputs, reduction="sum")
    assert triton_backend.count == before + 1
    gradients = torch.autograd.grad(loss, needed, torch.ones_like(loss))
    assert triton_backend.count == before + 2
    assert_equal(gradients, tuple(g for g, need in zip(both, needs, strict=True) if need))


def test_one_tensor_as_logits_and_target(triton_backend, device) -> None:
    x, _ = make((3, 20), device)
    both = run(x, x)
    (gradient,) = torch.autograd.grad(F.sigmoid_mse_loss(x.requires_grad_(), x, reduction="sum"), x)
    assert torch.equal(gradient, both[1] + both[2])


def test_without_gradients_there_is_no_graph(triton_backend, device) -> None:
    logits, target = make((2, 3), device)
    assert F.sigmoid_mse_loss(logits, target).grad_fn is None
    with torch.no_grad():
        assert F.sigmoid_mse_loss(logits.requires_grad_(), target).grad_fn is None


def test_backward_twice(triton_backend, device) -> None:
    inputs = [x.requires_grad_() for x in make((3, 20), device)]
    loss = F.sigmoid_mse_loss(*inputs)
    assert_equal(torch.autograd.grad(loss, inputs, retain_graph=True), torch.autograd.grad(loss, inputs))


def test_the_loss_may_be_modified_in_place(triton_backend, device) -> None:
    logits, target = make((3, 20), device)
    expected = run(logits, target, "none")
    loss = F.sigmoid_mse_loss(logits.requires_grad_(), target, reduction="none")
    loss += 1
    loss.sum().backward()
    assert torch.equal(loss.detach(), expected[0] + 1)
    assert torch.equal(logits.grad, expected[1])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradient_penalty(triton_backend, device, reduction) -> None:
    """Double backward: its RMS error over 32 seeds, a row each, is at most twice that of the reference in float32."""
    rows = [draw((1, 6), seed) for seed in range(32)]
    logits, target = (torch.cat(tensors) for tensors in zip(*rows, strict=True))

    def penalty_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        inputs = tuple(x.detach().requires_grad_() for x in inputs)
        loss = function(*inputs, reduction=reduction)
        weights = torch.linspace(1, 2, loss.numel(), device=loss.device, dtype=loss.dtype).view(loss.shape)
        weights.requires_grad_()
        first = torch.autograd.grad(loss, inputs, weights, create_graph=True)
        penalty = sum(g.square().sum() for g in first) + first[0].sum()
        return *(g.detach() for g in first), *torch.autograd.grad(penalty, (*inputs, weights))

    exact = penalty_gradients(reference.sigmoid_mse_loss, logits.double(), target.double())
    plain = penalty_gradients(reference.sigmoid_mse_loss, logits.to(device), target.to(device))
    fused = penalty_gradients(F.sigmoid_mse_loss, logits.to(device), target.to(device))
    for a, p, e in zip(fused, plain, exact, strict=True):
        assert rms(a.cpu() - e) <= 2 * rms(p.cpu() - e)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_func_grad(triton_backend, device, dtype) -> None:
    logits, target = make((4, 9), device, dtype)
    gradients = torch.func.grad(F.sigmoid_mse_loss, argnums=(0, 1))(logits, target)
    expected = oracle(logits, target, "batchmean", torch.ones(()))
    # Plain PyTorch computes this gradient, with a factor 1 - y that cancels: its rounding counts as one of y.
    y = torch.sigmoid(logits.double().cpu())
    scale = expected.target_grad_scale * y * (1 + logits.double().cpu().abs())
    assert_within(gradients[0], expected.logits_grad, scale, GRADIENT)
    assert_within(gradients[1], expected.target_grad, expected.target_grad_scale, GRADIENT)


def test_batched_gradients(triton_backend, device) -> None:
    """Several upstream gradients at once, and the Jacobian, which is made in this way."""
    logits, target = make((4, 9), device)
    logits.requires_grad_()
    loss = F.sigmoid_mse_loss(logits, target, reduction="none")
    upstream = torch.eye(4, device=device)
    one_by_one = [torch.autograd.grad(loss, logits, g, create_graph=True)[0] for g in upstream]
    (batched,) = torch.autograd.grad(loss, logits, upstream, is_grads_batched=True, retain_graph=True)
    jacobian = torch.func.jacrev(lambda x: F.sigmoid_mse_loss(x, target, reduction="none"))(logits.detach())
    assert torch.equal(batched, torch.stack(one_by_one)) and torch.equal(batched, jacobian)


def test_vmap_is_refused(device) -> None:
    logits, target = make((2, 3, 4), device)
    with (
        launching_nothing(),
        pytest.raises(NotImplementedError, match=r"negative_log_likelihood does not run under torch\.vmap"),
    ):
        torch.vmap(F.sigmoid_mse_loss)(logits, target)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_dtypes_under_autocast(device, dtype, autocast, backend) -> None:
    """Arithmetic in float32 whatever arrives, float64 on the reference path: autocast changes nothing."""
    inputs = make((3, 5), device, dtype)
    backend = "reference" if dtype is torch.float64 else backend
    with fastvae.use_backend(backend):
        expected = run(*inputs)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            results = run(*inputs)
    assert_equal(results, expected)
    assert [x.dtype for x in results] == [torch.promote_types(dtype, torch.float32), dtype, dtype]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_module(triton_backend, device, reduction) -> None:
    inputs = make((3, 5), device)
    module = SigmoidMSELoss(reduction=reduction)
    assert torch.equal(module(*inputs), F.sigmoid_mse_loss(*inputs, reduction=reduction))
    assert repr(module) == f"SigmoidMSELoss(reduction={reduction!r})"
    assert torch.equal(SigmoidMSELoss()(*inputs), F.sigmoid_mse_loss(*inputs, reduction="batchmean"))


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": [1.0]}, TypeError, "logits must be a torch.Tensor, got list"),
        (
            {"logits": torch.zeros(2, 3, dtype=torch.int64)},
            TypeError,
            "logits must be float16, bfloat16, float32 or float64, got torch.int64",
        ),
        (
            {"logits": torch.zeros(2, 3).to_sparse()},
            TypeError,
            "logits must be a dense tensor, got layout torch.sparse_coo",
        ),
        ({"logits": torch.zeros(3)}, ValueError, "logits must have shape [B, ...] with at least 2 dimensions, got [3]"),
        ({"target": None}, TypeError, "target must be a torch.Tensor, got NoneType"),
        ({"target": torch.zeros(3, 2)}, ValueError, "target must have the shape of logits, [2, 3], got [3, 2]"),
        (
            {"target": torch.zeros(2, 3, dtype=torch.bool)},
            TypeError,
            "target must be uint8 (read as t / 255) or floating point, got torch.bool",
        ),
        (
            {"target": torch.zeros(2, 3, device="meta")},
            ValueError,
            "target must be on the device of logits, {device}, got meta",
        ),
        (
            {"reduction": "average"},
            ValueError,
            "reduction must be one of none, batchmean, sum, mean, got 'average'",
        ),
    ],
)
def test_errors(device, changes, error, message) -> None:
    arguments = {"logits": torch.zeros(2, 3), "target": torch.zeros(2, 3), **changes}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and not value.is_meta:
            arguments[name] = value.to(device)
    with launching_nothing(), pytest.raises(error) as raised:
        F.sigmoid_mse_loss(arguments.pop("logits"), arguments.pop("target"), **arguments)
    assert str(raised.value) == message.format(device=device)


# -------------------------------------------------------------------------------------------------------- everything


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(0, 5), min_size=2, max_size=5).map(tuple),
    layouts=st.tuples(st.sampled_from(list(LAYOUTS)), st.sampled_from(list(LAYOUTS))),
    dtype=st.sampled_from(FLOATS),
    target_dtype=st.sampled_from([*FLOATS, torch.uint8]),
    reduction=st.sampled_from(REDUCTIONS),
)
def test_any_input(triton_backend, device, shape, layouts, dtype, target_dtype, reduction) -> None:
    check(*make(shape, device, dtype, target_dtype, layouts), reduction)
