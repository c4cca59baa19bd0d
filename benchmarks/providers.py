"""The providers that compute a case: PyTorch as users call it, and fastvae."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastvae
from cases import EAGER, FUSED, Case, Inputs
from judge import complaint

Step = Callable[[Inputs], tuple[Tensor, ...]]


class Provider(NamedTuple):
    """A graph provider is its base in one CUDA graph: the same kernels, without the host's share."""

    base: str | None = None  # of a graph provider
    capturable: bool = True  # max-autotune makes CUDA graphs itself
    is_torch: bool = True  # torch sees its launches and its memory
    on_cpu: bool = False


PROVIDERS = {
    "textbook": Provider(on_cpu=True),  # of the training step only
    "eager": Provider(on_cpu=True),
    "compile": Provider(on_cpu=True),
    "compile-max-autotune": Provider(capturable=False),
    "compile-graph": Provider(base="compile"),
    "compile-nchw": Provider(),  # of the training step only: in torch's default memory format
    "compile-nchw-graph": Provider(base="compile-nchw"),
    "fused": Provider(),
    "fused-graph": Provider(base="fused"),
    "jax": Provider(is_torch=False),  # not on a CPU, where a step took 6.6 s, over 40 times torch's
}


def _eager(case: Case) -> Step:
    function = case.function(EAGER)
    return lambda inputs: case.step(function, inputs)


def _compiled(case: Case) -> Step:
    # Shapes stay, as they do in a training loop.
    function = torch.compile(case.function(EAGER), fullgraph=True, dynamic=False)
    return lambda inputs: case.step(function, inputs)


def _compiled_max_autotune(case: Case) -> Step:
    function = torch.compile(case.function(EAGER), fullgraph=True, dynamic=False, mode="max-autotune")

    def step(inputs: Inputs) -> tuple[Tensor, ...]:
        torch.compiler.cudagraph_mark_step_begin()
        return case.step(function, inputs)

    return step


def _fused(case: Case) -> Step:
    function = case.function(FUSED)
    # The default on a CUDA device, checked because the environment can change it; on the interpreter it must be asked
    # for.
    on_gpu = torch.cuda.is_available()
    if on_gpu and (backend := fastvae.backend_for(torch.empty(0, device="cuda"))).name != "triton":
        raise RuntimeError(f"fastvae would run {backend}")
    context = nullcontext() if on_gpu else fastvae.use_backend("triton")

    def step(inputs: Inputs) -> tuple[Tensor, ...]:
        with context:
            return case.step(function, inputs)

    return step


BUILDERS = {"eager": _eager, "compile": _compiled, "compile-max-autotune": _compiled_max_autotune, "fused": _fused}


class OperationSubject:
    """A case as `measure` takes it."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.steps_per_call: dict[str, int] = {}
        self.compulsory_bytes: int | None = case.compulsory_bytes
        self.providers = tuple(name for name, it in PROVIDERS.items() if (it.base or name) in BUILDERS)

    def __str__(self) -> str:
        return str(self.case)

    def prepare(self, device: torch.device, input_sets: Callable[[int], int]) -> int:
        self._inputs: list[Inputs] = []
        first = self.case.inputs(device, seed=0)
        sets = input_sets(first.bytes)
        self._inputs = [first, *(self.case.inputs(device, seed=seed) for seed in range(1, sets))]
        return sets

    def build(self, name: str) -> Callable[[int], Any]:
        step = BUILDERS[name](self.case)
        return lambda index: step(self._inputs[index])

    def complaint(self, name: str, call: Callable[[int], Any]) -> str | None:
        return complaint(self.case, self._inputs[0], call(0))

    def release(self) -> None:
        self._inputs = []
