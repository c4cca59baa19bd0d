"""The error a kernel is allowed, derived from its roundings and the condition of what it computes, never chosen.

|fused - ref64| <= 1 ulp of the output dtype + k * 2^-24 * S, where ref64 is the reference in float64, S the sum of
the absolute terms in float64 (with the relative condition |x| of e^x, whose argument is rounded), and k the number of
roundings that the kernel's docstring counts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae.likelihoods.checking import ulp

__all__ = ["assert_within", "ulp"]


def assert_within(actual: Tensor, expected: Tensor, scale: Tensor | float, roundings: float, what: str = "") -> None:
    """Check the bound elementwise; NaN and infinities must be where the reference has them.

    One ulp covers the rounding to the output dtype also where Triton's interpreter truncates float32 to bfloat16; a
    GPU rounds to nearest, and is held to half an ulp of a half-precision output.
    """
    expected = expected.double().cpu()
    dtype, actual = actual.dtype, actual.detach().double().cpu()
    # Where an input is NaN or infinite, the scale may be NaN, also of a slope that is finite: that is held to the ulp.
    scale = torch.as_tensor(scale, dtype=torch.float64).cpu().nan_to_num(nan=0.0, posinf=torch.inf)
    assert actual.shape == expected.shape, f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}"
    # What float64 can hold and the output dtype cannot is an infinity there.
    representable = expected.to(dtype).double()
    finite = representable.isfinite()
    assert torch.equal(actual.isnan(), expected.isnan()), f"{what}: NaN in other places than the reference"
    infinite = ~finite & ~expected.isnan()
    assert torch.equal(actual[infinite], representable[infinite]), (
        f"{what}: infinities in other places than the reference"
    )
    half = torch.cuda.is_available() and dtype is not torch.float32
    allowed = (0.5 if half else 1.0) * ulp(expected, dtype) + roundings * 2.0**-24 * scale
    excess = ((actual - expected).abs() / allowed)[finite]
    if excess.numel():
        assert excess.max() <= 1, f"{what}: error is {excess.max():.3g} times the bound"
