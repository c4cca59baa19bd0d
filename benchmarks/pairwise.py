"""The objectives of pairs and of samples, as they are compiled ahead of time: for the tables of compiled code, and for
the test that every form compiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastvae.functional as F

Sizes = tuple[int, ...]


class Objective(NamedTuple):
    """function(*inputs(sizes, dtype))"""

    function: Callable[..., Any]
    inputs: Callable[[Sizes, torch.dtype], list[Tensor]]
    table: dict[str, Sizes]
    """By name, the sizes of the table of compiled code."""
    forms: Sequence[Sizes]
    """Sizes, of which all forms are compiled: with one part and with several, and smaller than a tile."""


def _mixture(sizes: Sizes, dtype: torch.dtype) -> list[Tensor]:
    rows, components, dims = sizes
    shapes = (rows, dims), (components, dims), (components, dims), (components,)
    return [torch.empty(shape, dtype=dtype) for shape in shapes]


def _three(sizes: Sizes, dtype: torch.dtype) -> list[Tensor]:
    """Log-densities of samples; or z, mu and logvar."""
    return [torch.empty(sizes, dtype=dtype) for _ in range(3)]


def _sets(sizes: Sizes, dtype: torch.dtype) -> list[Tensor]:
    rows, prior_rows, dims = sizes
    return [torch.empty(rows, dims, dtype=dtype), torch.empty(prior_rows, dims, dtype=dtype)]


OBJECTIVES = {
    "gaussian_mixture_log_prob": Objective(
        F.gaussian_mixture_log_prob,
        _mixture,
        {"many": (2048, 2048, 10)},
        [(3, 2, 1), (40, 3, 5), (3, 70, 5), (20000, 3, 5), (600, 600, 2)],
    ),
    "gaussian_mixture_log_prob_equal_weights": Objective(
        F.gaussian_mixture_log_prob,
        lambda sizes, dtype: _mixture(sizes, dtype)[:3],
        {},
        [(3, 2, 1), (600, 600, 2)],
    ),
    "importance_weighted_bound": Objective(
        F.importance_weighted_bound,
        _three,
        {"many": (64, 1024)},
        [(1, 1), (3, 40), (5000, 20), (64, 20000)],
    ),
    "total_correlation": Objective(
        lambda *tensors: F.total_correlation(*tensors, 60000),
        _three,
        {"many": (2048, 10)},
        [(2, 1), (3, 5), (70, 5)],
    ),
    "total_correlation_stratified": Objective(
        lambda *tensors: F.total_correlation(*tensors, 60000, "stratified", reduction="none"),
        _three,
        {},
        [(2, 1), (70, 5)],
    ),
    "maximum_mean_discrepancy": Objective(
        F.maximum_mean_discrepancy,
        _sets,
        {"many": (2048, 2048, 10)},
        [(2, 3, 1), (40, 3, 5), (2000, 5, 2), (600, 600, 5)],
    ),
    "maximum_mean_discrepancy_rbf": Objective(
        lambda *tensors: F.maximum_mean_discrepancy(*tensors, "rbf", (0.5, 1.0), unbiased=False),
        _sets,
        {},
        [(2, 3, 1), (600, 600, 5)],
    ),
}


def drawn(objective: Objective, sizes: Sizes, device: torch.device) -> list[Tensor]:
    """Inputs that require grad, of normal numbers. Their means differ, so that no difference of the inputs vanishes."""
    generator = torch.Generator(device).manual_seed(7)
    return [
        torch.randn(it.shape, generator=generator, device=device).add_(0.5 * k).requires_grad_()
        for k, it in enumerate(objective.inputs(sizes, torch.float32))
    ]


def in_directions(objective: Objective, sizes: Sizes, dtype: torch.dtype, needed: Sequence[int]) -> Iterator[Any]:
    """Forward, and backward to the inputs with these numbers, as functions of nothing that follow each other."""
    tensors = [t.requires_grad_(k in needed) for k, t in enumerate(objective.inputs(sizes, dtype))]
    outputs: list[Tensor] = []

    def forward() -> None:
        result = objective.function(*tensors)
        outputs.extend([result] if isinstance(result, Tensor) else result)

    def backward() -> None:
        upstream = [torch.ones_like(output) for output in outputs]
        torch.autograd.grad(outputs, [tensors[k] for k in needed], upstream, allow_unused=True)

    yield forward
    if needed:
        yield backward


def subsets(objective: Objective, sizes: Sizes) -> Iterator[tuple[int, ...]]:
    """The inputs that may need gradients."""
    count = len(objective.inputs(sizes, torch.float32))
    for n in range(count + 1):
        yield from combinations(range(count), n)
