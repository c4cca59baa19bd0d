"""Compare a likelihood's term with its formula, and derive the allowed error from the formula."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from fastvae.likelihoods.likelihood import Likelihood

# Parameters at which an unstable formula fails: e^x is infinite in float32 from x = 89.
EXTREMES = (0.0, -0.0, 1e-4, -1e-4, 1.0, -1.0, 20.0, -20.0, 100.0, -100.0, 1e4, -1e4, float("nan"))


class Exact(NamedTuple):
    """The value and the slopes of each element in float64, and the two scales of the error bound of each."""

    results: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]

    def scale(self, k: int, roundings: int) -> Tensor:
        """The change of result k per relative error of 2^-24, for this number of roundings.

        To first order it is |f| + sum_i |x_i df/dx_i|, because in a stable computation an intermediate error has no
        more effect than an error of the result and of the inputs. The second order is added, because the first vanishes
        for a square near 0. Infinities and NaN do not change.
        """
        return self.first[k] + roundings * 2.0**-24 * self.second[k]


def exact(likelihood: Likelihood, tensors: Sequence[Tensor]) -> Exact:
    """The results in float64 and their scales. The tensors are the parameters and, last, the target, as numbers."""
    inputs = [tensor.detach().double().cpu().requires_grad_() for tensor in tensors]
    if likelihood.grouped:
        return _exact_of_groups(likelihood, inputs)
    value = likelihood.formula(*inputs)
    if value.shape != inputs[-1].shape:
        raise ValueError(
            f"{likelihood}.formula must return a value for each element, {list(inputs[-1].shape)}, "
            f"got {list(value.shape)}"
        )
    slopes = derivatives(value, inputs)
    results = [value, *slopes[: len(tensors) if likelihood.target_has_slope else -1]]
    sizes = [torch.where(x.isfinite(), x.detach().abs(), 0.0) for x in inputs]
    first, second = [], []
    for result in results:
        moved = derivatives(result, inputs)
        first.append(result.detach().abs() + _weighted(sizes, moved))
        bent = [x * _weighted(sizes, derivatives(slope, inputs)) for x, slope in zip(sizes, moved, strict=True)]
        second.append(torch.stack(bent).sum(0) / 2)
    return Exact([result.detach() for result in results], first, second)


def _exact_of_groups(likelihood: Likelihood, inputs: list[Tensor]) -> Exact:
    """The same for elements that have an axis of their own: the sums over i go along it. The second order of slopes,
    which would take third derivatives by every pair of parameters, is left out, so the bound is narrower.
    """
    parameters, target = inputs
    grouping = likelihood.grouping(parameters.shape, target.shape)
    if grouping.target_axis is None:
        target.requires_grad_(False)
    factors = [factor.requires_grad_() for factor in likelihood.inner_factors(parameters.detach(), target.detach())]
    value = likelihood.formula(parameters, target, *factors)
    expected = list(parameters.shape)
    expected[grouping.axis] = 1
    if list(value.shape) != expected:
        raise ValueError(
            f"{likelihood}.formula must return a value for each element, {expected}, got {list(value.shape)}"
        )
    varied = [x for x in (*inputs, *factors) if x.requires_grad]
    of_target = grouping.axis if grouping.target_axis is None else grouping.target_axis
    axes = [of_target if x is target else grouping.axis for x in varied]
    sizes = [torch.where(x.isinf(), 0.0, x.detach().abs()) for x in varied]

    def along_axes(moved: Sequence[Tensor], batched: int = 0) -> Tensor:
        each = zip(sizes, moved, axes, strict=True)
        return torch.stack([_weighted([s], [d]).sum(axis + batched, keepdim=True) for s, d, axis in each]).sum(0)

    slopes = derivatives(value, varied)
    first = [value.detach().abs() + along_axes(slopes), slopes[0].detach().abs()]
    second = [torch.zeros_like(first[0]), torch.zeros_like(first[1])]
    for slope, size, axis in zip(slopes, sizes, axes, strict=True):
        moved = along_axes(_derivatives_of_each(slope, axis, varied), batched=1).squeeze(axis + 1).movedim(0, axis)
        second[0] += 0.5 * (size * moved).sum(axis, keepdim=True)
        if slope is slopes[0]:
            first[1] += moved
    # A share of a sum that is less than 2^-126 of the greatest may be lost, because such numbers become 0.
    first[1] += 2.0**-102 * torch.where(first[1].isfinite(), first[1], 0.0).sum()
    return Exact([value.detach(), slopes[0].detach()], first, second)


def _weighted(sizes: Sequence[Tensor], slopes: Sequence[Tensor]) -> Tensor:
    # A slope at an infinity or NaN, of size 0 here, may be infinite or NaN.
    terms = [torch.where(size == 0, 0.0, size * d.detach().abs()) for size, d in zip(sizes, slopes, strict=True)]
    return torch.stack(terms).sum(0)


def derivatives(result: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The derivatives of each element of `result` by the same element of each input."""
    if not result.requires_grad:
        return [torch.zeros_like(x) for x in inputs]
    return list(torch.autograd.grad(result.sum(), inputs, create_graph=True, allow_unused=True, materialize_grads=True))


def _derivatives_of_each(slope: Tensor, axis: int, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The derivatives of each number along an axis by each input, all at once, because one after the other takes as
    many passes: of size [numbers, *input.shape].
    """
    count = slope.shape[axis]
    if not slope.requires_grad:
        return [x.new_zeros(count, *x.shape) for x in inputs]
    one_each = torch.eye(count, dtype=slope.dtype).view(count, *[count if d == axis else 1 for d in range(slope.ndim)])
    found = torch.autograd.grad(
        slope, inputs, one_each.expand(count, *slope.shape), retain_graph=True, allow_unused=True, is_grads_batched=True
    )
    return [x.new_zeros(count, *x.shape) if d is None else d for x, d in zip(inputs, found, strict=True)]


def ulp(values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The distance to the next number of `dtype` at `values` (float64)."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(values.abs().clamp(min=info.tiny)).exponent - 1
    return torch.ldexp(torch.full_like(values, info.eps), exponent)


def examples(likelihood: Likelihood, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Parameters and a target, each float32 [N]: those of `draw`, and extreme ones if it is not overridden."""
    drawn = likelihood.draw((128 if likelihood.grouped else 1024,), generator)
    if len(drawn) != len(likelihood.parameters) + 1:
        raise ValueError(
            f"{likelihood}.draw must return the {len(likelihood.parameters)} parameters and the target, "
            f"got {len(drawn)} tensors"
        )
    if type(likelihood).draw is not Likelihood.draw:
        return drawn
    targets = (0.0, 0.25, 1.0) if likelihood.target == "unit" else (0.0, -1.0, 0.25, 100.0)
    corners = torch.tensor(list(product(*[EXTREMES] * min(2, len(likelihood.parameters)), targets))).unbind(1)
    # Combinations of extremes for two parameters only; further ones are as they were drawn.
    others = [x[: len(corners[0])] for x in drawn[2:-1]]
    extreme = [*corners[:-1], *others, corners[-1]]
    return tuple(torch.cat([x, e]) for x, e in zip(drawn, extreme, strict=True))


def check(likelihood: Likelihood, *, device: torch.device | str | None = None, seed: int = 0) -> None:
    """Compare the values and slopes of a likelihood's term with those of its formula in float64.

    If the likelihood overrides `Likelihood.slopes`, they are compared too, because training without a GPU uses them. A
    difference may be at most 1 ulp + k * 2^-24 * S. k is the number in ``roundings``. S = |f| + sum_i |x_i df/dx_i| is
    the change by relative errors of the result and of the inputs. The inputs are those of `Likelihood.draw`. If it is
    not overridden, extreme inputs are added: zeros, 1e-4 to 1e4, NaN. The formula must be finite in float32 wherever it
    is finite in float64, because it runs without a GPU. The error that is raised names each difference and the inputs
    where it is largest.

    Args:
        likelihood: the likelihood. Without a ``term`` only its formula and slopes are checked.
        device: the device on which the term runs. The default is the GPU, or without a GPU the CPU, which needs
            Triton's interpreter (set TRITON_INTERPRET=1 before the first import of Triton).
        seed: the seed of the random inputs.

    Raises:
        ValueError: term and formula differ, or one of them is not as `Likelihood` describes it.
        RuntimeError: this machine cannot run the term; the message names what is missing.
    """
    # Imported here, because they import this package.
    import fastvae.functional as F
    from fastvae.backend import backend_for, use_backend

    if "__dataclass_params__" not in vars(type(likelihood)):
        raise ValueError(f"{type(likelihood).__name__} must be decorated with @dataclass(frozen=True)")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    inputs = examples(likelihood, torch.Generator().manual_seed(seed))
    expected = exact(likelihood, inputs)
    complaints = list(_unstable(likelihood, inputs, expected))
    if type(likelihood).slopes is not Likelihood.slopes:
        # In float64, where only another formula is beyond a bound for float32.
        own = likelihood.slopes(*[x.double() for x in inputs])
        complaints += _differences(likelihood, inputs, dict(enumerate(own, 1)), expected, "slopes()")
    if likelihood.term is not None:
        tensors = [(x if likelihood.grouped else x.unsqueeze(1)).to(device).requires_grad_() for x in inputs]
        if not likelihood.target_has_slope:
            tensors[-1].requires_grad_(False)
        needed = tensors if likelihood.target_has_slope else tensors[:-1]
        with use_backend("triton"):
            backend_for(tensors[0])  # raises where it cannot run
            try:
                value = F.negative_log_likelihood(tuple(tensors[:-1]), tensors[-1], likelihood, reduction="none")
                slopes = torch.autograd.grad(value.sum(), needed)
            except Exception as error:
                raise ValueError(f"the term of {likelihood} cannot run: {_origin(error)}") from error
        results = zip((value, *slopes), expected.results, strict=True)
        found = [x.detach().double().cpu().view(wide.shape) for x, wide in results]
        complaints += _differences(likelihood, inputs, dict(enumerate(found)), expected, "the term")
    if complaints:
        raise ValueError("\n".join([f"{likelihood} is not what it should be:", *complaints]))


def _origin(error: BaseException) -> BaseException:
    """What an error is of in the end: Triton's own ones only show the line of each kernel that led there."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _names(likelihood: Likelihood) -> list[str]:
    return ["value", *[f"slope of {name}" for name in (*likelihood.parameters, "target")]]


def _at(likelihood: Likelihood, inputs: Sequence[Tensor], results: Tensor, index: int) -> str:
    """The inputs of one of the results."""
    element = index // (results.numel() // len(results))
    each = zip((*likelihood.parameters, "target"), inputs, strict=True)
    return ", ".join(f"{name} = {_text(x[element])}" for name, x in each)


def _text(x: Tensor) -> str:
    return f"{x:.9g}" if x.ndim == 0 else f"[{', '.join(f'{number:.9g}' for number in x.flatten().tolist())}]"


def _unstable(likelihood: Likelihood, inputs: Sequence[Tensor], expected: Exact) -> list[str]:
    value = likelihood.formula(*inputs)
    wide = expected.results[0]
    wrong = wide.isfinite() & (wide.abs() < torch.finfo(torch.float32).max) & ~value.isfinite()
    if not wrong.any():
        return []
    index = int(wrong.flatten().nonzero()[0])
    return [
        f"- the formula is {value.flatten()[index]:.6g} in float32 at {_at(likelihood, inputs, wide, index)}, and "
        f"{wide.flatten()[index]:.6g} in float64: write it in a form that is stable"
    ]


def _differences(
    likelihood: Likelihood, inputs: Sequence[Tensor], found: Mapping[int, Tensor], expected: Exact, whose: str
) -> list[str]:
    complaints = []
    for k, result in found.items():
        wide = expected.results[k]
        rounded = wide.float().double()  # some are infinite in float32
        roundings = likelihood.roundings[k]
        allowed = ulp(wide) + roundings * 2.0**-24 * expected.scale(k, roundings)
        same = (result == rounded) | (result.isnan() & rounded.isnan())
        ratio = torch.where(same, 0.0, (result - wide).abs() / allowed).nan_to_num(nan=float("inf"))
        if ratio.max() > 1:
            index = int(ratio.argmax())
            complaints.append(
                f"- the {_names(likelihood)[k]}: at {_at(likelihood, inputs, wide, index)} {whose} has "
                f"{result.flatten()[index]:.9g}, the formula {wide.flatten()[index]:.9g}, {ratio.max():.3g} times the "
                f"bound for roundings[{k}] = {likelihood.roundings[k]}"
            )
    return complaints
