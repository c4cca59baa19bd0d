"""Special functions in float32, which likelihoods of counts and of discretised values need.

`fastvae.reference.special` has the same functions in plain PyTorch, and derives those of the gamma function.

Errors are given in units of 2^-24 of the result, or, if stated, of S = |f| + sum_i |x_i df/dx_i|, the change by
relative errors of the result and of the inputs, because near a change of sign no float32 formula can be exact to an ulp
of f. The first number is the error of the portable form. The second is the error of the fast form if every instruction
has the largest error that NVIDIA's documentation allows (`lg2.approx` 2 ulp, `rcp.approx` 1, `ex2.approx` 2). A
likelihood counts this number as roundings. `tests/test_special.py` compares both with 80-digit arithmetic, over all
magnitudes.
"""

import triton
import triton.language as tl

from fastvae.kernels import numerics


@triton.jit
def log1p(x, FAST: tl.constexpr):
    """log(1 + x) for x >= 0, infinity included. Errors: 3; 7.

    Below 1 it is the polynomial of `numerics.log1p`. From 1 on the logarithm is at least log 2, and rounding 1 + x
    changes it by less than an ulp. NaN fails the comparison and uses the logarithm.
    """
    return tl.where(x < 1.0, numerics.log1p(x), numerics.log(1.0 + x, FAST))


@triton.jit
def log1p_minus(x, FAST: tl.constexpr):
    """log(1 + x) - x for |x| <= 1/2. Errors: 5; 7.

    With s = x / (2 + x), log(1 + x) = 2 atanh(s) = 2 (s + s^3 / 3 + ...), and 2 s - x = -x s. The series of odd powers
    is minimax of degree 3 in s^2, within 1.5e-7 of 1/3. Its part of the result is at most x / 2 times the other part.
    """
    s = x * numerics.reciprocal(2.0 + x, FAST)
    z = s * s
    p = tl.fma(z, 0.1342574901, 0.141183099)
    p = tl.fma(z, p, 0.2000378032)
    p = tl.fma(z, p, 0.3333332017)
    return s * tl.fma(2.0 * z, p, -x)


@triton.jit
def softplus(x, FAST: tl.constexpr):
    """(log(1 + e^x), sigmoid(x)), as max(x, 0) + log1p(e^-|x|). Errors: 4 and 3.5 of S; 7 and 7 of S."""
    e = numerics.exp(-tl.abs(x), FAST)
    r = numerics.reciprocal(1.0 + e, FAST)
    positive = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return positive + numerics.log1p(e), tl.where(x >= 0, r, e * r)


@triton.jit
def log1mexp(x, FAST: tl.constexpr):
    """(log(1 - e^-x), 1 / (e^x - 1)) for x > 0: the logarithm of a probability, and its slope s.

    Errors: 3 and 3.5 of S; 9 and 7.5 of S.

    1 - e^-x = 1 / (1 + s), so the logarithm is -log1p(s), which never cancels. s is computed as e^-x / (1 - e^-x), so
    nothing overflows for large x.
    """
    e = numerics.exp(-x, FAST)
    slope = e * numerics.reciprocal(-numerics.expm1(-x, e), FAST)
    return -log1p(slope, FAST), slope


@triton.jit
def gamma_differences(t, d, FAST: tl.constexpr):
    """(log Gamma(t + d) - log Gamma(d), psi(t + d) - psi(d)) for t >= 0 and d > 0; psi is the derivative of log Gamma.
    Errors: 4 of S, and 6; 10.5 of S, and 11. They hold for t up to 1e6 and d from 1e-6 to 1e8.

    With a = 1 / (d + c), b = 1 / (t + d + c), c = 17/16:

        log Gamma(x + 1) = (x + 1/2) log(x + c) - x + constant + p(1 / (x + c))
        psi(x + 1) = log(x + c) + q(1 / (x + c))

    with polynomials p and q of degree 4 and 5. They are minimax for x >= 0, p' in units of |psi(x)| + x psi'(x) and q'
    in units of psi'(x): with these float32 coefficients within 0.44 and 1.27 * 2^-24. c is chosen for that: at c = 1
    the errors would be 1.5 and 4.9. Recurrence gives Gamma(x) = Gamma(x + 1) / x. Each difference is computed as one:
    log((t + d + c) / (d + c)) = log1p(t a), and p(a) - p(b) = (a - b) p[a, b] with a - b = t a b. Every part has the
    factor t, so t = 0 gives 0.
    """
    y = t + d
    a = numerics.reciprocal(d + 1.0625, FAST)
    upper = y + 1.0625
    b = numerics.reciprocal(upper, FAST)
    ratio = t * a
    log_ratio = log1p(ratio, FAST)
    step = ratio * b
    shift = t * numerics.reciprocal(d, FAST)
    leading = tl.fma(d + 0.5, log_ratio, t * (numerics.log(upper, FAST) - 1.0))
    of_value, of_slope = gamma_polynomials(a, b)
    value = tl.fma(-step, of_value, leading) - log1p(shift, FAST)
    slope = tl.fma(shift, numerics.reciprocal(y, FAST), tl.fma(-step, of_slope, log_ratio))
    return value, slope


@triton.jit
def gamma_polynomials(a, b):
    """(p[a, b], q[a, b]) of the p and q of `gamma_differences`: Horner's rule, applied to its own steps."""
    outer = tl.fma(a, 6.054756813682616e-04, -3.1088190153241158e-03)
    inner = tl.fma(b, 6.054756813682616e-04, outer)
    outer = tl.fma(a, outer, 6.453761365264654e-03)
    inner = tl.fma(b, inner, outer)
    outer = tl.fma(a, outer, 1.1649971455335617e-01)
    inner = tl.fma(b, inner, outer)
    of_value = inner
    outer = tl.fma(a, -2.5013317354023457e-03, 9.474431164562702e-03)
    inner = tl.fma(b, -2.5013317354023457e-03, outer)
    outer = tl.fma(a, outer, -1.300294604152441e-02)
    inner = tl.fma(b, inner, outer)
    outer = tl.fma(a, outer, -1.164751797914505e-01)
    inner = tl.fma(b, inner, outer)
    outer = tl.fma(a, outer, -5.625019073486328e-01)
    inner = tl.fma(b, inner, outer)
    return of_value, inner


@triton.jit
def log_factorial(t, FAST: tl.constexpr):
    """log Gamma(t + 1), log t! of a count, for t >= 0. Errors: 6; 11.5.

    Up to 6 it is t (t - 1) times a quotient of polynomials of degree 4, minimax within 0.76 * 2^-24 with these float32
    coefficients. They are all positive, so only t - 1 cancels, which is exact: 0! and 1! give 0. From 6 on it is
    Stirling's series at h = t + 1/2, h (log h - 1) + log(2 pi) / 2 - 1 / (24 h) + 7 / (2880 h^3), whose next part is
    less than 7e-8 there.
    """
    n = tl.fma(t, 6.817333633080125e-05, 1.6568588092923164e-02)
    n = tl.fma(t, n, 2.2470316290855408e-01)
    n = tl.fma(t, n, 7.077486515045166e-01)
    n = tl.fma(t, n, 5.772156715393066e-01)
    m = tl.fma(t, 5.004597827792168e-03, 1.3257068395614624e-01)
    m = tl.fma(t, m, 8.21521520614624e-01)
    m = tl.fma(t, m, 1.651028037071228)
    m = tl.fma(t, m, 1.0)
    small = t * (t - 1.0) * (n * numerics.reciprocal(m, FAST))

    h = t + 0.5
    r = numerics.reciprocal(h, FAST)
    series = tl.fma(r, tl.fma(r * r, 2.4305555555555555e-03, -4.1666666666666667e-02), 0.9189385332046727)
    return tl.where(t < 6.0, small, tl.fma(h, numerics.log(h, FAST) - 1.0, series))
