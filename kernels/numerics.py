"""Scalar mathematics shared by the kernels, element by element in float32.

``FAST`` selects the NVIDIA instructions that approximate a function in the special-function unit, one instruction
where the portable form costs 5 to 45 (counted in SASS for sm_90). The portable form runs on the interpreter and on
AMD.

Roundings, in the kernels' docstrings, are relative errors in units of 2^-24 along the longest chain of operations:
one for an operation, a constant or a conversion, two for an approximate reciprocal, four for an approximate
exponential. The rounding of an exponential's argument x counts 1.5 |x|. The scale of the error bound has the factor 1 +
|x| for it.
"""

import triton
import triton.language as tl
from triton.language import core  # by this name, because the interpreter knows the modules that a file names


@triton.jit
def product(a, b):
    """a * b as a term of a sum over threads, rounded before it is added.

    Otherwise the compiler would turn a * b + c in the sum's first addition into one instruction with one rounding. Two
    threads that hold the same sum would then round different products, so their sums would differ in the last bit. Both
    store the sum, and it is not determined which store wins. The compiler does not merge an explicit fma with the
    addition.
    """
    return tl.fma(a, b, 0.0)


@triton.jit
def to_float32(x, FAST: tl.constexpr):
    """The loaded numbers in float32. The fast form of bfloat16 unpacks two elements with two instructions, where the
    compiler needs three.
    """
    if FAST and x.dtype == tl.bfloat16:
        bits = tl.inline_asm_elementwise(
            "{ shl.b32 $0, $2, 16; and.b32 $1, $2, 0xFFFF0000; }", "=&r,=r,r", [x], dtype=tl.int32, is_pure=True, pack=2
        )
        return bits.to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def exp(x, FAST: tl.constexpr):
    """e^x. Relative error of the fast form: 2 ulp, plus |x| * 2^-24 from rounding the exponent; subnormal results
    become 0.
    """
    if FAST:
        return exp2_approx(x * 1.4426950408889634)
    return tl.exp(x)


@triton.jit
def exp_compensated(x, FAST: tl.constexpr):
    """e^x as `exp`, without the error |x| * 2^-24 of the rounded exponent. The rounding error is corrected with 7 more
    instructions. Use it if a large e^x is itself a result, such as a rate, and not a factor of one.
    """
    exponent = x * 1.4426950408889634
    # x log2 e - exponent, with what float32 leaves of log2 e; 0 where e^x is infinite, or less than a normal number.
    rest = tl.fma(x, 1.9259629911266175e-08, tl.fma(x, 1.4426950408889634, -exponent))
    rest = tl.where(tl.abs(exponent) < 128.0, rest, 0.0)
    if FAST:
        power = exp2_approx(exponent)
    else:
        power = tl.exp2(exponent)
    # Not infinity times 0, which is NaN.
    return tl.fma(tl.minimum(power, 3.4028234663852886e38), rest * 0.6931471805599453, power)


@triton.jit
def exp_half(x, FAST: tl.constexpr):
    """e^(x / 2), one multiplication less than exp(0.5 * x)."""
    if FAST:
        return exp2_approx(x * 0.7213475204444817)
    return tl.exp(0.5 * x)


@triton.jit
def exp2_approx(x):
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def reciprocal(x, FAST: tl.constexpr):
    """1 / x, within 1 ulp."""
    if FAST:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return 1.0 / x


@triton.jit
def log(x, FAST: tl.constexpr):
    """log x. The fast form's relative error is 5 * 2^-24, because lg2.approx is within 2 ulp. For 1/2 < x < 2, where
    lg2.approx is within 2^-22, it has an absolute error of 2.8 * 2^-24. Near 1 the result is therefore as exact as for
    a rounded x, but its relative error is large; use `log1p` of x - 1 there. Logarithms of subnormal numbers become
    -infinity.
    """
    if FAST:
        return 0.6931471805599453 * tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.log(x)


@triton.jit
def expm1_tail(x):
    """(e^x - 1 - x) / x^2 for |x| < 1/2: minimax of degree 5 with 1/2 at 0, relative error 3.2e-8 (0.53 * 2^-24) with
    these float32 coefficients. Of degree 4 it would be 8e-7.
    """
    p = tl.fma(1.986334245884791e-04, x, 1.3975331094115973e-03)
    p = tl.fma(p, x, 8.333477191627026e-03)
    p = tl.fma(p, x, 4.1666001081466675e-02)
    p = tl.fma(p, x, 1.666666567325592e-01)
    return tl.fma(p, x, 0.5)


@triton.jit
def expm1_minus(x, exp_x):
    """e^x - 1 - x, given e^x. Below |x| = 1/2, where the difference cancels, the series is used. NaN uses the
    difference.
    """
    return tl.where(tl.abs(x) < 0.5, x * x * expm1_tail(x), exp_x - 1.0 - x)


@triton.jit
def expm1(x, exp_x):
    """e^x - 1, given e^x, with the series of `expm1_minus` below |x| = 1/2."""
    return tl.where(tl.abs(x) < 0.5, tl.fma(x * x, expm1_tail(x), x), exp_x - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x) for 0 <= x <= 1, the range of e^-|x|: minimax of degree 9 with 1 at 0. The relative error of the
    evaluation is 2.65 * 2^-24. With degree 8 it would be 3.2 * 2^-24. The absolute error of NVIDIA's approximate
    logarithm is only bounded by 2^-22.
    """
    p = tl.fma(-0.0032440118957310915, x, 0.019851399585604668)
    p = tl.fma(p, x, -0.05695941299200058)
    p = tl.fma(p, x, 0.10603641718626022)
    p = tl.fma(p, x, -0.1530558466911316)
    p = tl.fma(p, x, 0.19675935804843903)
    p = tl.fma(p, x, -0.24954132735729218)
    p = tl.fma(p, x, 0.3332996368408203)
    p = tl.fma(p, x, -0.4999990165233612)
    return x * tl.fma(p, x, 1.0)


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    """(y, y * (1 - y)) with y = 1 / (1 + e^-x).

    Everything is computed from e^-|x| <= 1, so nothing overflows. The slope is e^-|x| / (1 + e^-|x|)^2 for both signs,
    in which nothing cancels.
    """
    e = exp(-tl.abs(x), FAST)
    r = reciprocal(1.0 + e, FAST)
    tail = e * r
    # NaN fails the comparison and takes the tail, which is NaN.
    return tl.where(x >= 0, r, tail), tail * r


@triton.jit
def load_scalar(value):
    """A float32 scalar that was given by value or by pointer."""
    value = core.to_tensor(value)
    if value.dtype.is_ptr():
        number = tl.load(value).to(tl.float32)
    else:
        number = value
    return number
