"""The diagonal Gaussian posterior q(z|x) = N(mu, diag(sigma^2)): sampling, its divergence from a diagonal Gaussian
prior, and its log-density, in plain PyTorch.

Kingma and Welling, "Auto-Encoding Variational Bayes", 2013, section 2.4 (reparameterisation) and appendix B (the
divergence).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvae.reference.noise import addressed_noise
from fastvae.reference.precision import clamped, in_float32, reduce_event

Halves = tuple[Tensor, Tensor]


class Posterior(NamedTuple):
    """The options of a call. They are checked once, and all layers pass them on as one value."""

    draws: bool  # a sample z
    diverges: bool  # the divergence kl
    dim: int = 1  # along which packed moments are split
    reduction: str = "none"  # of kl
    free_bits: float = 0.0

    @property
    def per_dimension(self) -> bool:
        return self.reduction == "per_dimension"


class General(NamedTuple):
    """What a call asks of a posterior beyond that: another prior, another reading of the second tensor, several
    samples, or the log-density of what is drawn. It is checked once, and goes through all layers as one value.
    """

    draws: bool
    diverges: bool
    dim: int
    reduction: str
    free_bits: float
    scale: str  # how the second tensor is read, with the three that follow: `log_variance`
    scale_eps: float
    low: float  # -infinity: not clamped
    high: float
    prior_scale: str  # how that of the prior is read
    samples: int  # 0: z is of the shape of mu, without a dimension of samples
    log_prob: bool

    @property
    def per_dimension(self) -> bool:
        return self.reduction == "per_dimension"


def log_variance(
    second: Tensor,
    scale: str = "logvar",
    scale_eps: float = 0.0,
    scale_clamp: tuple[float, float] | None = None,
) -> Tensor:
    """log sigma^2 of a Gaussian whose second tensor is a, first clamped to scale_clamp:

        "logvar": variance = exp(a) + scale_eps        "log_std":  std = exp(a) + scale_eps
        "std":    std = a + scale_eps                  "softplus": std = log(1 + exp(a)) + scale_eps

    The logarithm of a sum of exponentials is made as one, so that no part of it overflows or vanishes.
    """
    a = _clamped(second, scale_clamp)
    if scale in ("logvar", "log_std"):
        logarithm = torch.logaddexp(a, a.new_full((), math.log(scale_eps))) if scale_eps else a
    elif scale == "std" or scale_eps:
        logarithm = torch.log((_softplus(a) if scale == "softplus" else a) + scale_eps)
    else:
        # log log(1 + e^a) = a - e^a / 2 + ..., where log(1 + e^a) vanishes. Each branch has a gradient that is a number
        # also where the other one is taken.
        is_small = a < -20
        large, small = torch.where(is_small, 0.0, a), torch.where(is_small, a, -20.0)
        logarithm = torch.where(is_small, small - 0.5 * torch.exp(small), torch.log(_softplus(large)))
    return logarithm if scale == "logvar" else 2 * logarithm


def standard_deviation(
    second: Tensor,
    scale: str = "logvar",
    scale_eps: float = 0.0,
    scale_clamp: tuple[float, float] | None = None,
) -> Tensor:
    """sigma, of the same arguments."""
    if scale in ("logvar", "log_std"):
        return torch.exp(0.5 * log_variance(second, scale, scale_eps, scale_clamp))
    a = _clamped(second, scale_clamp)
    std = _softplus(a) if scale == "softplus" else a
    return std + scale_eps if scale_eps else std


def _clamped(second: Tensor, scale_clamp: tuple[float, float] | None) -> Tensor:
    second = in_float32(second)
    return second if scale_clamp is None else clamped(second, *scale_clamp)


def _softplus(a: Tensor) -> Tensor:
    """log(1 + e^a), also beyond 20, where torch's own takes a."""
    return torch.logaddexp(a, a.new_zeros(()))


def squared_distance(value: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """(value - mu)^2 / exp(logvar), infinite only where that is beyond the dtype's largest number.

    1 / std is applied as two factors that stay finite: where it overflows, a difference of 0 would make NaN. Before the
    exponential, because after it the gradient would be 0 times infinity.
    """
    largest = math.floor(math.log(torch.finfo(logvar.dtype).max))
    root = torch.exp((-0.25 * logvar).clamp(max=largest))
    return ((value - mu) * root * root).square()


def prior_halves(prior: Tensor | Halves, ndim: int, dim: int) -> Halves:
    """(mu, second) of a prior for posteriors of so many dimensions, whose own moments are packed along dim."""
    if not isinstance(prior, Tensor):
        return prior
    mu, second = prior.chunk(2, dim - (ndim - prior.ndim))
    return mu, second


def gaussian_sample(
    mu: Tensor,
    logvar: Tensor,
    *,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
    batch_offset: int | None = None,
    samples: int | None = None,
    log_prob: bool | str = False,
    **scale: Any,
) -> Any:
    """z = mu + std * eps, with eps ~ N(0, I) unless given; with a batch_offset, `addressed_noise`. scale: those of
    `log_variance`, by which logvar is read. samples: so many of each posterior, [samples, B, ...].

    With log_prob also log q(z|x) = -sum_event (eps^2 + logvar + log 2 pi) / 2, [B] or [samples, B]; "detached":
    log N(z; mu, std^2) as a function of z alone, whose gradient is -(z - mu) / std^2.
    """
    wide_mu = in_float32(mu)
    std = standard_deviation(logvar, **scale)
    if batch_offset is not None:
        eps = addressed_noise(wide_mu, generator, batch_offset)
    elif eps is None:
        like = wide_mu
        if samples is not None:
            like = torch.empty_like(wide_mu)
            like = like.new_empty_strided((samples, *like.shape), (like.numel(), *like.stride()))
        # randn_like takes no generator, and a plain randn would not keep mu's memory format.
        eps = torch.empty_like(like).normal_(generator=generator) if generator else torch.randn_like(like)
    z = (wide_mu + std * eps).to(mu.dtype)
    if not log_prob:
        return z
    if log_prob == "detached":
        # What is added is 0, with the gradient of (z - mu) / std in z.
        eps = in_float32(eps) + (in_float32(z) - in_float32(z).detach()) / std.detach()
        logvar = logvar.detach()
    return z, log_densities(in_float32(eps), log_variance(logvar, **scale))


def log_densities(eps: Tensor, logvar: Tensor) -> Tensor:
    """-sum_event (eps^2 + logvar + log 2 pi) / 2, of eps [B, ...] or [samples, B, ...] and logvar [B, ...]."""
    terms = eps.square() + logvar + math.log(2 * math.pi)
    return -0.5 * terms.flatten(1 - logvar.ndim).sum(-1)


def gaussian_kl(
    mu: Tensor,
    logvar: Tensor,
    *,
    prior: Tensor | Halves | None = None,
    dim: int = 1,
    reduction: str = "batchmean",
    free_bits: float = 0.0,
    prior_scale: str | None = None,
    **scale: Any,
) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)) = (mu^2 + exp(logvar) - 1 - logvar) / 2 per element, in nats.

    To a prior (mu', logvar'), or packed along dim, it is (h(logvar - logvar') + (mu - mu')^2 / exp(logvar')) / 2 with
    h(x) = exp(x) - 1 - x. scale: those of `log_variance`, by which both second tensors are read, unless the prior's has
    a prior_scale of its own.

    "per_dimension": the batch mean of each dimension. With free_bits a dimension counts at least so much, and has no
    gradient there (Kingma et al., "Improved Variational Inference with Inverse Autoregressive Flow", 2016, appendix C).
    """
    wide_prior = None
    if prior is not None:
        prior_mu, prior_second = prior_halves(prior, mu.ndim, dim)
        reading = scale if prior_scale is None else {**scale, "scale": prior_scale}
        wide_prior = in_float32(prior_mu), log_variance(prior_second, **reading)
    return divergence(in_float32(mu), log_variance(logvar, **scale), wide_prior, reduction, free_bits)


def divergence(mu: Tensor, logvar: Tensor, prior: Halves | None, reduction: str, free_bits: float) -> Tensor:
    """gaussian_kl of log-variances."""
    terms = kl_terms(mu, logvar, *(prior or (None, None)))
    if reduction != "per_dimension" and not free_bits:
        return reduce_event(terms, reduction)
    dimensions = terms.mean(0)
    if free_bits:
        dimensions = torch.where(dimensions <= free_bits, free_bits, dimensions)
    return dimensions if reduction == "per_dimension" else dimensions.sum()


def kl_terms(mu: Tensor, logvar: Tensor, prior_mu: Tensor | None, prior_logvar: Tensor | None) -> Tensor:
    """The divergence of each element."""
    if prior_mu is None or prior_logvar is None:
        distance, difference = mu.square(), logvar
    else:
        distance, difference = squared_distance(mu, prior_mu, prior_logvar), logvar - prior_logvar
    # expm1 keeps what exp(difference) - 1 would lose for a small difference.
    return 0.5 * (distance + (torch.expm1(difference) - difference))


def gaussian_sample_kl(
    mu: Tensor,
    logvar: Tensor,
    *,
    prior: Tensor | Halves | None = None,
    dim: int = 1,
    reduction: str = "none",
    free_bits: float = 0.0,
    scale: str = "logvar",
    scale_eps: float = 0.0,
    scale_clamp: tuple[float, float] | None = None,
    log_prob: bool | str = False,
    **noise: Any,
) -> tuple[Tensor, ...]:
    """gaussian_sample and gaussian_kl of the same posterior; noise: eps, generator, batch_offset and samples."""
    reading: dict[str, Any] = {"scale": scale, "scale_eps": scale_eps, "scale_clamp": scale_clamp}
    sample = gaussian_sample(mu, logvar, log_prob=log_prob, **reading, **noise)
    kl = gaussian_kl(mu, logvar, prior=prior, dim=dim, reduction=reduction, free_bits=free_bits, **reading)
    return (sample[0], kl, sample[1]) if log_prob else (sample, kl)


def gaussian_sample_kl_packed(moments: Tensor, *, dim: int = 1, **options: Any) -> tuple[Tensor, ...]:
    """gaussian_sample_kl of moments = [mu | logvar], the two halves along dim."""
    mu, logvar = moments.chunk(2, dim)
    return gaussian_sample_kl(mu, logvar, dim=dim, **options)
