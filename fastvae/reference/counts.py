"""The negative binomial likelihood, its zero-inflated form, and the Poisson likelihood in plain PyTorch.

Let d be the dispersion, and as in scVI m = mean + eps and e = d + eps. Then

    -log p(t) = d log((d + m) / e) + t log((d + m) / m) - log(Gamma(t + d) / Gamma(d)) + log t!
    slope by the mean        d (m - t) / ((d + m) m)
    slope by the dispersion  log((d + m) / e) - d mean / (e (d + m)) + t / (d + m) - (psi(t + d) - psi(d))

For a large d or t these parts are large and cancel in float32. At t = mean = 100 and d = 1e8 two parts of 1842 give a
result of 3.2, and a slope of 1e-14 would be lost completely. The parts are therefore combined first. `special` has the
forms of log Gamma and psi. Let c = 17/16, a = 1 / (d + c), b = 1 / (t + d + c), and log t! = (t + 1/2) log(t + c) - t +
r(1 / (t + c)), where r is a polynomial of degree 5, minimax within 9e-8. Then

    -log p(t) = d log(1 + x) + t log(1 + z) + log((t + c) (d + c) b) / 2 + log(1 + t / d) + p(a) - p(b) + r
    1 + x = (d + m) (d + c) b / e,  x = (d (mean - t) + c mean - eps t) b / e
    1 + z = (d + m) (t + c) b / m,  z = d (t - m + c) b / m

In the slope by the dispersion the logarithms reduce to log(1 + x) - x, and x and the next two parts to
x (m - t) / (d + m) + c t b / e.

For t >= 1 `fastvae.kernels.counts` starts from t - 1, because log Gamma(t + d) then needs no recurrence:

    log Gamma(t + d) = (t + d - 1/2) log(t - 1 + d + c) - (t - 1 + d) + constant + p(1 / (t - 1 + d + c)).

With this form the slope by the dispersion has no cancelling parts left at t = 1 and mean << 1 << d. Here, without it,
the float32 error of the slope is up to 2e-6 t / d^2. Between 0 and 1, where there are no counts, the error of the value
is about 1e-6 in both.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastvae.reference.precision import sigmoid
from fastvae.reference.special import (
    APPROXIMATIONS,
    divided_difference,
    gamma_difference,
    log_factorial,
    polynomial,
    softplus,
)

# Of r, from the constant part on.
_LOG_FACTORIAL = (-0.143561377569, 0.116529612751, 0.00631165384254, -0.00280814476002, 0.000313697614544, 0.00010598)

# Of (log(1 + x) / s - 2) / s^2 in s^2. In float32 minimax, within 3e-7 of 2/3; in float64 the parts left out are less
# than 4e-18.
_LOG1P = {
    torch.float32: (0.6666664034, 0.4000756064, 0.282366198, 0.2685149802),
    torch.float64: tuple(2 / (2 * k + 3) for k in range(17)),
}


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
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            of_mean, of_dispersion, _ = slopes(mean, dispersion, target, ctx.eps)
            if ctx.needs_input_grad[0]:
                by_mean = (grad * of_mean).sum_to_size(mean.shape)
            if ctx.needs_input_grad[1]:
                by_dispersion = (grad * of_dispersion).sum_to_size(dispersion.shape)
        if ctx.needs_input_grad[2]:
            odds = torch.log1p(dispersion / (mean + ctx.eps))
            by_target = grad * (odds - torch.digamma(target + dispersion) + torch.digamma(target + 1))
        return by_mean, by_dispersion, by_target, None


# Below, selections are products with 0 or 1, and comparisons are roundings: on a CPU `where` and `<` take 4 to 20 times
# as long as a product (torch 2.13). What was just made is written over where no gradient needs it, and what depends on
# the dispersion alone comes first, because it is often one number for each column.


def _value(mean: Tensor, d: Tensor, t: Tensor, eps: float) -> Tensor:
    if mean.dtype is torch.float64:
        parts = d * torch.log1p(mean / (d + eps)) + t * torch.log1p(d / (mean + eps))
        return parts - gamma_difference(t, d) + log_factorial(t)
    table = APPROXIMATIONS[torch.float32]
    c = table.offset
    b = (t + (d + c)).reciprocal_()
    of_count = t + c
    rest = (b * of_count).mul_(d + c).sqrt_().mul_((t / d).add_(1)).log_()
    a = 1 / (d + c)
    rest += polynomial(table.value, a) * a - polynomial(table.value, b).mul_(b)
    z = (of_count - mean).sub_(eps).mul_(d).mul_(b).div_(mean + eps).log1p_()
    rest += polynomial(_LOG_FACTORIAL, of_count.reciprocal_())
    rest = torch.addcmul(rest, t, z)
    # At t = 0 the rest is 0, which its parts give only to a rounding of 1.
    rest *= t.clamp(0, 1).ceil_()
    # Not in place, as in `special`.
    return torch.addcmul(rest, d, _x(mean, d, mean - t, eps, b).log1p_())


def _x(mean: Tensor, d: Tensor, above: Tensor, eps: float, b: Tensor) -> Tensor:
    """above = mean - t."""
    return torch.addcmul(above, mean, (APPROXIMATIONS[d.dtype].offset - eps) / (d + eps)) * b


def slopes(mean: Tensor, d: Tensor, t: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The slopes by the mean and by the dispersion, for each element. The third tensor is log(1 + x); for t = 0 the
    value is d times it.
    """
    table = APPROXIMATIONS[mean.dtype]
    c, e = table.offset, d + eps
    a, b = 1 / (d + c), (t + (d + c)).reciprocal_()
    above = mean - t
    x = _x(mean, d, above, eps, b)
    share = above.add_(eps) / (mean + e)
    t_b = t * b
    log_ratio = torch.log1p(x)
    far = (log_ratio - share).add_(eps / e)
    by_dispersion = log1p_minus(x.clamp(-0.5, 0.5)).addcmul_(x, share).addcmul_(t_b, c / e)
    # Of weight 0 and 1 `lerp` returns just what it is given, so the rounding errors of far are not added.
    by_dispersion.lerp_(far, x.detach().round().clamp_(-1, 1).abs_())
    for k in range(table.steps):
        by_dispersion.sub_(t / ((t + (d + k)) * (d + k)))
    by_dispersion.addcmul_(t_b * a, divided_difference(table.slope, a, b))
    return (share * d).div_(mean + eps), by_dispersion, log_ratio


def log1p_minus(x: Tensor) -> Tensor:
    """log(1 + x) - x for |x| <= 1/2. With s = x / (2 + x), log(1 + x) = 2 (s + s^3 / 3 + ...), and 2 s - x = -x s."""
    s = x / (2 + x)
    z = s * s
    return s * (z * polynomial(_LOG1P[x.dtype], z)).sub_(x)


def inflated(n: Tensor, logits: Tensor, t: Tensor) -> Tensor:
    """-log(sigma(l) [t = 0] + sigma(-l) e^-n) for the negative binomial's value n. The logits l may be smaller."""
    return _Inflated.apply(n, logits, t)  # type: ignore[no-any-return, no-untyped-call]


class _Inflated(torch.autograd.Function):
    """For t > 0 it is softplus(l) + n. For t = 0 it is

        log(1 + (1 - e^-n) / (e^l + e^-n)),

    in which nothing cancels. Where both exponentials vanish, e^k is taken out of the logarithm, with k = min(-l, n) -
    60: of the 1 nothing is left there.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(n: Tensor, logits: Tensor, t: Tensor) -> Tensor:
        k = torch.minimum(-logits, n).sub_(60).clamp_(min=0, max=torch.finfo(n.dtype).max)
        both = (logits + k).exp_().add_((k - n).exp_())
        of_zero = torch.expm1(-n).div_(both).neg_().log1p_().add_(k)
        # The value for t > 0 is never the smaller one. For t = 0 it is taken out by a limit of -infinity.
        limit = t.clamp(0, 1).ceil_().sub_(0.5).mul_(math.inf)
        return torch.maximum(of_zero, torch.minimum(softplus(logits).add(n), limit))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        n, logits, t = ctx.saved_tensors
        zero = t == 0
        # So a NaN among the parameters reaches no slope that does not depend on it.
        factor, by_logits = inflated_slopes(torch.where(zero, n, 0.0), logits, (~zero).to(n.dtype))
        return grad * torch.where(zero, factor, 1.0), (grad * by_logits).sum_to_size(logits.shape), None


def inflated_slopes(n: Tensor, logits: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The slopes by n and by the logits, for each element. At t = 0 the slope by n is the negative binomial's share of
    the zeros.
    """
    count = t.clamp(0, 1).ceil_().to(n.dtype)  # 1 where there is one, and 0 for t = 0
    # Of torch's sigmoid the gradient is 0 above 17, so where it is differentiated it is ours, which takes longer.
    f = sigmoid if torch.is_grad_enabled() else torch.sigmoid
    of_zero = f(-logits) * torch.expm1(-n) * f(logits + n)
    return torch.maximum(f(-logits - n), count), torch.lerp(of_zero, f(logits).expand_as(n), count)


# log t! = t log t - t + log(2 pi t) / 2 + 1 / (12 t) - 1 / (360 t^3) + ..., from the last part to the first. From t = 6
# on what follows is less than 1e-13.
_STIRLING = (1 / 156, -691 / 360360, 1 / 1188, -1 / 1680, 1 / 1260, -1 / 360, 1 / 12)


def poisson(log_rate: Tensor, target: Tensor) -> Tensor:
    """e^x - t x + log t!, where x is the logarithm of the rate."""
    return _Poisson.apply(log_rate, target)  # type: ignore[no-any-return, no-untyped-call]


class _Poisson(torch.autograd.Function):
    """From t = 6 on its parts would cancel. There it is t (e^d - 1 - d) + (log t! - t log t + t) with d = x - log t."""

    generate_vmap_rule = True

    @staticmethod
    def forward(log_rate: Tensor, target: Tensor) -> Tensor:
        inverse, log_t = 1 / target, torch.log(target)
        square = inverse.square()
        series = _STIRLING[0] * square
        for coefficient in _STIRLING[1:-1]:
            series.add_(coefficient).mul_(square)
        series.add_(_STIRLING[-1]).mul_(inverse).add_(log_t, alpha=0.5).add_(0.5 * math.log(2 * math.pi))
        d = log_rate - log_t
        large = torch.expm1(d).sub_(d).mul_(target).add_(series)
        small = torch.exp(log_rate).sub_(target * log_rate).add_(log_factorial(target))
        return torch.where((target >= 6) & (target < math.inf), large, small)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        log_rate, target = ctx.saved_tensors
        by_target = grad * (torch.digamma(target + 1) - log_rate) if ctx.needs_input_grad[1] else None
        return grad * (torch.exp(log_rate) - target), by_target
