"""The negative binomial likelihood in plain PyTorch.

With d the dispersion, m = mean + eps and e = d + eps, as scVI has it,

    -log p(t) = d log((d + m) / e) + t log((d + m) / m) - log(Gamma(t + d) / Gamma(d)) + log t!
    slope by the mean        d (m - t) / ((d + m) m)
    slope by the dispersion  log((d + m) / e) - d mean / (e (d + m)) + t / (d + m) - (psi(t + d) - psi(d))

In float32 these parts are large and cancel, where d or t is: at t = mean = 100 and d = 1e8 two parts of 1842 leave 3.2,
and of a slope of 1e-14 nothing is left. So they are put together first, with the forms of `special` for log Gamma and
psi, c = 17/16 and

    k = 1 if t >= 1, else 0;  s = t - k;  upper = s + d + c;  a = 1 / (d + c);  b = 1 / upper:

    log Gamma(d + 1) = (d + 1/2) log(d + c) - d + constant + p(a);  Gamma(d) = Gamma(d + 1) / d
    log Gamma(t + d + 1 - k) = (t + d + 1/2 - k) log(upper) - (t + d - k) + constant + p(b)
    log t! = (t + 1/2) log(t + c) - t + r(1 / (t + c))

where k = 1 needs no recurrence for t + d. The logarithms are gathered:

    -log p(t) = d log(1 + x) + t log(1 + z) + log((t + c) (d + c) b) / 2 + log(1 + (t or s + c) / d) - k
                + (p(a) - p(b)) + r(1 / (t + c))
    1 + x = (d + m) (d + c) b / e,  x = (d (mean - s) + c mean - eps s) b / e
    1 + z = (d + m) (t + c) b / m,  z = (d (t - m + c) + k m) b / m

and the slope by the dispersion is log(1 + x) - x, and what the first orders of the other parts leave of x. All of it
has a factor t or mean^2, as the slope has. r is a polynomial of degree 5, minimax within 9e-8.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvae.reference.special import (
    APPROXIMATIONS,
    digamma_difference,
    divided_difference,
    gamma_difference,
    log_factorial,
)

# Of r, from the constant part on.
_LOG_FACTORIAL = (-0.143561377569, 0.116529612751, 0.00631165384254, -0.00280814476002, 0.000313697614544, 0.00010598)


def negative_binomial(mean: Tensor, dispersion: Tensor, target: Tensor, eps: float) -> Tensor:
    """-log p(target), float32 or float64; the dispersion may be smaller than the target."""
    return _NegativeBinomial.apply(mean, dispersion, target, eps)  # type: ignore[no-any-return, no-untyped-call]


class _NegativeBinomial(torch.autograd.Function):
    """Its gradients are computed from the formulas of the slopes, not by differentiating the value."""

    generate_vmap_rule = True

    @staticmethod
    def forward(mean: Tensor, dispersion: Tensor, target: Tensor, eps: float) -> Tensor:
        return _value(mean, dispersion, target, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mean, dispersion, target = ctx.saved_tensors
        by_mean = by_dispersion = by_target = None
        if ctx.needs_input_grad[0]:
            by_mean = (grad * slope_by_mean(mean, dispersion, target, ctx.eps)).sum_to_size(mean.shape)
        if ctx.needs_input_grad[1]:
            slope = slope_by_dispersion(mean, dispersion, target, ctx.eps)
            by_dispersion = (grad * slope).sum_to_size(dispersion.shape)
        if ctx.needs_input_grad[2]:
            odds = torch.log1p(dispersion / (mean + ctx.eps))
            by_target = grad * (odds - torch.digamma(target + dispersion) + torch.digamma(target + 1))
        return by_mean, by_dispersion, by_target, None


def slope_by_mean(mean: Tensor, d: Tensor, t: Tensor, eps: float) -> Tensor:
    m = mean + eps
    return d * (m - t) / ((d + m) * m)


def _value(mean: Tensor, d: Tensor, t: Tensor, eps: float) -> Tensor:
    m, e = mean + eps, d + eps
    if mean.dtype is torch.float64:
        parts = d * torch.log1p(mean / e) + t * torch.log1p(d / m)
        return parts - gamma_difference(t, d) + log_factorial(t)
    table = APPROXIMATIONS[torch.float32]
    c = table.offset
    k = (t >= 1).to(t.dtype)
    s = t - k
    a, b = 1 / (d + c), torch.reciprocal(s + (d + c))
    x = torch.addcmul(c * mean - eps * s, d, mean - s) * b / e
    z = torch.addcmul(k * m, d, t - m + c) * b / m
    u = torch.reciprocal(t + c)
    rest = torch.full_like(u, _LOG_FACTORIAL[-1])
    for coefficient in _LOG_FACTORIAL[-2::-1]:
        rest.mul_(u).add_(coefficient)
    rest.addcmul_(s * a * b, divided_difference(table.value, a, b)).sub_(k)
    rest.add_(torch.log((t + c) * (d + c) * b), alpha=0.5).add_(torch.log1p(torch.addcmul(t, k, c - k) / d))
    rest.addcmul_(t, torch.log1p(z))
    # At t = 0 the rest is 0, which its parts give only to a rounding of 1.
    return torch.addcmul(torch.where(t == 0, 0.0, rest), d, torch.log1p(x))


def slope_by_dispersion(mean: Tensor, d: Tensor, t: Tensor, eps: float) -> Tensor:
    m, e = mean + eps, d + eps
    total = d + m
    if mean.dtype is torch.float64:
        return torch.log1p(mean / e) - d * mean / (e * total) + t / total - digamma_difference(t, d)
    table = APPROXIMATIONS[torch.float32]
    c = table.offset
    whole = t >= 1
    s = torch.where(whole, t - 1, t)
    a, b = 1 / (d + c), 1 / (s + d + c)
    odds = mean / e
    x = (d * (mean - s) + (c * mean - eps * s)) / e * b
    near = x.abs() < 0.5
    bent, far = log1p_minus(torch.where(near, x, 0.0)), torch.log1p(x)
    part = s - odds * d - m / d
    first = torch.where(near, bent + b * (part * (s - m + c) / total + (c * odds - m / d)), far + part / total)
    second = torch.where(near, bent + x * (m - t) / total + c * t / e * b, far + (t - odds * d) / total)
    second = second - t / (d * (t + d))
    return torch.where(whole, first, second) + s * a * b * divided_difference(table.slope, a, b)


def log1p_minus(x: Tensor) -> Tensor:
    """log(1 + x) - x for |x| < 1/2. With s = x / (2 + x), log(1 + x) = 2 (s + s^3 / 3 + ...), and 2 s - x = -x s. The
    series is minimax of degree 3 in s^2, within 1.5e-7 of 1/3.
    """
    s = x / (2 + x)
    z = s * s
    series = ((0.1342574901 * z + 0.141183099) * z + 0.2000378032) * z + 0.3333332017
    return s * (2 * z * series - x)
