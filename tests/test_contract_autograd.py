"""Every operation of `fastvae.operations` under autograd, torch.func and autocast, and what it refuses."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastvae
import fastvae.functional as F
from contract import (
    DOCUMENTED,
    EVERY,
    FLOATS,
    check,
    each,
    launching_nothing,
    noise,
    reductions,
    run,
    small_rows_are_long,  # noqa: F401 - a fixture of every test
    upstream_of,
)
from fastvae.operations import Operation, Spec
from layouts import memory, same_bits
from oracle import check_results, in_float64, oracle

DIFFERENTIABLE = [it for it in EVERY if it.backward]
# Of mu = logvar = 0, z is the noise itself, if logvar is one.
DRAWING = [it for it in EVERY if it.draws_noise and "scale" not in it.options]


def leaves_of(operation: Operation, spec: Spec) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The arguments, and the noise of the call."""
    return [t.detach().requires_grad_(t.requires_grad) for t in operation.inputs(spec)], noise(operation, spec)


def roots_of(operation: Operation, tensors: list[Tensor], **options: Any) -> list[Tensor]:
    return list(operation(F, *tensors, **options)[: operation.roots])


def needed(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor.requires_grad]


# --------------------------------------------------------------------------------------------------------- one backward


@each(DIFFERENTIABLE, shared=True)
def test_one_launch_forward_and_one_backward_for_what_is_needed(operation, triton_backend, device) -> None:
    """And what is needed has the same bits, whatever else is."""
    spec = Spec((3, 350), device=device)
    everything, options = leaves_of(operation, spec)
    names = operation.gradients
    roots = roots_of(operation, everything, **options)
    upstream = [upstream_of("", root.detach()) for root in roots]
    leaves = [everything[operation.arguments.index(name)] for name in names]
    expected = dict(zip(names, torch.autograd.grad(roots, leaves, upstream), strict=True))
    for count in range(len(names)):
        for subset in itertools.combinations(names, count):
            tensors = [
                t.detach().requires_grad_(name in subset)
                for name, t in zip(operation.arguments, everything, strict=True)
            ]
            before = triton_backend.count
            roots = roots_of(operation, tensors, **options)
            assert triton_backend.count == before + 1
            assert all(root.requires_grad == bool(subset) for root in roots)
            if subset:
                gradients = torch.autograd.grad(roots, needed(tensors), upstream)
                assert triton_backend.count == before + 2
                kept = [expected[name] for name in operation.arguments if name in subset]
                assert all(map(same_bits, gradients, kept))


@each(DIFFERENTIABLE, shared=True)
def test_backward_twice_gives_the_same_and_writes_nothing(operation, triton_backend, device) -> None:
    """Neither an input nor a result; without grad mode there is no graph."""
    tensors, _ = leaves_of(operation, Spec((3, 20), torch.bfloat16, device=device))
    roots = roots_of(operation, tensors)  # with drawn noise, which backward makes again
    before = [memory(tensor.detach()).clone() for tensor in (*tensors, *roots)]
    first, second = (
        torch.autograd.grad(roots, needed(tensors), [torch.ones_like(r) for r in roots], retain_graph=True)
        for _ in range(2)
    )
    assert all(map(same_bits, first, second))
    assert all(map(torch.equal, before, [memory(tensor.detach()) for tensor in (*tensors, *roots)]))
    with torch.no_grad():
        assert all(root.grad_fn is None for root in roots_of(operation, tensors))


@each([it for it in DIFFERENTIABLE if len(set(it.gradients) - {"kl"}) > 1], shared=True)
def test_one_tensor_for_several_arguments(operation, triton_backend, device) -> None:
    """Its gradient is the sum of theirs."""
    (x, *others), options = leaves_of(operation, Spec((3, 20), device=device))
    same = [name for name in operation.gradients if name != "kl"]
    tensors = [x if name in same else t.detach() for name, t in zip(operation.arguments, (x, *others), strict=True)]
    results, upstream = run(operation, tuple(tensors), **options)
    (gradient,) = torch.autograd.grad(operation(F, *tensors, **options), x, list(upstream.values()))
    assert torch.equal(gradient, sum(results[f"{name}_grad"] for name in same))


@each([it for it in DIFFERENTIABLE if not it.options.get("free_bits")], shared=True)
def test_the_results_may_be_modified_in_place(operation, triton_backend, device) -> None:
    """Not those of free bits, of which backward needs the divergence: there it is an error of torch."""
    tensors, options = leaves_of(operation, Spec((3, 20), device=device))
    results, upstream = run(operation, tuple(tensors), **options)
    outputs = operation(F, *tensors, **options)
    for output in outputs:
        output += 1
    for name, output in zip(operation.outputs, outputs, strict=True):
        assert torch.equal(output.detach(), results[name] + 1), "one result shares memory with another"
    gradients = torch.autograd.grad(outputs, needed(tensors), [upstream[name] for name in operation.outputs])
    wanted = [results[f"{name}_grad"] for name in operation.arguments if f"{name}_grad" in results]
    assert all(map(same_bits, gradients, wanted))


@each([it for it in DIFFERENTIABLE if len(it.outputs) > 1], shared=True)
def test_gradients_of_some_of_the_outputs(operation, triton_backend, device) -> None:
    """Every subset; and an argument that no upstream gradient reaches has none."""
    spec = Spec((3, 5), device=device)
    tensors, options = leaves_of(operation, spec)
    for count in range(1, len(operation.outputs)):
        for used in itertools.combinations(operation.outputs, count):
            check(operation, tuple(tensors), {name: None for name in operation.outputs if name not in used}, **options)
    for create_graph in (False, True):
        for i, name in enumerate(operation.outputs):
            outputs = operation(F, *tensors, **options)
            with fastvae.use_backend("reference"):
                plain = operation(F, *tensors, **options)
            found, wanted = (
                torch.autograd.grad(of[i].sum(), needed(tensors), create_graph=create_graph, allow_unused=True)
                for of in (outputs, plain)
            )
            # The reference keeps a zero for logvar where there is none; the fused path may not lose a gradient.
            assert all(g is not None for g, w in zip(found, wanted, strict=True) if w is not None), name


@each(DRAWING)
def test_backward_makes_the_noise_of_forward_again(operation, triton_backend, device) -> None:
    """Gradients, also differentiable ones and those of torch.func, are those of the noise that was drawn; the next call
    draws other noise.
    """
    tensors, _ = leaves_of(operation, Spec((3, 4, 5), device=device))
    generator = torch.Generator(device)
    zeros = [torch.zeros_like(tensor).detach() for tensor in tensors]
    drawn = operation(F, *zeros, generator=generator.manual_seed(3))[0]
    again = operation(F, *zeros, generator=generator)[0]
    assert (drawn != again).all()
    for create_graph in (False, True):
        roots = roots_of(operation, tensors, generator=generator.manual_seed(3))
        upstream = {n: upstream_of(n, root.detach()) for n, root in zip(operation.outputs, roots, strict=True)}
        gradients = torch.autograd.grad(roots, needed(tensors), list(upstream.values()), create_graph=create_graph)
        results = dict(zip(operation.outputs, roots, strict=True))
        results |= {f"{name}_grad": grad for name, grad in zip(operation.gradients, gradients, strict=True)}
        check_results(results, oracle(operation, tuple(tensors), upstream, eps=drawn))

    def loss(*tensors: Tensor) -> Tensor:
        roots = roots_of(operation, list(tensors), generator=generator.manual_seed(3))
        return sum((root * upstream[name]).sum() for name, root in zip(operation.outputs, roots, strict=True))

    transformed = torch.func.grad(loss, argnums=tuple(range(len(tensors))))(*[t.detach() for t in tensors])
    assert all(map(torch.equal, transformed, gradients))


# ----------------------------------------------------------------------------------------- backward that is transformed


Given = tuple[list[Tensor], dict[str, Any]]  # the tensors of a call, and its options


def penalty_gradients(operation: Operation, calls: list[Given]) -> list[Tensor]:
    """The gradients, and those of a penalty on them, in the inputs and in the upstream gradients: those of all calls
    in one tensor each.
    """
    roots = [root for tensors, options in calls for root in operation(F, *tensors, **options)]
    leaves = [leaf for tensors, _ in calls for leaf in needed(tensors)]
    weights = [upstream_of("", root.detach()).requires_grad_() for root in roots]
    first = torch.autograd.grad(roots, leaves, weights, create_graph=True, materialize_grads=True)
    penalty = sum(gradient.square().sum() + gradient.sum() for gradient in first)
    second = torch.autograd.grad(penalty, [*leaves, *weights], materialize_grads=True)
    of_leaves, of_roots = len(leaves) // len(calls), len(roots) // len(calls)
    parts = ((first, of_leaves), (second[: len(leaves)], of_leaves), (second[len(leaves) :], of_roots))
    return [torch.cat([g.detach().flatten() for g in part[i::n]]) for part, n in parts for i in range(n)]


def in_double(call: Given) -> Given:
    tensors, options = call
    wide = [in_float64(tensor).requires_grad_(tensor.requires_grad) for tensor in tensors]
    return wide, {name: in_float64(value) for name, value in options.items()}


@each(DIFFERENTIABLE, shared=True)
def test_gradient_penalty(operation, triton_backend, device) -> None:
    """Double backward: its RMS error, of 32 samples or over 32 seeds, is at most twice that of the reference in
    float32.
    """
    for reduction in operation.reductions or (None,):
        options = {} if reduction is None else {"reduction": reduction}
        alone = reduction in ("none", "per_dimension") or operation.outputs == ("z",)
        calls = []
        for seed in range(1 if alone else 32):
            tensors, eps = leaves_of(operation, Spec((32, 6) if alone else (2, 3), device=device, seed=seed))
            calls.append((tensors, {**options, **eps}))
        fused = penalty_gradients(operation, calls)
        with fastvae.use_backend("reference"):
            plain = penalty_gradients(operation, calls)
            exact = penalty_gradients(operation, [in_double(call) for call in calls])
        for i, value in enumerate(exact):
            error, allowed = ((results[i].double().cpu() - value).norm() for results in (fused, plain))
            assert error <= 2 * allowed, f"{reduction}, result {i}"


@pytest.mark.parametrize("shape", [(0, 5), (3, 0)], ids=str)
@each(DIFFERENTIABLE, shared=True)
def test_empty_twice_differentiable(operation, shape, device) -> None:
    for options in reductions(operation):
        tensors, eps = leaves_of(operation, Spec(shape, device=device))
        with fastvae.use_backend("triton"):
            roots = roots_of(operation, tensors, **options, **eps)
            gradients = torch.autograd.grad(
                [root.sum() for root in roots], needed(tensors), create_graph=True, materialize_grads=True
            )
        assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in needed(tensors)]


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
@each(DIFFERENTIABLE, shared=True)
def test_func_grad_and_batched_gradients(operation, dtype, triton_backend, device) -> None:
    """The gradients of torch.func.grad, and of several upstream gradients at once, are those of one by one."""
    tensors, options = leaves_of(operation, Spec((4, 9), dtype, device=device))
    roots = roots_of(operation, tensors, **options)
    weights = [upstream_of("", root.detach()) for root in roots]
    positions = tuple(operation.arguments.index(name) for name in operation.gradients)

    def loss(*tensors: Tensor) -> Tensor:
        return sum((r * w).sum() for r, w in zip(roots_of(operation, list(tensors), **options), weights, strict=True))

    leaves = [tensors[position] for position in positions]
    one_by_one = [torch.autograd.grad(roots, leaves, [f * w for w in weights], create_graph=True) for f in (1, -2)]
    transformed = torch.func.grad(loss, argnums=positions)(*[tensor.detach() for tensor in tensors])
    assert all(map(torch.equal, transformed, one_by_one[0]))
    both = [torch.stack((w, -2 * w)) for w in weights]
    batched = torch.autograd.grad(roots, leaves, both, is_grads_batched=True)
    if operation.likelihood and operation.likelihood.grouped:
        # torch may add along an axis in another order where there is a batch of gradients, so not in equal bits.
        for i, factor in enumerate((1, -2)):
            upstream = dict(zip(operation.outputs, [factor * w for w in weights], strict=False))
            found = {f"{name}_grad": b[i] for name, b in zip(operation.gradients, batched, strict=True)}
            check_results(found, oracle(operation, tuple(tensors), upstream, **options))
        return
    assert all(
        torch.equal(b, torch.stack(each)) for b, each in zip(batched, zip(*one_by_one, strict=True), strict=True)
    )


@each(DIFFERENTIABLE, shared=True)
def test_vmap_is_refused_in_a_sentence(operation, device) -> None:
    tensors = [torch.stack((t, t)).detach() for t in operation.inputs(Spec((3, 4), device=device))]
    function = operation.function.replace("sigmoid_mse_loss", "negative_log_likelihood")  # which it calls
    with (
        launching_nothing(),
        pytest.raises(NotImplementedError, match=rf"{function[:15]}.* does not run under torch\.vmap: .*batch"),
    ):
        torch.vmap(lambda *tensors: operation(F, *tensors), randomness="different")(*tensors)


@each([it for it in EVERY if it.backward is None], shared=True)
def test_what_has_its_gradient_has_no_graph(operation, triton_backend, device) -> None:
    tensors = [t.detach().requires_grad_() for t in operation.inputs(Spec((3, 4), device=device))]
    assert not any(output.requires_grad for output in operation(F, *tensors))


@each([it for it in EVERY if it.backward is None], shared=True)
def test_what_has_its_gradient_is_not_transformed(operation, device) -> None:
    first, *others = operation.inputs(Spec((3, 4), device=device))
    with launching_nothing(), pytest.raises(NotImplementedError, match=f"{operation.function} does not run under"):
        torch.func.grad(lambda tensor: operation(F, tensor, *others)[0])(first)


# --------------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
@each(DOCUMENTED, shared=True)
def test_autocast_changes_nothing(operation, dtype, device) -> None:
    """Arithmetic in float32 whatever arrives, by the reference too, which leaves float64 as it is."""
    tensors, options = leaves_of(operation, Spec((3, 6), dtype, device=device))

    def fused() -> list[Tensor]:
        return list(run(operation, tuple(tensors), **options)[0].values())

    def reference() -> list[Tensor]:  # without gradients, because torch's own of torch.chunk fails under autocast
        with fastvae.use_backend("reference"):
            return list(operation(F, *tensors, **options))

    for results in (reference,) if dtype is torch.float64 else (fused, reference):
        with fastvae.use_backend("triton"):
            expected = results()
            with torch.autocast(device.type, torch.bfloat16):
                assert all(map(same_bits, results(), expected))
    tensors = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    assert all(wide.to(of.dtype).equal(of) for wide, of in zip(reference(), expected, strict=True))


@each(DOCUMENTED, shared=True)
def test_float64_is_refused_or_computed_by_the_reference(operation, device) -> None:
    """A single float64 among the tensors is enough, so that nothing is rounded unasked."""
    tensors, options = leaves_of(operation, Spec((3, 6), device=device))
    wide = [tensor.detach().double() for tensor in tensors]
    with launching_nothing():
        for i in range(len(tensors)):
            mixed = [
                w if i == j or operation.likelihood is None else t
                for j, (t, w) in enumerate(zip(tensors, wide, strict=True))
            ]
            with pytest.raises(RuntimeError, match='"triton" was asked for but cannot run: float64 is computed by the'):
                operation(F, *mixed, **options)
            with fastvae.use_backend("auto"):
                values = dict(zip(operation.outputs, operation(F, *mixed, **options), strict=True))
            assert all(value.dtype is torch.float64 for name, value in values.items() if not name.endswith("_grad"))
            with fastvae.use_backend("reference"):
                assert all(map(torch.equal, values.values(), operation(F, *mixed, **options)))
        if options:
            with pytest.raises(RuntimeError, match="float64"):
                operation(F, *tensors, eps=options["eps"].double())


# --------------------------------------------------------------------------------------------------------------- errors

Wrong = tuple[Any, type[Exception], str]  # an argument, and how it is refused


def wrong_first(name: str, tensor: Tensor) -> list[Wrong]:
    rank = f"{name} must have shape [B, ...] with at least 2 dimensions, got"
    return [
        ([[1.0]], TypeError, f"{name} must be a torch.Tensor, got list"),
        (tensor.int(), TypeError, f"{name} must be float16, bfloat16, float32 or float64, got torch.int32"),
        (tensor > 0, TypeError, f"{name} must be float16, bfloat16, float32 or float64, got torch.bool"),
        (tensor.to_sparse(), TypeError, f"{name} must be a dense tensor, got layout torch.sparse_coo"),
        (tensor.flatten(), ValueError, f"{rank} [{tensor.numel()}]"),
        (tensor.sum(), ValueError, f"{rank} []"),
    ]


def wrong_like(name: str, first: str, tensor: Tensor) -> list[Wrong]:
    shape, device = list(tensor.shape), tensor.device
    return [
        (None, TypeError, f"{name} must be a torch.Tensor, got NoneType"),
        (
            tensor[:, 1:],
            ValueError,
            f"{name} must have the shape of {first}, {shape}, got {[shape[0], shape[1] - 1, *shape[2:]]}",
        ),
        (tensor.to_sparse(), TypeError, f"{name} must be a dense tensor, got layout torch.sparse_coo"),
        (tensor.to("meta"), ValueError, f"{name} must be on the device of {first}, {device}, got meta"),
    ]


def wrong_parameter(name: str, first: str, tensor: Tensor) -> list[Wrong]:
    """Of a likelihood, but not its first; it may be smaller than that."""
    shape = [4, 6]
    broadcast = f"{name} must have the shape of {first}, {shape}, or one that is broadcast to it, such as [1], got"
    dtypes = f"{name} must be float16, bfloat16, float32 or float64, got"
    return [
        (None, TypeError, f"{name} must be a torch.Tensor, got NoneType"),
        (tensor.to_sparse(), TypeError, f"{name} must be a dense tensor, got layout torch.sparse_coo"),
        (tensor[..., 1:], ValueError, f"{broadcast} {[*tensor.shape[:-1], tensor.shape[-1] - 1]}"),
        (tensor[None, None], ValueError, f"{broadcast} {[1, 1, *tensor.shape]}"),
        (tensor.int(), TypeError, f"{dtypes} torch.int32"),
        (tensor.to("meta"), ValueError, f"{name} must be on the device of {first}, {tensor.device}, got meta"),
    ]


def wrong_target(name: str, first: str, tensor: Tensor) -> list[Wrong]:
    expected = "target must be uint8 (read as t / 255) or floating point, got"
    return [
        *wrong_like(name, first, tensor),
        (tensor > 0, TypeError, f"{expected} torch.bool"),
        (tensor.int(), TypeError, f"{expected} torch.int32"),
    ]


def wrong_logvar(name: str, first: str, tensor: Tensor) -> list[Wrong]:
    half = (tensor.half(), TypeError, "logvar must have the dtype of mu, torch.float32, got torch.float16")
    return [*wrong_like(name, first, tensor), half]


def wrong_kl(name: str, first: str, tensor: Tensor) -> list[Wrong]:
    expected = f"kl must be the divergence of each sample, shape [{len(tensor)}] (reduction='none'), got"
    return [
        (1.0, TypeError, "kl must be a floating-point tensor, got float"),
        (tensor.long(), TypeError, "kl must be a floating-point tensor, got torch.int64"),
        (tensor.sum(), ValueError, f"{expected} []"),
        (tensor[1:], ValueError, f"{expected} [{len(tensor) - 1}]"),
        (tensor.to_sparse(), TypeError, "kl must be a dense tensor, got layout torch.sparse_coo"),
        (tensor.to("meta"), ValueError, f"kl must be on the device of {first}, {tensor.device}, got meta"),
    ]


def wrong_eps(name: str, first: str, tensor: Tensor) -> list[Wrong]:
    shape = list(tensor.shape)
    return [
        (1.0, TypeError, "eps must be a floating-point tensor, got float"),
        (tensor.int(), TypeError, "eps must be a floating-point tensor, got torch.int32"),
        (tensor[1:], ValueError, f"eps must have the shape of z, {shape}, got {[shape[0] - 1, *shape[1:]]}"),
        (tensor.to("meta"), ValueError, f"eps must be on the device of {first}, {tensor.device}, got meta"),
        (
            tensor.requires_grad_(),
            ValueError,
            "eps must not require grad: it is noise, not a parameter; pass eps.detach()",
        ),
    ]


def wrong_prior(name: str, first: str, tensor: Tensor) -> list[Wrong]:
    """Of two halves the first or the second, or both in one tensor."""
    called = {"prior_mu": "prior[0]", "prior_logvar": "prior[1]"}.get(name, name)
    shape, device = list(tensor.shape), tensor.device
    expected = (
        f"{called} must have shape {shape}, or {[1, *shape[1:]]} or {shape[1:]} for one prior of all samples, got"
    )
    dtypes = f"{called} must be float16, bfloat16, float32 or float64, got"
    return [
        *([] if called == name else [(None, TypeError, f"{called} must be a torch.Tensor, got NoneType")]),
        (tensor.int(), TypeError, f"{dtypes} torch.int32"),
        (tensor[:, 2:], ValueError, f"{expected} {[shape[0], shape[1] - 2, *shape[2:]]}"),
        (tensor.to_sparse(), TypeError, f"{called} must be a dense tensor, got layout torch.sparse_coo"),
        (tensor.to("meta"), ValueError, f"{called} must be on the device of {first}, {device}, got meta"),
    ]


WRONG: dict[str, Callable[[str, str, Tensor], list[Wrong]]] = {
    "logvar": wrong_logvar, "target": wrong_target, "kl": wrong_kl, "eps": wrong_eps,
    "prior_mu": wrong_prior, "prior_logvar": wrong_prior, "prior": wrong_prior,
}  # fmt: skip


@each(DOCUMENTED + [it for it in EVERY if "eps" in it.arguments], shared=True)
def test_wrong_arguments_are_refused_before_any_launch(operation, device) -> None:
    """Each argument alone, with the whole message."""
    spec = Spec((4, 6), device=device)
    tensors = [tensor.detach() for tensor in operation.inputs(spec)]
    first = operation.arguments[0]
    with launching_nothing():
        for i, (name, tensor) in enumerate(zip(operation.arguments, tensors, strict=True)):
            own = operation.likelihood and name in operation.likelihood.parameters  # such as a logvar, of any dtype
            wrong_other = wrong_parameter if own else WRONG.get(name, wrong_like)
            wrong = wrong_other(name, first, tensor.clone()) if i else wrong_first(name, tensor)
            for value, error, message in wrong:
                if operation.target_kind == "number":
                    message = message.replace("t / 255", "t")
                with pytest.raises(error) as raised:
                    operation(F, *tensors[:i], value, *tensors[i + 1 :])
                assert str(raised.value) == message
        if operation.reductions:
            accepted = ("none", "batchmean", "sum", "mean", *(["per_dimension"] if not operation.likelihood else []))
            with pytest.raises(ValueError) as raised:
                operation(F, *tensors, reduction="average")
            assert str(raised.value) == f"reduction must be one of {', '.join(accepted)}, got 'average'"
