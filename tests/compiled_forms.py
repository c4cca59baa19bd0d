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
from codegen import TARGETS
from fastvae.kernels import batch, elbo, gaussian, reconstruction
from launches import Launch, record

NOISE = (None, None, 1, 4, 0)
# Drawn for a whole batch, and for parts of one that start on a quad and do not.
DRAWN = [(None, *NOISE), (None, *NOISE[:-1], 8), (None, *NOISE[:-1], 3)]

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


def gaussian_calls(dtype: torch.dtype) -> Iterator[Callable[[], Any]]:
    for mu, logvar, dim in moments(dtype):
        z = mu.clone() if logvar is not None else mu.narrow(dim, 0, mu.shape[dim] // 2).clone()
        noises = [*DRAWN, (z, *gaussian.NO_RNG)]
        for (eps, *rng), (reduction, free_bits) in product(
            noises, [("none", 0.0), ("batchmean", 0.0), ("per_dimension", 0.0), ("per_dimension", 0.1)]
        ):
            kl = torch.empty({"none": z.shape[:1], "batchmean": ()}.get(reduction, z.shape[1:]))
            before = kl if free_bits else None
            posterior = mu, logvar, dim, reduction, free_bits
            yield partial(gaussian.gaussian_sample_kl, *posterior, eps, *rng)
            if logvar is not None:
                yield partial(gaussian.gaussian_sample, mu, logvar, eps, *rng)
                yield partial(gaussian.gaussian_kl, mu, logvar, reduction, free_bits)
            kl_grads = (kl, kl[:1].expand(kl.shape) if kl.ndim == 1 else kl, None)
            both_needed = ((True, True), (True, False), (False, True)) if logvar is not None else ((True, True),)
            for kl_grad, z_grad, needs in product(kl_grads, (z, None), both_needed):
                if kl_grad is not None or z_grad is not None:
                    yield partial(gaussian.gaussian_backward, *posterior, z_grad, kl_grad, before, *needs, eps, *rng)


def image_calls(dtype: torch.dtype, target_dtype: torch.dtype) -> Iterator[Callable[[], Any]]:
    one = torch.ones(())
    for shape in IMAGES:
        logits, target = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=target_dtype)
        each = torch.empty(len(logits))
        differentiable = target_dtype.is_floating_point
        for reduction in ("none", "mean"):
            yield partial(reconstruction.sigmoid_mse_forward, logits, target, reduction)
            grads = (each, one.expand(len(logits))) if reduction == "none" else (one,)
            for grad, needs in product(grads, ((True, False), (True, True), (False, True))):
                if differentiable or not needs[1]:
                    yield partial(reconstruction.sigmoid_mse_backward, logits, target, grad, reduction, *needs)
        for weight, kl in product((0.5, one, one.double()), (each, one.expand(len(logits)))):
            yield partial(elbo.elbo_loss, logits, target, kl, weight, 0.5)
            for scale in (None, 8.0, one):
                yield partial(elbo.elbo_value_and_grad, logits, target, kl, weight, 0.5, scale)
        for grads, needs in product(product((one, None), repeat=3), product((True, False), repeat=3)):
            if any(grads) and any(needs) and (differentiable or not needs[1]):
                yield partial(elbo.elbo_backward, logits, target, each, *grads, one, 0.5, *needs)


def batch_calls() -> Iterator[Callable[[], Any]]:
    for shape, dtype in product(((9, 1, 28, 28), (9, 3, 5, 5)), (torch.uint8, torch.float32)):
        images = torch.empty(shape, dtype=dtype)
        yield partial(batch.gather_batch, images, torch.arange(4))


def calls() -> Iterator[Callable[[], Any]]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield from gaussian_calls(dtype)
    for logits, target in (
        (torch.float32, torch.float32),
        (torch.float32, torch.uint8),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
    ):
        yield from image_calls(logits, target)
    yield from batch_calls()


def form(launch: Launch) -> tuple[Any, ...]:
    """Equal for launches that run the same compiled kernel."""
    kinds = [value.dtype if isinstance(value, torch.Tensor) else value for value in launch.arguments.values()]
    # Of numbers only whether they are 1, which may be compiled in: divisible by 16 or not, the same lines are compiled.
    kinds = [kind == 1 if isinstance(kind, int) else float if isinstance(kind, float) else kind for kind in kinds]
    return launch.kernel, launch.num_warps, *kinds, *launch.constants.items()


def covering(forms: list[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    """So many of them that every pair of choices of a kernel is among them."""
    covered: set[Any] = set()
    for kernel, *choices in forms:
        pairs = {(kernel, *pair) for pair in combinations(enumerate(choices), 2)}
        if not pairs <= covered:
            covered |= pairs
            yield kernel, *choices


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
