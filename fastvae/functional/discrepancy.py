"""How far two sets of vectors are from one distribution, without a density."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastvae import reference
from fastvae.functional.checks import check_device, check_floating, check_number
from fastvae.reference.discrepancy import SCALES


def maximum_mean_discrepancy(
    z: Tensor, prior_z: Tensor, kernel: str = "imq", scales: Sequence[float] | None = None, *, unbiased: bool = True
) -> Tensor:
    """The squared maximum mean discrepancy of two samples, mean k(z, z') + mean k(p, p') - 2 mean k(z, p), with z of
    the aggregated posterior and p of the prior. It has no unit. Differentiable in both.

    With C = 2 K scale, the kernel is the sum over scales, not their mean, of

    - "imq": C / (C + |z - p|^2), whose tails are heavy, so that far rows have a gradient;
    - "rbf": exp(-|z - p|^2 / C).

    Args:
        z: [n, K], of the posteriors of a batch, such as the z of ``gaussian_sample_kl``.
        prior_z: [m, K] of the prior; its part of the work of a gradient is left out where it needs none.
        kernel: "imq" or "rbf".
        scales: numbers above 0. None: (0.1, 0.2, 0.5, 1, 2, 5, 10) for "imq", (1,) for "rbf". A prior of variance s^2
            takes scales times s^2.
        unbiased: the means are over pairs of different rows, so that the estimate has no bias, and may be negative.
            False: over all pairs, n^2 and m^2 of them: at least 0, and 0 for a set with itself, but for rounding.

    Returns:
        A scalar, float32 (float64 where an argument is). Gradients have their inputs' dtypes; a sum is rounded once.
        Equal rows have no slope. NaN in any row makes it NaN.

    Raises:
        TypeError: not a floating-point tensor; scales that are not a sequence of numbers.
        ValueError: shapes or devices that do not go together, too few rows (unbiased: 2 of each), no dimension, an
            unknown kernel, no scale, or one that is not above 0, or so large or small that float32 cannot hold 2 K
            scale and its reciprocal.

    Source: Gretton et al., "A Kernel Two-Sample Test", 2012, equation 3 (unbiased=False: equation 5); Tolstikhin et
        al., "Wasserstein Auto-Encoders", 2018, algorithm 2.
    """
    least = 2 if unbiased else 1
    check_floating("z", z)
    if z.ndim != 2 or z.shape[0] < least or z.shape[1] < 1:
        raise ValueError(
            f"z must have shape [n, K], n at least {least} with unbiased={unbiased}, K at least 1, got {list(z.shape)}"
        )
    check_floating("prior_z", prior_z)
    if prior_z.ndim != 2 or prior_z.shape[0] < least or prior_z.shape[1] != z.shape[1]:
        raise ValueError(
            f"prior_z must have shape [m, {z.shape[1]}], m at least {least} with unbiased={unbiased} and K of z "
            f"{list(z.shape)}, got {list(prior_z.shape)}"
        )
    check_device("prior_z", prior_z, "z", z)
    if kernel not in SCALES:
        raise ValueError(f"kernel must be one of {', '.join(SCALES)}, got {kernel!r}")
    of_kernel = SCALES[kernel] if scales is None else _check_scales(scales, z.shape[1])
    return reference.discrepancy.maximum_mean_discrepancy(z, prior_z, kernel, of_kernel, unbiased)


def _check_scales(scales: Sequence[float], dims: int) -> tuple[float, ...]:
    """Returns them as Python numbers."""
    if not isinstance(scales, Sequence) or isinstance(scales, str):
        raise TypeError(f"scales must be a sequence of numbers, such as (1.0,), got {type(scales).__name__}")
    if not scales:
        raise ValueError("scales must have at least one number, got none")
    smallest = torch.finfo(torch.float32).tiny
    numbers = tuple(check_number(f"scales[{k}]", scale) for k, scale in enumerate(scales))
    for k, number in enumerate(numbers):
        if not smallest <= 2.0 * dims * number <= 1.0 / smallest:
            raise ValueError(
                f"scales[{k}] must be above 0, and 2 K scale a float32 between {smallest:.3g} and {1 / smallest:.3g}, "
                f"got {number}"
            )
    return numbers
