"""The diagonal Gaussian posterior q(z|x) = N(mu, diag(exp(logvar))): sampling and its divergence from N(0, I), in
plain PyTorch.

Kingma and Welling, "Auto-Encoding Variational Bayes", 2013, section 2.4 (reparameterisation) and appendix B (the
divergence).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvae.reference.noise import addressed_noise
from fastvae.reference.precision import in_float32, reduce_event


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


def gaussian_sample(
    mu: Tensor,
    logvar: Tensor,
    *,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
    batch_offset: int | None = None,
) -> Tensor:
    """z = mu + exp(logvar / 2) * eps. If eps is None, it is drawn from N(0, I), with a batch_offset by
    `addressed_noise`.
    """
    wide_mu, wide_logvar = in_float32(mu), in_float32(logvar)
    if batch_offset is not None:
        eps = addressed_noise(wide_mu, generator, batch_offset)
    elif eps is None:
        # randn_like takes no generator, and a plain randn would not keep mu's memory format.
        eps = torch.empty_like(wide_mu).normal_(generator=generator) if generator else torch.randn_like(wide_mu)
    return (wide_mu + torch.exp(0.5 * wide_logvar) * eps).to(mu.dtype)


def gaussian_kl(mu: Tensor, logvar: Tensor, *, reduction: str = "batchmean", free_bits: float = 0.0) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)) = (mu^2 + exp(logvar) - 1 - logvar) / 2 per element, in nats.

    "per_dimension": the batch mean of each dimension. A dimension counts at least free_bits, and has no gradient below
    that (Kingma et al., "Improved Variational Inference with Inverse Autoregressive Flow", 2016, appendix C).
    """
    wide_mu, wide_logvar = in_float32(mu), in_float32(logvar)
    # expm1 keeps what exp(logvar) - 1 would lose for small logvar.
    terms = 0.5 * (wide_mu.square() + (torch.expm1(wide_logvar) - wide_logvar))
    if reduction != "per_dimension" and not free_bits:
        return reduce_event(terms, reduction)
    dimensions = terms.mean(0)
    if free_bits:
        dimensions = torch.where(dimensions <= free_bits, free_bits, dimensions)
    return dimensions if reduction == "per_dimension" else dimensions.sum()


def gaussian_sample_kl(
    mu: Tensor, logvar: Tensor, *, reduction: str = "none", free_bits: float = 0.0, **noise: Any
) -> tuple[Tensor, Tensor]:
    """gaussian_sample and gaussian_kl of the same posterior. noise: eps, generator and batch_offset."""
    return gaussian_sample(mu, logvar, **noise), gaussian_kl(mu, logvar, reduction=reduction, free_bits=free_bits)


def gaussian_sample_kl_packed(moments: Tensor, *, dim: int = 1, **options: Any) -> tuple[Tensor, Tensor]:
    """gaussian_sample_kl of moments = [mu | logvar], the two halves along dim."""
    mu, logvar = moments.chunk(2, dim)
    return gaussian_sample_kl(mu, logvar, **options)
