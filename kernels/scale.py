"""The second tensor of a Gaussian: the logarithm of its variance, or another number that says how wide it is."""

import triton
import triton.language as tl

from .numerics import exp, exp_half, log, reciprocal
from .special import softplus


@triton.jit
def read_scale(
    a, scale_eps, log_eps, low, high,
    SCALE: tl.constexpr, HAS_EPS: tl.constexpr, CLAMP: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """(logvar, std, d logvar / da, d std / da) of a Gaussian whose second tensor is a, see
    `fastvae.reference.gaussian.log_variance`; log_eps is the logarithm of scale_eps. What a caller does not use is not
    computed. Outside of a tensor a is 1, of which every scale is a number.

    Roundings: of logvar none where it is a; else 16 of |logvar| + |a| (1 + |slope|) + |log_eps| + 1; of std 8 and of
    the slopes 10, relative.
    """
    if CLAMP:
        # NaN fails both comparisons and stays.
        a = tl.where(a < low, low, tl.where(a > high, high, a))
    if SCALE == "std" or SCALE == "softplus":
        if SCALE == "std":
            std, std_slope = a, tl.full(a.shape, 1.0, tl.float32)
        else:
            std, std_slope = softplus(a, FAST)
        if HAS_EPS:
            std += scale_eps
        logarithm = log(std, FAST)
        slope = std_slope * reciprocal(std, FAST)
        if SCALE == "softplus" and not HAS_EPS:
            # log log(1 + e^a) = a - e^a / 2 + ..., where log(1 + e^a) vanishes.
            half = 0.5 * exp(a, FAST)
            logarithm = tl.where(a < -20.0, a - half, logarithm)
            slope = tl.where(a < -20.0, 1.0 - half, slope)
        logvar, slope = 2.0 * logarithm, 2.0 * slope
    else:
        if HAS_EPS:
            # log(e^a + eps) = log eps + log(1 + e^(a - log eps))
            above, slope = softplus(a - log_eps, FAST)
            logvar = log_eps + above
        else:
            logvar, slope = a, tl.full(a.shape, 1.0, tl.float32)
        if SCALE == "log_std":
            logvar, slope = 2.0 * logvar, 2.0 * slope
        std = exp_half(logvar, FAST)
        std_slope = 0.5 * std * slope
    return logvar, std, slope, std_slope


@triton.jit
def log_variance(
    a, scale_eps, log_eps, low, high,
    SCALE: tl.constexpr, HAS_EPS: tl.constexpr, CLAMP: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """(logvar, d logvar / da) of `read_scale`."""
    logvar, _, slope, _ = read_scale(a, scale_eps, log_eps, low, high, SCALE, HAS_EPS, CLAMP, FAST)
    return logvar, slope
