"""Check the results of a provider against float64 before it is timed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cases import DTYPES, EAGER, OPERATIONS, Case, Inputs
from fastvae.likelihoods import DiscretizedLogisticMixture

# Of a tensor, relative to its norm: rounding to its dtype, and this many units of float32 for the arithmetic. Measured
# over the smoke sizes: at most 1.0 of them for the kernels (on the interpreter) and 1.3 for torch, at most 0.54 units
# of bfloat16. Approximate instructions of a GPU come on top; a gradient with a wrong factor is off by thousands.
FLOAT32_UNITS = 16
# The bins of a mixture are narrow next to the mean, which is rounded, and more so by the colours before. Measured: 43
# units for torch, 63 for the kernels.
FLOAT32_UNITS_OF_BINS = 256
# Of a sum, relative. Measured: 1.6e-7 over up to 1.3e7 terms (CPU); a GPU sums up to 7e7.
SUM_ERROR = 1e-5
# How many standard deviations the mean and the variance of the noise may be off: two false alarms in 1e9.
DEVIATIONS = 6.0


def complaint(case: Case, inputs: Inputs, results: tuple[Tensor, ...]) -> str | None:
    """What is wrong with `results`, or None."""
    inputs = Inputs(tuple(t.detach().double() for t in inputs.tensors), tuple(t.double() for t in inputs.upstream))
    likelihood = OPERATIONS[case.operation].likelihood
    if OPERATIONS[case.operation].draws_noise:
        return _complaint_with_noise(case, inputs, results)
    tensors = tuple(
        tensor.requires_grad_(case.backward and name != "target")
        for name, tensor in zip(OPERATIONS[case.operation].arguments, inputs.tensors, strict=True)
    )
    expected = case.step(case.function(EAGER), Inputs(tensors, inputs.upstream))
    units = FLOAT32_UNITS_OF_BINS if isinstance(likelihood, DiscretizedLogisticMixture) else FLOAT32_UNITS
    if len(results) != len(expected):
        return f"{len(results)} results instead of {len(expected)}"
    for index, (result, reference) in enumerate(zip(results, expected, strict=True)):
        reason = _compare(result, reference.detach(), f"result {index}", units=units)
        if reason:
            return reason
    return None


def _complaint_with_noise(case: Case, inputs: Inputs, results: tuple[Tensor, ...]) -> str | None:
    """Every provider draws its own noise: z gives it away. It must be normal, and the gradients follow from it."""
    mu, logvar = inputs.tensors if len(inputs.tensors) == 2 else inputs.tensors[0].chunk(2, 1)
    z = results[0].detach().double()
    if z.shape != mu.shape or results[0].dtype != DTYPES[case.dtype]:
        return f"z is {results[0].dtype} {list(z.shape)}"
    noise = (z - mu) * torch.exp(-0.5 * logvar)
    count = noise.numel()
    mean, variance = noise.mean().item(), noise.square().mean().item()
    if not abs(mean) < DEVIATIONS / math.sqrt(count):
        return f"the noise has mean {mean:.3g}"
    if not abs(variance - 1.0) < DEVIATIONS * math.sqrt(2.0 / count) + torch.finfo(results[0].dtype).eps:
        return f"the noise has variance {variance:.4g}"

    has_divergence = case.operation != "gaussian_sample"
    if has_divergence:
        reason = _compare(results[1], EAGER.gaussian_kl(mu, logvar), "the divergence")
        if reason:
            return reason
    if not case.backward:
        return None
    z_grad = inputs.upstream[0]
    kl_grad = inputs.upstream[1] / len(mu) if has_divergence else torch.zeros((), device=mu.device).double()
    half_step = 0.5 * z_grad * (z - mu)
    mu_grad = z_grad + kl_grad * mu
    logvar_grad = half_step + 0.5 * kl_grad * torch.expm1(logvar)
    # Where z was rounded, the noise that it gives is off by that much.
    rounding = 0.5 * z_grad.abs() * z.abs()
    gradients = results[2 if has_divergence else 1 :]
    halves = gradients if len(gradients) == 2 else gradients[0].chunk(2, 1)
    for name, result, expected in (("mu", halves[0], mu_grad), ("logvar", halves[1], logvar_grad)):
        reason = _compare(result, expected, f"the gradient of {name}", rounding)
        if reason:
            return reason
    return None


def _compare(
    result: Tensor, reference: Tensor, name: str, rounding: Tensor | None = None, units: float = FLOAT32_UNITS
) -> str | None:
    if result.shape != reference.shape:
        return f"{name} has shape {list(result.shape)} instead of {list(reference.shape)}"
    error = (result.detach().double() - reference).norm().item()
    scale = reference.norm().item() + (rounding.norm().item() if rounding is not None else 0.0)
    arithmetic = units * torch.finfo(torch.float32).eps
    allowed = SUM_ERROR if result.ndim == 0 else torch.finfo(result.dtype).eps + arithmetic
    # `not <=` and not `>`: NaN fails.
    if not error <= allowed * scale:
        return f"{name} is off by {error / scale if scale else error:.2g} of its norm, {allowed:.2g} is allowed"
    return None
