"""What float64 says of a call of any operation in the list, the condition scale of each number, and its roundings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastvae
import fastvae.functional as F
from bounds import assert_within
from fastvae.likelihoods import Likelihood, checking
from fastvae.operations import Operation
from fastvae.reference import gaussian
from fastvae.reference.precision import reduce_event


class Exact(NamedTuple):
    value: Tensor
    scale: Tensor
    roundings: float | Tensor


def in_float64(value: Any, unit: bool = False) -> Any:
    """unit: bytes are fractions of 255."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    return value.double() / 255 if unit and value.dtype is torch.uint8 else value.double()


def levels(n: int) -> int:
    """Roundings of a sum of n terms: one per level of a tree, and three for how its parts are put together."""
    return math.ceil(math.log2(max(n, 1))) + 3


class Call(NamedTuple):
    """A call in float64: its tensors, upstream gradients and options by name, and what comes out."""

    given: dict[str, Tensor]
    grads: dict[str, Tensor]
    options: dict[str, Any]
    values: dict[str, Tensor]


def in_double(
    operation: Operation, tensors: tuple[Tensor, ...], upstream: Mapping[str, Tensor], **options: Any
) -> Call:
    options = {name: in_float64(value) for name, value in {**operation.options, **options}.items()}
    unit = operation.target_kind == "unit"
    given = {name: in_float64(tensor, unit) for name, tensor in zip(operation.arguments, tensors, strict=True)}
    if operation.target_kind == "class" and given["target"].ndim < tensors[0].ndim:
        given["target"] = given["target"].long()
    for name, tensor in given.items():
        tensor.requires_grad_(name in operation.gradients)
    with fastvae.use_backend("reference"):
        outputs = dict(zip(operation.outputs, operation(F, *given.values(), **options), strict=True))
    values = {name: output.detach() for name, output in outputs.items()}
    if upstream:
        wanted = [given[name] for name in operation.gradients]
        grads = {name: in_float64(grad) for name, grad in upstream.items()}
        gradients = torch.autograd.grad(
            [outputs[name] for name in grads], wanted, list(grads.values()), materialize_grads=True
        )
        values |= {f"{name}_grad": grad for name, grad in zip(operation.gradients, gradients, strict=True)}
    else:  # the gradients of the loss are among the outputs
        grads = {"loss": torch.as_tensor(options.get("grad_scale") or 1.0, dtype=torch.float64)}
    return Call({name: tensor.detach() for name, tensor in given.items()}, grads, options, values)


def oracle(
    operation: Operation, tensors: tuple[Tensor, ...], upstream: Mapping[str, Tensor], **options: Any
) -> dict[str, Exact]:
    """Of each output, and of the gradient in each argument of `operation.gradients` ("mu_grad")."""
    given, grads, options, values = in_double(operation, tensors, upstream, **options)
    of_family = _of_likelihood if operation.likelihood else _of_posterior
    scales = of_family(operation, given, grads, options)
    return {name: Exact(value, *scales[name]) for name, value in values.items()}


def check_results(actual: Mapping[str, Tensor], expected: Mapping[str, Exact]) -> None:
    for name, value in actual.items():
        assert_within(value, *expected[name], name)


# ---------------------------------------------------------------------------------------------------------- likelihoods


def _of_likelihood(
    operation: Operation, given: dict[str, Tensor], grads: dict[str, Tensor], options: dict[str, Any]
) -> dict[str, tuple[Tensor, float]]:
    likelihood, target, k = operation.likelihood, given["target"], operation.roundings
    names = [*likelihood.parameters, "target"]
    tensors = [given[name] for name in names]
    if operation.smaller:
        tensors = [tensor.expand(target.shape) for tensor in tensors]
    condition = _condition(likelihood, tensors)
    value, *slopes = (condition.scale(i, roundings) for i, roundings in enumerate(likelihood.roundings))
    batch = max(1, target.shape[0])
    absolute = {name: grad.abs() for name, grad in grads.items()}
    scales: dict[str, tuple[Tensor, float]] = {}
    if "kl" in operation.arguments:
        weight, beta = (
            abs(float(options.get(n, d)))
            for n, d in (("reconstruction_weight", likelihood.reconstruction_weight), ("beta", 1.0))
        )
        reconstruction, kl = weight * value.sum() / batch, given["kl"].abs().sum() / batch
        elements, zero = value.numel(), torch.zeros(())
        scales["loss"] = reconstruction + beta * kl, k["loss"] + levels(max(elements, batch))
        scales["reconstruction"] = reconstruction, k["reconstruction"] + levels(elements)
        scales["kl"] = kl, k["kl"] + levels(batch)
        of_loss, of_terms, of_kl = (absolute.get(name, zero) for name in ("loss", "reconstruction", "kl"))
        term_weight = weight * (of_loss + of_terms) / batch
        scales["kl_grad"] = ((beta * of_loss + of_kl) / batch).expand(given["kl"].shape), k["kl_grad"]
    else:
        reduction = options.get("reduction", "batchmean")
        summed = value.numel() // (batch if reduction == "none" else 1)
        scales["loss"] = reduce_event(value, reduction), k["loss"] + levels(summed)
        term_weight = _weight_of_terms(value, reduction, absolute["loss"])
    for name, slope in zip(names, slopes, strict=False):  # the target may have none
        scale = term_weight * slope
        summed = scale.numel() // max(1, given[name].numel())
        # The gradient of a smaller parameter is a sum.
        roundings = k[f"{name}_grad"] + (levels(summed) if summed > 1 else 0)
        scales[f"{name}_grad"] = scale.sum_to_size(given[name].shape), roundings
    return scales


_conditions: dict[Any, checking.Exact] = {}


def _condition(likelihood: Likelihood, tensors: list[Tensor]) -> checking.Exact:
    """`exact` of numbers that the operations and reductions of a test share, worked out once: second derivatives."""
    key = likelihood, *[(tensor.shape, tensor.numpy().tobytes()) for tensor in tensors]
    if key not in _conditions:
        if len(_conditions) == 16:
            del _conditions[next(iter(_conditions))]
        _conditions[key] = checking.exact(likelihood, tensors)
    return _conditions[key]


def _weight_of_terms(like: Tensor, reduction: str, upstream: Tensor) -> Tensor:
    """What one term weighs in the sum of the reduction's results times their upstream gradients."""
    terms = torch.ones_like(like).requires_grad_()
    reduced = terms.mean(0) if reduction == "per_dimension" else reduce_event(terms, reduction)
    return torch.autograd.grad(reduced, terms, upstream)[0]


# ------------------------------------------------------------------------------------------------------------ posterior


class _Second(NamedTuple):
    """What a second tensor says: the log-variance and its slope, the standard deviation's slope; and the scales of
    their relative errors, where an exponential counts 1 + |argument| times.
    """

    logvar: Tensor
    slope: Tensor
    std: Tensor
    std_slope: Tensor
    error: Tensor | float  # absolute, of the log-variance: 0 where it is the tensor itself
    size: Tensor | float  # relative, of the slopes


def _second(a: Tensor, options: dict[str, Any]) -> _Second:
    reading = {name: options[name] for name in ("scale", "scale_eps", "scale_clamp") if name in options}
    a = a.detach().requires_grad_()
    logvar, std = gaussian.log_variance(a, **reading), gaussian.standard_deviation(a, **reading)
    slope, std_slope = (torch.autograd.grad(it.sum(), a, retain_graph=True)[0] for it in (logvar, std))
    logvar, std, a = logvar.detach(), std.detach(), a.detach()
    # Beyond 1e3 an exponential is 0 or infinite in every dtype, and 0 times an infinite condition would be NaN.
    size, error = logvar.abs().clamp(max=1e3), 0.0
    if reading and (reading.get("scale", "logvar") != "logvar" or reading.get("scale_eps")):
        eps = reading.get("scale_eps", 0.0)
        argument = a.abs().clamp(max=1e3) + (abs(math.log(eps)) if eps else 0.0)
        error = size + argument * (1 + slope.abs()) + 1
        size = size + argument
    else:
        argument = 0.0
    return _Second(logvar, slope, std * (1 + (size + error) / 2), std_slope.abs() * (1 + size / 2), error, argument)


def _of_posterior(
    operation: Operation, given: dict[str, Tensor], grads: dict[str, Tensor], options: dict[str, Any]
) -> dict[str, tuple[Tensor, float | Tensor]]:
    """The scale is the sum of the absolute terms of what is computed; an exponential counts 1 + |argument| times."""
    dim, k = options.get("dim", 1), operation.roundings
    mu, a = given["moments"].chunk(2, dim) if "moments" in given else (given["mu"], given["logvar"])
    second = _second(a, options)
    prior_mu, prior = torch.zeros_like(mu), None
    if "prior" in given or "prior_mu" in given:
        packed = given.get("prior", (given.get("prior_mu"), given.get("prior_logvar")))
        prior_mu, prior_logvar = gaussian.prior_halves(packed, mu.ndim, dim)
        prior_shapes = prior_mu.shape, prior_logvar.shape
        prior = _second(prior_logvar, options)
    several = options.get("samples") is not None
    eps = given.get("eps", options.get("eps", torch.zeros(mu.shape, dtype=torch.float64)))

    x, distance, root, narrowness = second.logvar, mu, 1.0, 1.0
    error = second.error
    if prior is not None:
        x, error = second.logvar - prior.logvar, second.error + prior.error
        narrowness = 1 + prior.logvar.abs().clamp(max=1e3) + prior.error
        root = torch.exp((-prior.logvar / 4).clamp(max=700))
        distance = (mu - prior_mu) * root * root
    squared, by_distance = distance.square() * narrowness, (distance * root * root).abs() * narrowness
    size = x.abs().clamp(max=1e3) + error
    exponential = torch.exp(x) * (1 + size)
    # The kernels' series below 1/2 does not cancel; the differences beyond it do.
    series, small = torch.expm1(x) - x, x.abs() < 0.5
    # An error of x moves h(x) by its slope.
    of_series = series + error * torch.expm1(x).abs() + 2.0**-20 * torch.as_tensor(error).square()
    divergence = 0.5 * (squared + torch.where(small, of_series, exponential + 1 + x.abs() + error))
    slope = torch.where(small, x.abs() + series + error, exponential + 1)

    reduction, free_bits = options.get("reduction", "batchmean"), options.get("free_bits", 0.0)
    scales: dict[str, tuple[Tensor, float | Tensor]] = {"z": (mu.abs() + second.std * eps.abs(), k["z"])}
    if free_bits or reduction == "per_dimension":
        of_sum = 0 if reduction == "per_dimension" else levels(mu[:1].numel())
        means = divergence.mean(0)
        scales["kl"] = means.sum() if of_sum else means, k["kl"] + _roundings_of_means(operation, given) + of_sum
    else:
        summed = mu.numel() // (max(1, len(mu)) if reduction == "none" else 1)
        scales["kl"] = reduce_event(divergence, reduction), k["kl"] + levels(summed)
    if "log_q" in k:
        terms = 0.5 * (eps.square() + second.logvar.abs() + second.error + math.log(2 * math.pi))
        scales["log_q"] = terms.flatten(1 - mu.ndim).sum(-1), k["log_q"] + levels(mu[:1].numel())

    def of_samples(values: Tensor) -> Tensor:
        return values.sum(0) if several else values

    mu_scale, logvar_scale, std_scale = (torch.zeros_like(mu) for _ in range(3))
    prior_mu_scale, prior_logvar_scale = torch.zeros_like(mu), torch.zeros_like(mu)
    if "z" in grads:
        mu_scale += of_samples(grads["z"].abs())
        std_scale += second.std_slope * of_samples((grads["z"] * eps).abs())
    if "log_q" in grads:
        upstream = of_samples(grads["log_q"].abs())
        logvar_scale += 0.5 * upstream.view(-1, *[1] * (mu.ndim - 1))
    if "kl" in grads:
        upstream = grads["kl"].abs()
        if free_bits:
            means = (0.5 * (distance.square() + torch.expm1(x) - x)).mean(0)
            upstream = torch.where(means <= free_bits, 0.0, upstream)
        weight = _weight_of_terms(mu, "per_dimension" if free_bits else reduction, upstream)
        mu_scale += (weight * by_distance).abs()
        logvar_scale += 0.5 * weight * slope
        if prior is not None:
            prior_mu_scale += (weight * by_distance).abs()
            prior_logvar_scale += 0.5 * weight * (slope + squared) * prior.slope.abs() * (1 + prior.size)
    second_scale = std_scale + logvar_scale * second.slope.abs() * (1 + second.size)
    roundings = [torch.full_like(mu, k[name]) for name in ("mu_grad", "logvar_grad")]
    scales["mu_grad"], scales["logvar_grad"] = (mu_scale, k["mu_grad"]), (second_scale, k["logvar_grad"])
    scales["moments_grad"] = torch.cat((mu_scale, second_scale), dim), torch.cat(roundings, dim)
    if prior is not None:
        for name, scale, shape in zip(
            ("prior_mu_grad", "prior_logvar_grad"), (prior_mu_scale, prior_logvar_scale), prior_shapes, strict=True
        ):
            # That of a prior of all samples is a sum.
            summed = levels(len(mu)) if shape != mu.shape else 0
            scales[name] = scale.sum_to_size(shape), torch.full(shape, float(k[name] + summed))
        along = dim - (mu.ndim - prior_mu.ndim) if dim > 0 else dim
        each = zip(scales["prior_mu_grad"], scales["prior_logvar_grad"], strict=True)
        if prior_mu.shape == prior_logvar.shape:
            scales["prior_grad"] = tuple(torch.cat(halves, along) for halves in each)
    return scales


def _roundings_of_means(operation: Operation, given: dict[str, Tensor]) -> int:
    """One per tile of rows that a program goes through, one per level of the sum of a tile, and those of the sum over
    programs.
    """
    from fastvae.kernels.posterior import cut_columns

    moments = given.get("moments", given.get("mu"))
    rows = max(1, moments.shape[0])
    columns = max(1, moments[:1].numel() // (2 if "moments" in given else 1))
    found = []
    for itemsize in (2, 4):
        tiling, blocks = cut_columns(rows, columns, itemsize)
        steps = -(-rows // (tiling.tile_rows * blocks)) + math.ceil(math.log2(tiling.tile_rows))
        finishing = -(-blocks * tiling.tile_columns // 4096) + math.ceil(math.log2(4096 // tiling.tile_columns))
        found.append(steps + (finishing if blocks > 1 else 0) + 2)
    return max(found)
