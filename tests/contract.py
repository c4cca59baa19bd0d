"""What holds an operation to its contract: the list of operations, and `check`, which runs one forward and backward and
compares everything that comes out of it with the specification in float64, within the bound of bounds.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import fastvae
import fastvae.functional as F
from conftest import Launches, plan_anew
from fastvae.kernels import groups, long_rows, templates
from fastvae.likelihoods import Bernoulli, Multinomial, SigmoidMSE
from fastvae.operations import Operation, Spec, operations
from layouts import assert_strides_of, memory
from oracle import check_results, oracle
from own_likelihood import OWN, LearnedGaussian

EVERY = operations(OWN)
DOCUMENTED = [it for it in EVERY if it.computes]  # without the variants of what is given
OF_LIKELIHOOD = [it for it in EVERY if it.likelihood]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# One parameter, and a target with a slope; two parameters; elements with an axis of their own. None: the operations of
# the posterior.
ONE_OF_EACH_SHAPE = (None, SigmoidMSE(), LearnedGaussian(), Multinomial())
# And with --slow two more. What all likelihoods share needs no others.
ALWAYS_OR_SLOW = (*ONE_OF_EACH_SHAPE, Bernoulli(), *OWN)


# Their kernels are also those of a packed prior and of several samples.
LIKE_ANOTHER = ("gaussian_kl_prior", "gaussian_sample_kl_softplus")


def runs_always(operation: Operation) -> bool:
    """Whether tests of what several operations share run for this one without --slow too."""
    return operation.likelihood in ONE_OF_EACH_SHAPE and operation.name not in LIKE_ANOTHER


def each(operations: Sequence[Operation] = EVERY, *, shared: bool = False, long_rows: bool = False) -> Any:
    """A test of each operation. With `shared` it is one of kernels, launchers and Functions, which are the same for
    all likelihoods: those of one likelihood of each shape run always, a few more, and those of smaller parameters
    with --slow, and if asked for those of long rows, which take long on the interpreter. A test that depends on the
    term of a likelihood runs for all.
    """

    def is_slow(operation: Operation) -> bool:
        return shared and (not runs_always(operation) or operation.long_rows)

    if shared:
        operations = [it for it in operations if it.smaller or it.likelihood in ALWAYS_OR_SLOW]
        operations = [it for it in operations if long_rows or not it.long_rows]
    marked = [pytest.param(it, marks=pytest.mark.slow if is_slow(it) else (), id=it.name) for it in operations]
    return pytest.mark.parametrize("operation", marked)


@pytest.fixture(autouse=True)
def small_rows_are_long(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No program holds a row where long rows are tried, so that they are tried on small tensors, in several blocks."""
    operation = getattr(request.node, "callspec", None) and request.node.callspec.params.get("operation")
    if getattr(operation, "long_rows", False):
        plan_anew(monkeypatch)
        monkeypatch.setattr(long_rows, "_COLUMNS", 4)
        for module in (groups, templates):
            monkeypatch.setattr(module, "LONGEST", 0)


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
    return {"eps": torch.randn(operation.shape_of_z(spec.shape), generator=generator).to(spec.device)}


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
