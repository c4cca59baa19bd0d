"""The negative binomial likelihood, element by element in float32. `fastvae.reference.counts` derives the formulas."""

import triton
import triton.language as tl

from . import special
from .numerics import log, reciprocal


@triton.jit
def negative_binomial(mean, dispersion, t, EPS: tl.constexpr, FAST: tl.constexpr):
    """(value, (slope by the mean, slope by the dispersion)) of -log p(t).

    Errors are given as in `special`, for counts up to 1e6, means up to 1e6 and dispersions from 1e-6 to 1e8, in units
    of S without the part of t, because t is exact: 8, 4 and 40; 22, 8 and 70. t may be any number from 1 on. Between 0
    and 1, where there are no counts, the error of the value is 8 and 22 in units of 1 + S, and that of the slope by the
    dispersion is 80 in units of S with the part of t.
    """
    d, c = dispersion, 1.0625
    m, e = mean + EPS, d + EPS
    whole = t >= 1.0
    s = tl.where(whole, t - 1.0, t)
    y, upper, total = t + d, s + d + c, d + m
    a, b = reciprocal(d + c, FAST), reciprocal(upper, FAST)
    by_m, by_e, by_d = reciprocal(m, FAST), reciprocal(e, FAST), reciprocal(d, FAST)
    by_total = reciprocal(total, FAST)
    step = s * a * b
    odds = mean * by_e

    # The logarithm of total (d + c) / (e upper) = 1 + x.
    x = tl.fma(d, mean - s, c * mean - EPS * s) * by_e * b
    near = tl.abs(x) < 0.5
    bent = special.log1p_minus(x, FAST)
    far = log(total * b * ((d + c) * by_e), FAST)
    value = d * tl.where(near, x + bent, far)

    # That of total (t + c) / (upper m), times t.
    x_of_t = tl.fma(d, t - m + c, tl.where(whole, m, 0.0)) * b * by_m
    near_of_t = x_of_t + special.log1p_minus(x_of_t, FAST)
    of_t = tl.where(tl.abs(x_of_t) < 0.5, near_of_t, log(total * b * ((t + c) * by_m), FAST))
    u = reciprocal(t + c, FAST)
    rest = tl.fma(u, 0.000105980075723, 0.000313697614544)
    rest = tl.fma(u, rest, -0.00280814476002)
    rest = tl.fma(u, rest, 0.00631165384254)
    rest = tl.fma(u, rest, 0.116529612751)
    rest = tl.fma(u, rest, tl.where(whole, -1.143561377569, -0.143561377569))
    of_value, of_slope = special.gamma_polynomials(a, b)
    rest = tl.fma(step, of_value, rest) + 0.5 * log((t + c) * ((d + c) * b), FAST)
    rest += special.log1p(tl.where(whole, s + c, t) * by_d, FAST)
    # At t = 0 the rest is 0, which its parts give only to a rounding of 1.
    value += tl.where(t == 0.0, 0.0, tl.fma(t, of_t, rest))

    # What is subtracted from the logarithm, of t >= 1 and of t < 1.
    part = s - odds * d - m * by_d
    slope_of_whole = tl.where(
        near, bent + b * tl.fma(part, (s - m + c) * by_total, tl.fma(c, odds, -m * by_d)), tl.fma(part, by_total, far)
    )
    slope = tl.where(near, tl.fma(x, (m - t) * by_total, bent) + c * t * by_e * b, tl.fma(t - odds * d, by_total, far))
    slope = tl.where(whole, slope_of_whole, slope - t * by_d * reciprocal(y, FAST))
    return value, (d * (m - t) * by_total * by_m, tl.fma(step, of_slope, slope))
