"""What the functions of a Gaussian posterior are given beside its moments, how the second tensor is read, the prior,
and how many samples: the checks, and the call of either path.
"""

from __future__ import annotations

import math
from math import prod
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from torch import Tensor

from fastvae import reference
from fastvae.functional.checks import (
    check_device,
    check_divergence,
    check_floating,
    check_integer,
    check_noise,
    check_number,
    takes_triton,
)
from fastvae.reference.gaussian import General

if TYPE_CHECKING:
    Scale = Literal["logvar", "log_std", "std", "softplus"]
    LogProb = bool | Literal["detached"]
    Prior = Tensor | tuple[Tensor, Tensor]

SCALES = ("logvar", "log_std", "std", "softplus")
_LARGEST = torch.finfo(torch.float32).max


class Sampling(TypedDict, total=False):
    """The options of a sample, for type checkers."""

    eps: Tensor | None
    generator: torch.Generator | None
    batch_offset: int | None
    samples: int | None
    scale: Scale
    scale_eps: float
    scale_clamp: tuple[float, float] | None


class SamplingKL(Sampling, total=False):
    """And of its divergence."""

    prior: Prior | None
    reduction: str
    free_bits: float


class SamplingKLPacked(SamplingKL, total=False):
    dim: int


def check_scale(
    scale: str, scale_eps: float, scale_clamp: tuple[float, float] | None
) -> tuple[str, float, tuple[float, float] | None]:
    """The numbers as Python numbers."""
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    scale_eps = check_number("scale_eps", scale_eps)
    if not 0.0 <= scale_eps <= _LARGEST:
        raise ValueError(f"scale_eps must be finite in float32 and not negative, got {scale_eps}")
    if scale_clamp is None:
        return scale, scale_eps, None
    if not isinstance(scale_clamp, (tuple, list)) or len(scale_clamp) != 2:
        raise ValueError(f"scale_clamp must be (low, high), got {scale_clamp!r}")
    low, high = (check_number("scale_clamp", bound, "two numbers") for bound in scale_clamp)
    if not low <= high or math.isinf(low) or math.isinf(high):
        raise ValueError(f"scale_clamp must be (low, high), finite and low at most high, got {scale_clamp!r}")
    return scale, scale_eps, (low, high)


def check_samples(samples: int | None, batch_offset: int | None) -> int | None:
    """Returns samples as a Python integer."""
    if samples is None:
        return None
    samples = check_integer("samples", samples)
    if samples < 1:
        raise ValueError(f"samples must be at least 1, or None for a z without a dimension of samples, got {samples}")
    if batch_offset is not None:
        raise ValueError(
            "samples and batch_offset were both given: the noise of a second sample follows that of the whole batch, "
            "whose size is not known to a part of it"
        )
    return samples


def check_log_prob(log_prob: bool | str) -> None:
    if log_prob not in (False, True, "detached"):
        raise ValueError(f'log_prob must be False, True or "detached", got {log_prob!r}')


def check_prior(prior: Prior, half: torch.Size, name: str, like: Tensor, dim: int) -> tuple[Tensor, Tensor | None]:
    """(mu, second), or (packed, None), with as many dimensions as `like`, whose halves have that shape."""
    if isinstance(prior, Tensor):
        packed = list(half)
        packed[dim] *= 2
        return _check_prior_tensor("prior", prior, packed, name, like), None
    if not isinstance(prior, (tuple, list)) or len(prior) != 2:
        raise TypeError(
            "prior must be None, two tensors (mu, second), or one that holds both, got "
            + (f"{len(prior)} of them" if isinstance(prior, (tuple, list)) else type(prior).__name__)
        )
    mu = _check_prior_tensor("prior[0]", prior[0], list(half), name, like)
    return mu, _check_prior_tensor("prior[1]", prior[1], list(half), name, like)


def _check_prior_tensor(which: str, tensor: Tensor, shape: list[int], name: str, like: Tensor) -> Tensor:
    check_floating(which, tensor)
    check_device(which, tensor, name, like)
    if list(tensor.shape) not in (shape, [1, *shape[1:]], shape[1:]):
        raise ValueError(
            f"{which} must have shape {shape}, or {[1, *shape[1:]]} or {shape[1:]} for one prior of all samples, "
            f"got {list(tensor.shape)}"
        )
    return tensor if tensor.ndim == len(shape) else tensor.unsqueeze(0)


def shape_of_z(half: torch.Size, samples: int | None) -> torch.Size:
    """The shape of z, of which its elements are counted."""
    if samples is None:
        return half
    if samples * prod(half) >= 2**63:
        raise ValueError(f"samples must leave the elements of z below 2^63, got {samples} of {prod(half)} elements")
    return torch.Size((samples, *half))


def general(
    mu: Tensor,
    second: Tensor | None,
    draws: bool,
    diverges: bool,
    *,
    dim: int = 1,
    half: torch.Size | None = None,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
    batch_offset: int | None = None,
    samples: int | None = None,
    log_prob: bool | str = False,
    prior: Prior | None = None,
    reduction: str = "none",
    free_bits: float = 0.0,
    scale: str = "logvar",
    scale_eps: float = 0.0,
    scale_clamp: tuple[float, float] | None = None,
    prior_scale: str | None = None,
) -> Any:
    """What is asked for beyond samples and divergences from N(0, I) of one posterior read as logvar. With second None,
    mu holds both, and `half` is the shape of each. prior_scale: how the prior's second tensor is read, if not as the
    posterior's.
    """
    name, half = ("mu", mu.shape) if half is None else ("moments", half)
    samples = check_samples(samples, batch_offset)
    batch_offset = check_noise(shape_of_z(half, samples), name, mu, eps, generator, batch_offset)
    free_bits = check_divergence(reduction, free_bits)
    scale, scale_eps, scale_clamp = check_scale(scale, scale_eps, scale_clamp)
    check_log_prob(log_prob)
    priors: tuple[Tensor | None, Tensor | None] = (None, None)
    if prior is not None:
        priors = check_prior(prior, half, name, mu, dim)
    if takes_triton(mu, eps, *priors):
        from fastvae.autograd import general as fused

        low, high = scale_clamp or (-math.inf, math.inf)
        posterior = General(
            draws,
            diverges,
            dim,
            reduction,
            free_bits,
            scale,
            scale_eps,
            low,
            high,
            prior_scale or scale,
            samples or 0,
            bool(log_prob),
        )
        return fused.general(posterior, mu, second, *priors, eps, generator, batch_offset, log_prob == "detached")
    reading: dict[str, Any] = {"scale": scale, "scale_eps": scale_eps, "scale_clamp": scale_clamp}
    noise: dict[str, Any] = {"eps": eps, "generator": generator, "batch_offset": batch_offset, "samples": samples}
    prior_mu, prior_second = priors
    divergence: dict[str, Any] = {
        "prior": prior_mu if prior_mu is None or prior_second is None else (prior_mu, prior_second),
        "dim": dim, "reduction": reduction, "free_bits": free_bits,
    }  # fmt: skip
    first, other = mu.chunk(2, dim) if second is None else (mu, second)
    if not diverges:
        return reference.gaussian.gaussian_sample(first, other, **noise, log_prob=log_prob, **reading)
    if not draws:
        return reference.gaussian.gaussian_kl(first, other, prior_scale=prior_scale, **divergence, **reading)
    return reference.gaussian.gaussian_sample_kl(first, other, **noise, log_prob=log_prob, **divergence, **reading)
