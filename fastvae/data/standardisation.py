"""Numbers of any size brought to mean 0 and variance 1, column by column, and back."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Standardisation(NamedTuple):
    """(x - mean) / scale of each column of a table [N, F], or each channel of signals [N, C, ...].

    Numbers in tuples, so that ``_asdict()`` can be kept in a checkpoint's ``run``, and ``Standardisation(**of_that)``
    is the same.
    """

    mean: tuple[float, ...]
    scale: tuple[float, ...]

    @classmethod
    def of(cls, values: NDArray[Any]) -> Standardisation:
        """That of a training set: means and standard deviations, and a scale of 1 where all numbers are equal."""
        others = (0, *range(2, values.ndim))
        scale = values.std(axis=others, dtype=np.float64)
        constant = values.min(axis=others) == values.max(axis=others)
        return cls(
            tuple(values.mean(axis=others, dtype=np.float64).tolist()), tuple(np.where(constant, 1.0, scale).tolist())
        )

    def apply(self, values: NDArray[Any]) -> Tensor:
        """float32 of the values' shape; computed in float64."""
        shape = (-1, *[1] * (values.ndim - 2))
        mean, scale = (np.asarray(numbers).reshape(shape) for numbers in self)
        return torch.from_numpy(((values - mean) / scale).astype(np.float32))

    def undo(self, values: Tensor) -> Tensor:
        """Standardised values in the units of the data, float64: of reconstructions and samples, for example."""
        shape = (-1, *[1] * (values.ndim - 2))
        mean, scale = (torch.tensor(numbers, dtype=torch.float64, device=values.device).view(shape) for numbers in self)
        return values * scale + mean
