"""Choose the kernel for a likelihood."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from .groups import LONGEST, grouped
from .long_rows import long_rows
from .smaller import broadcast, has_smaller

if TYPE_CHECKING:
    from fastvae.likelihoods import Likelihood


def launcher_of(likelihood: Likelihood, tensors: Sequence[Tensor]) -> Callable[..., list[Tensor]] | None:
    """The launcher for these tensors, or None for the kernels of `elementwise`, which need equal shapes."""
    if likelihood.grouped:
        shape = tensors[0].shape
        grouping = likelihood.grouping(shape, tensors[-1].shape)
        return long_rows if grouping.size > LONGEST else grouped
    return broadcast if has_smaller(tensors) else None
