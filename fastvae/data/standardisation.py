"""Scale each column of numbers to mean 0 and variance 1, and back."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Standardisation(NamedTuple):
    """(x - mean) / scale of each column of a table [N, F], or each channel of signals [N, C, ...].

    The fields are tuples of numbers. You can store ``_asdict()`` in a checkpoint's ``run``, and rebuild it by
    ``Standardisation(**stored)``.
    """

    mean: tuple[float, ...]
    scale: tuple[float, ...]

    @classmethod
    def of(cls, values: NDArray[Any]) -> Standardisation:
        """The standardisation of a training set, with its means and standard deviations. If all numbers of a column are
        equal, its scale is 1.
        """
        others = (0, *range(2, values.ndim))
        scale = values.std(axis=others, dtype=np.float64)
        constant = values.min(axis=others) == values.max(axis=others)
        return cls(
            tuple(values.mean(axis=others, dtype=np.float64).tolist()), tuple(np.where(constant, 1.0, scale).tolist())
        )

    def apply(self, values: NDArray[Any]) -> Tensor:
        """The standardised values, float32 in the values' shape. They are computed in float64."""
        shape = (-1, *[1] * (values.ndim - 2))
        mean, scale = (np.asarray(numbers).reshape(shape) for numbers in self)
        return torch.from_numpy(((values - mean) / scale).astype(np.float32))

    def undo(self, values: Tensor) -> Tensor:
        """Standardised values, such as reconstructions and samples, in the units of the data, float64."""
        shape = (-1, *[1] * (values.ndim - 2))
        mean, scale = (torch.tensor(numbers, dtype=torch.float64, device=values.device).view(shape) for numbers in self)
        return values * scale + mean
