"""Special functions in plain PyTorch, which likelihoods of counts and of discretised values need.

The tests compare the kernels of `fastvae.kernels.special` with them. All are differentiable twice. Inputs in half
precision and integers are computed in float32.

The differences of log Gamma and of psi, its derivative, are not computed by subtraction, because the float32 error of
log Gamma(1e6) is up to 0.5. With a = 1 / (d + c), b = 1 / (t + d + c) and n steps of the recurrence Gamma(x + 1) = x
Gamma(x),

    log Gamma(x + n) = (x + n - 1/2) log(x + c) - x + constant + p(1 / (x + c))
    psi(x + n)       = log(x + c) + q(1 / (x + c))

with polynomials p and q that have no constant part. Therefore

    log Gamma(t + d) - log Gamma(d) = (d + n - 1/2) log1p(t a) + t (log(t + d + c) - 1) - (p(a) - p(b)) - log(1 + v)
    psi(t + d) - psi(d)             = log1p(t a) - (q(a) - q(b)) + sum_k t / ((d + k) (t + d + k))

with 1 + v = prod_k (1 + t / (d + k)), k = 0 ... n - 1. The difference of a polynomial is (a - b) p[a, b] with
a - b = t a b. Horner's rule, applied to its own steps, evaluates p[a, b]. Every part has the factor t, so no two large
parts cancel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Approximation(NamedTuple):
    steps: int
    offset: float
    value: tuple[float, ...]
    """The coefficients of p, from the first power on."""
    slope: tuple[float, ...]
    """Of q."""


APPROXIMATIONS = {
    # Minimax for x >= 0: p' in units of |psi(x)| + x psi'(x) and q' in units of psi'(x), within 0.44 and 1.27 * 2^-24.
    # With this offset so few coefficients do. The kernels have the same.
    torch.float32: Approximation(
        1,
        1.0625,
        (1.1649971455335617e-01, 6.453761365264654e-03, -3.1088190153241158e-03, 6.054756813682616e-04),
        (
            -5.625019073486328e-01,
            -1.164751797914505e-01,
            -1.300294604152441e-02,
            9.474431164562702e-03,
            -2.5013317354023457e-03,
        ),
    ),
    # Stirling's series from x + 10 on. What it leaves out is less than the next parts, 3e-17 and 5e-17.
    torch.float64: Approximation(
        10,
        10.0,
        (1 / 12, 0, -1 / 360, 0, 1 / 1260, 0, -1 / 1680, 0, 1 / 1188, 0, -691 / 360360, 0, 1 / 156),
        (-1 / 2, -1 / 12, 0, 1 / 120, 0, -1 / 252, 0, 1 / 240, 0, -1 / 132, 0, 691 / 32760, 0, -1 / 12),
    ),
}


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), whose slope is torch.sigmoid(x)."""
    return torch.nn.functional.softplus(x, threshold=40)  # below it torch would drop e^-x, up to 2e-9


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^-x) for x > 0, whose slope is s = 1 / (e^x - 1).

    1 - e^-x = 1 / (1 + s), so the result is -log1p(s), which never cancels.
    """
    return -torch.log1p(torch.exp(-x) / -torch.expm1(-x))


def gamma_difference(t: Tensor, d: Tensor) -> Tensor:
    """log Gamma(t + d) - log Gamma(d) for t >= 0 and d > 0, which may broadcast."""
    t, d = _together(t, d)
    if _needs_gradient(t, d):
        return _differentiable(t, d)[0]
    return _value(t, d, _shared(t, d))


def digamma_difference(t: Tensor, d: Tensor) -> Tensor:
    """psi(t + d) - psi(d), the derivative of `gamma_difference` by d."""
    t, d = _together(t, d)
    if _needs_gradient(t, d):
        return _differentiable(t, d)[1]
    return _slope(t, d, _shared(t, d))


def log_factorial(t: Tensor) -> Tensor:
    """log Gamma(t + 1), log t! of a count, for t >= 0.

    The value is torch's log Gamma(t + 1) plus a correction: the rounding error of t + 1 times the slope, about
    t - 0.577. The correction matters for t < 1. Beyond 2 it does not, and is left out, so that infinity stays infinity.
    """
    (t,) = _together(t)
    small = t.clamp(max=2)
    lost = ((small + 1) - 1).sub_(small)
    return torch.lgamma(t + 1).sub_(lost.mul_(t.clamp(max=1).sub_(0.5772156649015329)))


def _together(*tensors: Tensor) -> list[Tensor]:
    """In their common dtype, at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


class _GammaDifferences(torch.autograd.Function):
    """Both differences. The second is the derivative of the first by d, and is kept for it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(t: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        shared = _shared(t, d)
        return _value(t, d, shared), _slope(t, d, shared)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        t, d, slope = ctx.saved_tensors
        t_grads, d_grads = [], []
        for order, grad in enumerate(grads):
            if grad is not None and ctx.needs_input_grad[0]:
                t_grads.append(grad * torch.polygamma(order, t + d))
            if grad is not None and ctx.needs_input_grad[1]:
                # As an output of this function the slope is differentiable itself.
                d_grads.append(grad * (_trigamma_difference(t, d, _shared(t, d)) if order else slope))
        return _summed(t_grads, t), _summed(d_grads, d)


def _differentiable(t: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    differences: tuple[Tensor, Tensor] = _GammaDifferences.apply(t, d)  # type: ignore[no-untyped-call]
    return differences


def _summed(grads: list[Tensor], like: Tensor) -> Tensor | None:
    return sum(grads[1:], grads[0]).sum_to_size(like.shape) if grads else None


class _Shared(NamedTuple):
    table: Approximation
    y: Tensor
    """t + d."""
    a: Tensor
    upper: Tensor
    b: Tensor
    """1 / upper."""
    log_ratio: Tensor
    step: Tensor
    """a - b."""
    shift: Tensor
    """t / d."""


def _shared(t: Tensor, d: Tensor) -> _Shared:
    table = APPROXIMATIONS[d.dtype]
    y = t + d
    a = 1 / (d + table.offset)
    upper = y + table.offset
    b = 1 / upper
    ratio = t * a
    return _Shared(table, y, a, upper, b, torch.log1p(ratio), ratio * b, t / d)


def _value(t: Tensor, d: Tensor, shared: _Shared) -> Tensor:
    table = shared.table
    value = torch.log(shared.upper).sub_(1).mul_(t)
    value = torch.addcmul(value, shared.log_ratio, d + (table.steps - 0.5))
    value = torch.addcmul(value, shared.step, divided_difference(table.value, shared.a, shared.b), value=-1)
    product = shared.shift  # less 1
    for k in range(1, table.steps):
        factor = t / (d + k)
        product = torch.addcmul(product + factor, product, factor)
    # Not in place: torch 2.11 compiles a Function that returns what it has written over to one whose gradient is 0.
    return value - torch.log1p(product)


def _slope(t: Tensor, d: Tensor, shared: _Shared) -> Tensor:
    table = shared.table
    divided = divided_difference(table.slope, shared.a, shared.b)
    slope = torch.addcmul(shared.log_ratio, shared.step, divided, value=-1)
    slope = torch.addcdiv(slope, shared.shift, shared.y)
    for k in range(1, table.steps):
        slope = slope + t / (d + k) / (shared.y + k)
    return slope


def _trigamma_difference(t: Tensor, d: Tensor, shared: _Shared) -> Tensor:
    """psi'(t + d) - psi'(d): `_slope` differentiated by d, where q(a) gives -a^2 q'(a)."""
    derivative = (0.0, *[k * c for k, c in enumerate(shared.table.slope, 1)])
    trigamma = shared.step * (divided_difference(derivative, shared.a, shared.b) - 1)
    for k in range(shared.table.steps):
        lower, upper = 1 / (d + k), 1 / (shared.y + k)
        trigamma = trigamma - t * lower * upper * (lower + upper)
    return trigamma


def divided_difference(coefficients: Sequence[float], a: Tensor, b: Tensor) -> Tensor:
    """(p(a) - p(b)) / (a - b) of the polynomial p with these coefficients from the first power on.

    Horner's rule computes p(a). Applied to its own steps at b it computes the quotient. If `a` has fewer elements than
    `b`, such as one per column, half of the work costs nothing.
    """
    outer: Tensor | float = coefficients[-1]
    inner: Tensor | None = None
    for coefficient in coefficients[-2::-1]:
        outer = outer * a + coefficient
        assert isinstance(outer, Tensor)
        inner = torch.add(outer, b, alpha=coefficients[-1]) if inner is None else torch.addcmul(outer, inner, b)
    assert inner is not None
    return inner


def polynomial(coefficients: Sequence[float], x: Tensor) -> Tensor:
    """The polynomial with these coefficients, from the constant part on."""
    result = coefficients[-1] * x
    for coefficient in coefficients[-2:0:-1]:
        # A sum keeps nothing for its gradient, so it is written over the product.
        result = result.add_(coefficient) * x
    return result.add_(coefficients[0])
