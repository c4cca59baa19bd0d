"""The negative log-likelihoods of counts with 60 digits, and the points at which `test_counts.py` tries them."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import mpmath
import torch
from torch import Tensor

from special_values import around, gammas, random

EPS = 1e-8
Numbers = list[mpmath.mpf]


class Points(NamedTuple):
    """Inputs, the target last, float32 [N] each; the value and the slopes by the others; and the scale of each."""

    inputs: tuple[Tensor, ...]
    results: Tensor
    """[results, N], float64."""
    scales: Tensor
    """S = |f| + sum |x df/dx| over the parameters: the target is given."""


@cache
def negative_binomial(mean: mpmath.mpf, d: mpmath.mpf, t: mpmath.mpf) -> tuple[mpmath.mpf, Numbers, list[Numbers]]:
    """-log p(t), its slopes by mean and d, and the matrix of its second derivatives, by scVI's formula."""
    eps = mpmath.mpf(EPS)
    m, e, total = mean + eps, d + eps, d + mean + eps
    value = d * mpmath.log(total / e) + t * mpmath.log(total / m)
    (gamma_d, psi_d, bend_d), (gamma_td, psi_td, bend_td) = gammas(d), gammas(t + d)
    value += gamma_d + mpmath.loggamma(t + 1) - gamma_td
    by_mean = (d + t) / total - t / m
    by_d = mpmath.log(total / e) + (d + t) / total - d / e + psi_d - psi_td
    mixed = 1 / total - (d + t) / total**2
    twice_by_d = 2 / total - (d + t) / total**2 - 2 / e + d / e**2 + bend_d - bend_td
    return value, [by_mean, by_d], [[t / m**2 - (d + t) / total**2, mixed], [mixed, twice_by_d]]


def zero_inflated(
    mean: mpmath.mpf, d: mpmath.mpf, l: mpmath.mpf, t: mpmath.mpf
) -> tuple[mpmath.mpf, Numbers, list[Numbers]]:
    """-log(sigma(l) [t = 0] + sigma(-l) e^-n), with n the negative binomial's."""
    n, slopes, bends = negative_binomial(mean, d, t)
    inflation, spread = 1 / (1 + mpmath.exp(-l)), 1 / ((1 + mpmath.exp(-l)) * (1 + mpmath.exp(l)))
    value = mpmath.log1p(mpmath.exp(l)) + n
    if t:
        rows = [[*row, mpmath.mpf(0)] for row in bends]
        return value, [*slopes, inflation], [*rows, [mpmath.mpf(0), mpmath.mpf(0), spread]]
    value = -mpmath.log(inflation + mpmath.exp(-value))
    share = 1 / (1 + mpmath.exp(l + n))  # of the negative binomial in the probability of 0
    other = share / (1 + mpmath.exp(-l - n))
    rows = [
        [share * bends[i][j] - other * slopes[i] * slopes[j] for j in range(2)] + [-other * slopes[i]] for i in range(2)
    ]
    rows.append([-other * slope for slope in slopes] + [spread - other])
    by_logits = inflation - 1 / (1 + mpmath.exp(-l - n))
    return value, [*(share * slope for slope in slopes), by_logits], rows


@cache
def points(inflated: bool, count: int = 200, seed: int = 3) -> Points:
    """Dispersions from 1e-6 to 1e8, counts from 0 to 1e6 and numbers between, means from 1e-6 to 1e6 and 0."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    zeros, means, dispersions = torch.zeros(count), random(count, -6, 6), random(count, -6, 8)
    counts, numbers = random(count, 0, 6).floor(), random(count, -6, 6)
    small = torch.randint(0, 12, (count,)).double()
    parts = [
        (random(count, -6, 6), random(count, -6, 8), zeros),
        (means, dispersions, counts),
        (random(count, -6, 6), random(count, -6, 8), small),
        (random(count, -6, 6), random(count, -6, 8), numbers),
        # The target close to the mean, where the largest parts cancel: by a rounding to by their standard deviation.
        (counts * (1 + 0.1 * torch.randn(count)).abs() + 1e-3, random(count, -2, 8), counts),
        (numbers * (1 + random(count, -7, 0)), random(count, -2, 8), numbers),
        ((small + torch.randn(count) * small.sqrt()).abs() + 1e-3, random(count, 0, 8), small),
        (zeros[:40], random(40, -6, 8), counts[:40]),
        (zeros[:40], random(40, -6, 8), zeros[:40]),
    ]
    d = [10.0**k for k in range(-6, 9)]
    # Both sides of t = 1, from where the kernel counts from t - 1; and a mean << 1 there.
    parts += [
        tuple(torch.tensor([(m, x, t) for x in d for m in (1e-6, 1e-3, 0.1, 1, 30) for t in around(1)]).double().T)
    ]
    mean, d, t = torch.cat([torch.stack(part) for part in parts], 1).float()
    inputs: tuple[Tensor, ...] = mean, d, t
    if inflated:
        signs = torch.randint(0, 2, t.shape) * 2 - 1
        l = (signs * random(len(t), -3, 2)).float()
        # A quarter where both of its parts have the same probability: the form for 0 changes near there.
        near = -d.double() * torch.log1p(mean.double() / d) + 0.3 * torch.randn(len(t))
        inputs = (
            mean,
            d,
            torch.where(torch.rand(len(t)) < 0.25, near.float(), l),
            torch.where((t < 1) | (torch.rand(len(t)) < 0.3), 0, t),
        )
    torch.set_rng_state(state)
    function = zero_inflated if inflated else negative_binomial
    results, scales = [], []
    with mpmath.workdps(60):
        for row in zip(*[x.tolist() for x in inputs], strict=True):
            numbers_of_row = [mpmath.mpf(x) for x in row]
            value, slopes, bends = function(*numbers_of_row)
            found = [value, *slopes]
            moved = [slopes, *bends]
            results.append([float(f) for f in found])
            scales.append(
                [
                    float(abs(f) + sum(abs(x * y) for x, y in zip(numbers_of_row, of, strict=False)))
                    for f, of in zip(found, moved, strict=True)
                ]
            )
    return Points(inputs, *(torch.tensor(x, dtype=torch.float64).T for x in (results, scales)))
