"""The forms of every kernel in Triton's compiler, up to its intermediate code; run in a process of its own by
`test_compiled_forms.py`.

    python tests/compiled_forms.py

The interpreter runs a kernel as Python, and Python accepts what the compiler does not: a line behind a `return` that
is compiled all the same, a variable that changes its type. What does not compile, fails there, before any code is made
for a card; `benchmarks/codegen.py` judges that code, of the forms that are used most.

A form is what makes Triton compile a kernel anew: which arguments are given and of which dtype, and the constants, by
which tiles, layouts and branches are chosen. Of the thousands that the calls below have, so many are compiled that
every two of these choices that some call combines are combined in one that is compiled.

Prints the number of compiled forms by kernel, and what is wrong with those that do not compile, as JSON; and what is
found about a planted kernel in its right and its wrong form.
"""

from __future__ import annotations

import heapq
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
import triton.language as tl
from triton.backends.nvidia.compiler import CUDABackend

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import fastvae.functional as F
from codegen import TARGETS
from fastvae.kernels import batch
from fastvae.likelihoods import ZeroInflatedNegativeBinomial
from fastvae.operations import Operation, Spec, named, of_each_kind, of_smaller, operations
from launches import Launch, record
from pairwise import OBJECTIVES, in_directions, subsets
from traffic import takes_bytes

Given = tuple[list[torch.Tensor], dict[str, Any]]

# Of mu: whole rows per program, of quads and not; rows of several programs, likewise; and one number.
SHAPES = [(6, 8), (5, 3), (40, 10), (3, 9000), (2, 9001), (1, 1)]
# Of packed moments: halves one after the other, in turn by 8, by 3, and by pixels.
PACKED = [((6, 16), 1), ((5, 6), 1), ((3, 2, 8), 1), ((2, 4, 16), 2), ((2, 4, 6), 2), ((3, 18002), 1)]
IMAGES = [(6, 1, 4, 4), (5, 1, 3, 3), (3, 1, 100, 100), (1, 3, 70, 71)]


def channels_last(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype).to(memory_format=torch.channels_last)


def moments(dtype: torch.dtype) -> Iterator[tuple[torch.Tensor, torch.Tensor | None, int]]:
    """(mu, logvar, dim), packed where logvar is None."""
    for shape in SHAPES:
        mu = torch.empty(shape, dtype=dtype)
        yield mu, mu.clone(), 1
    for shape, dim in PACKED:
        yield torch.empty(shape, dtype=dtype), None, dim
    for channels in (6, 16, 32):
        yield channels_last(2, channels, 5, 5, dtype=dtype), None, 1


# Drawn for a whole batch, and for parts of one that start on a quad and do not.
DRAWN = ({}, {"batch_offset": 8}, {"batch_offset": 3})
IMAGE_DTYPES = (
    (torch.float32, torch.float32),
    (torch.float32, torch.uint8),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
)


def of_posterior(operation: Operation, dtype: torch.dtype) -> Iterator[Given]:
    """The tensors, and the options of a call."""
    given = list(moments(dtype))
    if "general_posterior" in operation.kernels["forward"][0]:
        # It has many forms. Those of a dtype differ in loads and stores only.
        given = given[::2] if dtype is torch.float32 else given[::4]
    for mu, logvar, dim in given:
        if (logvar is None) != ("moments" in operation.arguments):
            continue
        z = mu.clone() if logvar is not None else mu.narrow(dim, 0, mu.shape[dim] // 2).clone()
        prior = mu.clone()
        tensors = {"mu": mu, "logvar": logvar, "moments": mu, "eps": z}
        tensors |= {"prior": prior, "prior_mu": prior, "prior_logvar": prior}
        eps = z.new_empty(operation.shape_of_z(z.shape))
        drawn = DRAWN if "samples" not in operation.options else ({},)  # which has no batch_offset
        noises = (*drawn, {"eps": eps}) if operation.draws_noise else ({},)
        for noise, reduction in product(noises, operation.reductions or (None,)):
            options = {} if reduction is None else {"reduction": reduction}
            if logvar is None:
                options["dim"] = dim
            yield [tensors[name] for name in operation.arguments], options | noise


def of_likelihood(operation: Operation, dtype: torch.dtype, target_dtype: torch.dtype) -> Iterator[Given]:
    one = torch.ones(())
    for event in events(operation, dtype, target_dtype):
        if "kl" not in operation.arguments:
            yield from ((event, {"reduction": reduction}) for reduction in operation.reductions)
            continue
        batch = len(event[0])
        scales = ({}, {"grad_scale": 8.0}, {"grad_scale": one}) if operation.backward is None else ({},)
        for beta, kl, scale in product((0.5, one, one.double()), (torch.empty(batch), one.expand(batch)), scales):
            yield [*event, kl], {"beta": beta, **scale}


def events(operation: Operation, dtype: torch.dtype, target_dtype: torch.dtype) -> Iterator[list[torch.Tensor]]:
    """The parameters and the target."""
    if not operation.likelihood.grouped:
        for shape in IMAGES:
            yield [
                torch.empty(shape, dtype=it) for it in (*[dtype] * len(operation.likelihood.parameters), target_dtype)
            ]
        return
    shapes = [(6, 5000), (2000, 4099)] if operation.long_rows else [(6, 3, 20, 32), (7, 1)]
    for shape in shapes:
        spec = Spec(shape, dtype, target_dtype)
        parameters, target = (it.detach() for it in operation.inputs(spec)[:2])
        yield [parameters, target]
        if parameters.ndim == 4:
            yield [it.contiguous(memory_format=torch.channels_last) for it in (parameters, target)]
        if operation.target_kind == "class":
            yield [parameters, target.argmax(1).to(torch.uint8 if target_dtype is torch.uint8 else torch.int64)]


def run(operation: Operation, tensors: list[torch.Tensor], options: dict[str, Any], needs: tuple[str, ...]) -> None:
    """Forward, and backward from every choice of upstream gradients, also such as the gradients of sums are."""
    inputs = [t.detach().requires_grad_(name in needs) for name, t in zip(operation.arguments, tensors, strict=True)]
    outputs = zip(operation.outputs, operation(F, *inputs, **options), strict=True)
    outputs = [(name, output) for name, output in outputs if output.requires_grad]
    choices = []
    for name, output in outputs:
        of_a_sum = [output.new_ones(()).expand(output.shape)] if name != "z" and output.ndim else []
        choices.append([None, torch.empty_like(output), *of_a_sum])
    for upstream in product(*choices):
        used = [(output, grad) for (_, output), grad in zip(outputs, upstream, strict=True) if grad is not None]
        if used:
            roots, grads = zip(*used, strict=True)
            leaves = [t for t in inputs if t.requires_grad]
            torch.autograd.grad(roots, leaves, grads, retain_graph=True, allow_unused=True)


def operation_calls(operation: Operation, given: Iterator[Given]) -> Iterator[Callable[[], Any]]:
    names = operation.gradients
    subsets = [s for n in range(1, len(names) + 1) for s in combinations(names, n)] or [()]
    for (tensors, options), needs in product(given, subsets):
        yield partial(run, operation, tensors, options, needs)


def batch_calls() -> Iterator[Callable[[], Any]]:
    for shape, dtype in product(((9, 1, 28, 28), (9, 3, 5, 5)), (torch.uint8, torch.float32)):
        images = torch.empty(shape, dtype=dtype)
        yield partial(batch.gather_batch, images, torch.arange(4))


def calls() -> Iterator[Callable[[], Any]]:
    every = operations()
    # A term of several slots, and a target of classes, are read by other lines.
    terms = [it for it in every if it.numbers_of_an_element and it.function != "elbo_loss"]
    # A parameter of each element after a smaller one.
    between = of_smaller(ZeroInflatedNegativeBinomial(), {"dispersion": "column"})
    for operation in named([*of_each_kind(every), *terms, *between]).values():
        if operation.likelihood is None:
            # float16 takes the lines of bfloat16.
            for dtype in (torch.float32, torch.bfloat16):
                yield from operation_calls(operation, of_posterior(operation, dtype))
            continue
        if operation.smaller:
            for dtype, shape in product((torch.float32, torch.bfloat16), ((6, 3, 8, 8), (6, 3, 5, 7), (70, 3, 40, 40))):
                tensors = tuple(tensor.detach() for tensor in operation.inputs(Spec(shape, dtype)))
                every = [{"reduction": reduction} for reduction in operation.reductions] or [{}]
                yield from operation_calls(operation, [(tensors, options) for options in every])
            continue
        for dtype, target_dtype in IMAGE_DTYPES:
            if target_dtype.is_floating_point or takes_bytes(operation):
                yield from operation_calls(operation, of_likelihood(operation, dtype, target_dtype))
    yield from batch_calls()
    yield from density_calls()
    yield from pairwise_calls()


def density_calls() -> Iterator[Callable[[], Any]]:
    """The density of a sample as a function of the sample, whose gradient is a kernel of its own."""

    def run(dtype: torch.dtype, shape: tuple[int, ...], samples: int | None) -> None:
        mu, logvar = (torch.empty(shape, dtype=dtype, requires_grad=True) for _ in range(2))
        z, log_q = F.gaussian_sample(mu, logvar, samples=samples, log_prob="detached")
        torch.autograd.grad((z, log_q), (mu, logvar), (torch.ones_like(z), torch.ones_like(log_q)))

    for case in product((torch.float32, torch.bfloat16), SHAPES, (None, 3)):
        yield partial(run, *case)


def pairwise_calls() -> Iterator[Callable[[], Any]]:
    for objective in OBJECTIVES.values():
        for sizes, dtype in product(objective.forms, (torch.float32, torch.bfloat16)):
            for needed in subsets(objective, sizes):
                yield from in_directions(objective, sizes, dtype, needed)


def form(launch: Launch) -> tuple[Any, ...]:
    """Equal for launches that run the same compiled kernel."""
    return launch.kernel, launch.num_warps, *map(kind, launch.arguments.values()), *launch.constants.items()


def kind(argument: Any) -> Any:
    """Of numbers only whether they are 1, which may be compiled in: divisible by 16 or not, the same lines are
    compiled.
    """
    if isinstance(argument, tuple):
        return tuple(map(kind, argument))
    if isinstance(argument, torch.Tensor):
        return argument.dtype
    return argument == 1 if isinstance(argument, int) else float if isinstance(argument, float) else argument


def covering(forms: list[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    """Few of them, among which every pair of choices of a kernel is: each time the form with the most new pairs. (In
    their own order it would be three times as many.)
    """
    pairs = [{(kernel, *pair) for pair in combinations(enumerate(choices), 2)} for kernel, *choices in forms]
    covered: set[Any] = set()
    # (minus the number of its pairs that were new when it was last looked at, its place)
    most = [(-len(of_form), place) for place, of_form in enumerate(pairs)]
    heapq.heapify(most)
    while most:
        _, place = heapq.heappop(most)
        new = len(pairs[place] - covered)
        if new and most and new < -most[0][0]:
            heapq.heappush(most, (-new, place))
        elif new:
            covered |= pairs[place]
            yield forms[place]


@triton.jit
def first_of(COLUMNS: tl.constexpr, RUN: tl.constexpr):
    if RUN == 1:
        return tl.zeros([COLUMNS], tl.float32)
    return tl.reshape(tl.zeros([COLUMNS // RUN, 4], tl.float32), [COLUMNS])


@triton.jit
def planted_kernel(result_ptr, COLUMNS: tl.constexpr, RUN: tl.constexpr):
    """Does not compile with RUN = 1, although the line that is wrong then is never reached."""
    tl.store(result_ptr + tl.arange(0, COLUMNS), first_of(COLUMNS, RUN))


class Compiled(Exception):
    """The intermediate code is there."""


def check(launch: Launch) -> str | None:
    """What is wrong with it."""
    try:
        launch.compile(TARGETS["sm_90"])
    except Compiled:
        return None
    except Exception as error:
        given = {
            name: f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else value
            for name, value in launch.arguments.items()
        }
        return f"{launch.kernel.fn.__name__} of {given}, {launch.constants}: {error}"
    raise AssertionError("the compiler was not stopped")


def stop(*arguments: Any) -> None:
    raise Compiled


def main() -> None:
    forms: dict[tuple[Any, ...], Launch] = {}
    for call in calls():
        for launch in record(call):
            forms.setdefault(form(launch), launch)
    chosen = [forms[form] for form in covering(list(forms))]
    # What is in Triton's cache would not be compiled.
    with (
        tempfile.TemporaryDirectory() as cache,
        patch.dict(os.environ, TRITON_CACHE_DIR=cache),
        patch.object(CUDABackend, "add_stages", lambda self, stages, *arguments: stages.update(ttir=stop)),
    ):
        wrong = [what for launch in chosen if (what := check(launch))]
        planted = [
            check(Launch(planted_kernel, {"result_ptr": torch.empty(8)}, {"COLUMNS": 8, "RUN": run}, 1))
            for run in (4, 1)
        ]
    counts = Counter(launch.kernel.fn.__name__ for launch in chosen)
    print(json.dumps({"forms": counts, "wrong": wrong, "planted": planted}))


if __name__ == "__main__":
    main()
