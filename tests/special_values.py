"""Special functions with 80 digits, the points at which `test_special.py` tries them, and the errors they may have."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import mpmath
import torch
from torch import Tensor

UNIT = 2.0**-24


class Points(NamedTuple):
    """Inputs, float32 [N], and in float64 [N] what each result is, with the scale of its error."""

    inputs: tuple[Tensor, ...]
    results: dict[str, tuple[Tensor, Tensor]]


# In units of 2^-24 of the scale: of the portable form, of the fast form if each of NVIDIA's instructions is as far off
# as its documentation allows, and of plain PyTorch in float32. Beside them is what scans of 2^19 points in each of
# several ranges found.
BOUNDS = {
    "gamma difference": (4, 10.5, 4),  # 3.6, 9.9, 3.3
    "digamma difference": (6, 11, 6),  # 5.3, 10.1, 4.9
    "trigamma difference": (math.nan, math.nan, 10),  # 8.6
    "log factorial": (6, 11.5, 6),  # 5.6, 10.9, 5.0
    "log1p": (3, 7, math.nan),  # 2.7, 6.6
    "log1p minus": (5, 7, 4.5),  # 4.9, 6.7, 4.3
    "softplus": (4, 7, 3),  # 3.5, 6.1, 2.0
    "sigmoid": (3.5, 7, 3),  # 2.9, 6.7, -
    "log1mexp": (3, 9, 2),  # 2.6, 8.6, 1.2
    "log1mexp slope": (3.5, 7.5, 3),  # 2.9, 6.9, 2.2
}


def around(*values: float) -> list[float]:
    """Each of them in float32, and its neighbours."""
    numbers = torch.tensor(values)
    ends = [torch.nextafter(numbers, torch.tensor(end)) for end in (-math.inf, math.inf)]
    return torch.cat([numbers, *ends]).tolist()


def random(count: int, low: float, high: float) -> Tensor:
    """Powers of ten, uniform in the exponent."""
    return 10 ** torch.empty(count, dtype=torch.float64).uniform_(low, high)


@cache
def gammas(x: mpmath.mpf) -> tuple[mpmath.mpf, mpmath.mpf, mpmath.mpf]:
    """log Gamma, psi and its derivative, with 80 digits."""
    with mpmath.workdps(80):
        return mpmath.loggamma(x), mpmath.psi(0, x), mpmath.psi(1, x)


@cache
def gamma_points() -> Points:
    generator_state = torch.get_rng_state()
    torch.manual_seed(1)
    dense = [10 ** (-6 + 14 * k / 35) for k in range(36)]
    pairs = [(t, d) for t in (1e-6, 0.01, 0.5, 1, 2, 3, 7, 10, 30.5, 1000, 1e6) for d in dense]  # t >> d and d >> t
    pairs += [(t, d) for d in (1e-6, 1, 1e8) for t in (0, *around(1), 1e6)]
    for d in (1e-6, 0.03, 0.5, 1, 3.7, 40, 1000, 12345.678, 1e6):
        # The arguments of log1p are 1: t = d, and t = d + 17/16.
        pairs += [(t, d) for t in (*around(d), *around(d + 1.0625))]
    # Where log Gamma(t + d) = log Gamma(d), and, for t to 0, where psi(d) = 0.
    pairs += [(1, d) for d in around(1)] + [(2, d) for d in around(0.618034)] + [(3, 0.324718), (1e-6, 1.4616321)]
    t, d = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    count = 150
    t = torch.cat(
        [t, random(count, -6, 6), random(count, 0, 6).floor(), torch.randint(0, 12, (count,)), random(count, -3, 1)]
    )
    d = torch.cat([d, random(count, -6, 8), random(count, -6, 8), random(count, -2, 2), random(count, -1.5, 1.5)])
    torch.set_rng_state(generator_state)
    t, d = t.float(), d.float()
    found = []
    with mpmath.workdps(80):
        for x, y in zip(map(mpmath.mpf, t.tolist()), map(mpmath.mpf, d.tolist()), strict=True):
            gamma, slope, bend = (above - below for above, below in zip(gammas(x + y), gammas(y), strict=True))
            psi = gammas(x + y)[1]
            found.append([float(v) for v in (gamma, abs(gamma) + y * slope + x * abs(psi), slope, bend)])
    gamma, scale, slope, bend = torch.tensor(found, dtype=torch.float64).unbind(1)
    results = {
        "gamma difference": (gamma, scale),
        "digamma difference": (slope, slope),
        "trigamma difference": (bend, bend.abs()),
    }
    return Points((t, d), results)


@cache
def points(name: str) -> Points:
    """Of a function of one argument."""
    generator_state = torch.get_rng_state()
    torch.manual_seed(2)
    if name == "log factorial":
        x = torch.cat([torch.arange(200), random(600, -8, 8), random(300, 0, 8).floor(), random(300, -0.3, 1)])
        x = torch.cat([x, torch.tensor([*around(1, 6), 1e8])])
    elif name == "log1p minus":
        x = random(800, -12, math.log10(0.5))
        x = torch.cat([x, -x, torch.zeros(1), torch.linspace(-0.5, 0.5, 801)])
    elif name == "log1p":
        x = torch.cat([torch.zeros(1), random(800, -30, 38), random(400, -1, 1), torch.tensor(around(1))])
    elif name == "softplus":
        x = torch.cat([random(600, -6, 1.9), -random(600, -6, 1.9), torch.tensor([0, *around(0.5, -0.5)])])
    else:
        x = torch.cat([random(600, -18, 1.9), random(600, -1, 0.5), torch.tensor(around(0.5, math.log(2)))])
    torch.set_rng_state(generator_state)
    x = x.float()
    with mpmath.workdps(80):
        rows = [EXACT[name](mpmath.mpf(value)) for value in x.tolist()]
    columns = torch.tensor([[float(v) for v in row] for row in rows], dtype=torch.float64).unbind(1)
    names = {"softplus": ("softplus", "sigmoid"), "log1mexp": ("log1mexp", "log1mexp slope")}.get(name, (name,))
    return Points((x,), {each: (columns[2 * k], columns[2 * k + 1]) for k, each in enumerate(names)})


def log_factorial(x: mpmath.mpf) -> tuple[mpmath.mpf, ...]:
    value = mpmath.loggamma(x + 1)
    return value, abs(value)


def log1p(x: mpmath.mpf) -> tuple[mpmath.mpf, ...]:
    value = mpmath.log1p(x)
    return value, value


def log1p_minus(x: mpmath.mpf) -> tuple[mpmath.mpf, ...]:
    value = mpmath.log1p(x) - x
    return value, -value


def softplus(x: mpmath.mpf) -> tuple[mpmath.mpf, ...]:
    value, slope, other = mpmath.log1p(mpmath.exp(x)), 1 / (1 + mpmath.exp(-x)), 1 / (1 + mpmath.exp(x))
    return value, value + abs(x) * slope, slope, slope + abs(x) * slope * other


def log1mexp(x: mpmath.mpf) -> tuple[mpmath.mpf, ...]:
    value, slope = mpmath.log(-mpmath.expm1(-x)), 1 / mpmath.expm1(x)
    return value, -value + x * slope, slope, slope + x * slope * (1 + slope)


EXACT = {
    "log factorial": log_factorial,
    "log1p": log1p,
    "log1p minus": log1p_minus,
    "softplus": softplus,
    "log1mexp": log1mexp,
}


def errors(found: dict[str, Tensor], at: Points) -> dict[str, float]:
    """The largest error of each result, in units of 2^-24 of its scale. Infinite if one is NaN, or not 0 where it must
    be.
    """
    largest = {}
    for name, value in found.items():
        exact, scale = at.results[name]
        off = (value.detach().cpu().double() - exact).abs()
        largest[name] = torch.where(off == 0, 0.0, off / scale).nan_to_num(nan=math.inf).max().item() / UNIT
    return largest
