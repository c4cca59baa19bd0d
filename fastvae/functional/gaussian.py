"""The diagonal Gaussian posterior q(z|x) = N(mu, diag(exp(logvar))): reparameterised samples, the divergence from
N(0, I) or from another diagonal Gaussian, and the log-density of the samples.

Shapes are [B, ...] of any rank from 2 up; dtypes float16, bfloat16, float32, and float64 on the reference path.
Arithmetic is float32 (float64 for float64); z has the dtype of mu, divergence and log-density are float32 (float64).

What the second tensor is, called logvar here, the options scale, scale_eps and scale_clamp say. With a = logvar, first
clamped to scale_clamp = (low, high) if that is given:

    scale="logvar":   variance = exp(a) + scale_eps    (the default, with scale_eps = 0)
    scale="log_std":  std = exp(a) + scale_eps
    scale="std":      std = a + scale_eps              (must be positive: the log-variance of another is NaN)
    scale="softplus": std = log(1 + exp(a)) + scale_eps

The gradient in a is 0 where a lies outside of [low, high]; at the bounds it passes. exp(logvar) in what follows is the
variance, whatever the scale.

Noise is torch's: it follows `torch.manual_seed`, `torch.random.fork_rng`, activation checkpointing and ``generator``,
and is new at each call and at each replay of a captured CUDA graph. The fused path regenerates it in backward instead
of storing it, and draws other numbers than the reference path does from the same seed; pass ``eps`` to fix the noise
of both.

Source: Kingma and Welling, "Auto-Encoding Variational Bayes", 2013, section 2.4 and appendix B.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from fastvae import reference
from fastvae.functional.checks import check_divergence, check_halves, check_noise, check_packed, takes_triton
from fastvae.functional.posterior import Sampling, SamplingKL, SamplingKLPacked, general
from fastvae.reference.gaussian import Posterior

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastvae.functional.posterior import LogProb, Prior, Scale


@overload
def gaussian_sample(
    mu: Tensor, logvar: Tensor, *, log_prob: Literal[False] = False, **options: Unpack[Sampling]
) -> Tensor: ...
@overload
def gaussian_sample(
    mu: Tensor, logvar: Tensor, *, log_prob: Literal[True, "detached"], **options: Unpack[Sampling]
) -> tuple[Tensor, Tensor]: ...
def gaussian_sample(
    mu: Tensor,
    logvar: Tensor,
    *,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
    batch_offset: int | None = None,
    samples: int | None = None,
    log_prob: LogProb = False,
    scale: Scale = "logvar",
    scale_eps: float = 0.0,
    scale_clamp: tuple[float, float] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Draw z = mu + exp(logvar / 2) * eps with eps ~ N(0, I), differentiable in mu and logvar.

    Args:
        mu, logvar: [B, ...], of one shape, dtype and device.
        eps: the noise, of z's shape; drawn if None. It must not require grad.
        generator: a torch.Generator of mu's device; the default generator if None.
        batch_offset: where mu is a part of a batch that several processes share, the number of samples before this
            part. Parts drawn from the same seed then have the noise that the whole batch would have had, in one call
            with a batch_offset of 0, on either backend. Not together with samples.
        samples: S draws from each posterior, in one launch: z is [S, B, ...]. mu and logvar are read once and nothing
            is expanded. samples=1 draws the noise of a call without it.
        log_prob: return (z, log_q) with log_q = log q(z|x), log 2 pi included, [B] or [S, B]:

                log_q = -sum_event (eps^2 + logvar + log 2 pi) / 2

            True: with the whole gradient. z follows its own density, so eps is a constant, mu gets no gradient from
            log_q, and d log_q / d logvar = -1/2.
            "detached": the same value as a function of z alone, log N(z; mu.detach(), exp(logvar.detach())), with
            d log_q / d z = -eps / exp(logvar / 2) = -(z - mu) / exp(logvar). That gradient arrives at z, hooks of z
            see it, and through z it reaches mu and logvar. It is what the estimators "stl" and "dreg" of
            `importance_weighted_bound` take.
        scale, scale_eps, scale_clamp: what logvar is, see above.

    Returns:
        z, of mu's shape, dtype and memory format, after S if there are samples; or (z, log_q).

    Raises:
        TypeError: not a floating-point tensor; mu and logvar of different dtypes.
        ValueError: shapes or devices that differ, fewer than 2 dimensions, a batch_offset that is negative or
            counts more than 2^63 elements, eps together with generator or batch_offset, samples below 1 or together
            with batch_offset, an unknown scale or log_prob, or numbers of the scale that are out of range.
    """
    check_halves(mu, logvar)
    if samples is not None or log_prob or scale != "logvar" or scale_eps or scale_clamp is not None:
        found: Tensor | tuple[Tensor, Tensor] = general(
            mu, logvar, True, False, eps=eps, generator=generator, batch_offset=batch_offset, samples=samples,
            log_prob=log_prob, scale=scale, scale_eps=scale_eps, scale_clamp=scale_clamp,
        )  # fmt: skip
        return found
    batch_offset = check_noise(mu.shape, "mu", mu, eps, generator, batch_offset)
    if takes_triton(mu, eps):
        from fastvae.autograd import gaussian as fused

        return fused.gaussian(Posterior(True, False), mu, logvar, eps, generator, batch_offset)[0]
    z: Tensor = reference.gaussian.gaussian_sample(mu, logvar, eps=eps, generator=generator, batch_offset=batch_offset)
    return z


def gaussian_kl(
    mu: Tensor,
    logvar: Tensor,
    *,
    prior: Prior | None = None,
    reduction: str = "batchmean",
    free_bits: float = 0.0,
    scale: Scale = "logvar",
    scale_eps: float = 0.0,
    scale_clamp: tuple[float, float] | None = None,
) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, I)) = sum_event (mu^2 + exp(logvar) - 1 - logvar) / 2, in nats; or the divergence
    from another diagonal Gaussian:

        KL = sum_event (h(logvar - logvar') + (mu - mu')^2 / exp(logvar')) / 2,    h(x) = exp(x) - 1 - x

    Args:
        mu, logvar: [B, ...], of one shape, dtype and device.
        prior: None is N(0, I). Otherwise two tensors (mu', logvar'), each of mu's shape, or of one prior for all
            samples: [1, ...], or an event without the batch; or one tensor that holds both, [mu' | logvar'] along
            dimension 1 of a batch, which is read where it lies. Of any floating-point dtype. Gradients go to it too,
            in its own shape and dtype; one for all samples gets their sum, added in a fixed order. logvar' is read as
            logvar is.
        reduction: "none" per sample, shape [B]; "batchmean" their mean; "sum" over everything; "mean" over every
            element; "per_dimension" the batch mean of each element of the event.
        free_bits: in nats; with reduction "batchmean" or "per_dimension" only. Each dimension's batch mean counts as
            at least so much, max(mean_B kl_d, free_bits), and has no gradient below: a dimension is not pushed onto
            the prior for the last of its information. 0: off.
        scale, scale_eps, scale_clamp: what logvar is, see above.

    Returns:
        The divergence, float32 (float64), shape [B], [], or that of an event.

    Raises:
        TypeError: not a floating-point tensor; mu and logvar of different dtypes.
        ValueError: shapes or devices that differ, fewer than 2 dimensions, an unknown reduction, a free_bits that is
            negative, not finite, or given with another reduction, a prior of another shape, an unknown scale, or
            numbers of the scale that are out of range.

    Source of free_bits: Kingma et al., "Improved Variational Inference with Inverse Autoregressive Flow", 2016,
        appendix C.
    """
    check_halves(mu, logvar)
    if prior is not None or scale != "logvar" or scale_eps or scale_clamp is not None:
        found: Tensor = general(
            mu, logvar, False, True, prior=prior, reduction=reduction, free_bits=free_bits,
            scale=scale, scale_eps=scale_eps, scale_clamp=scale_clamp,
        )  # fmt: skip
        return found
    free_bits = check_divergence(reduction, free_bits)
    if takes_triton(mu):
        from fastvae.autograd import gaussian as fused

        return fused.gaussian(Posterior(False, True, 1, reduction, free_bits), mu, logvar)[0]
    return reference.gaussian.gaussian_kl(mu, logvar, reduction=reduction, free_bits=free_bits)


@overload
def gaussian_sample_kl(
    mu: Tensor, logvar: Tensor, *, log_prob: Literal[False] = False, **options: Unpack[SamplingKL]
) -> tuple[Tensor, Tensor]: ...
@overload
def gaussian_sample_kl(
    mu: Tensor, logvar: Tensor, *, log_prob: Literal[True, "detached"], **options: Unpack[SamplingKL]
) -> tuple[Tensor, Tensor, Tensor]: ...
def gaussian_sample_kl(
    mu: Tensor,
    logvar: Tensor,
    *,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
    batch_offset: int | None = None,
    samples: int | None = None,
    log_prob: LogProb = False,
    prior: Prior | None = None,
    reduction: str = "none",
    free_bits: float = 0.0,
    scale: Scale = "logvar",
    scale_eps: float = 0.0,
    scale_clamp: tuple[float, float] | None = None,
) -> tuple[Tensor, ...]:
    """`gaussian_sample` and `gaussian_kl` of the same posterior, in one launch forward and one backward.

    Arguments, results and errors are those of the two functions; the divergence is per sample unless ``reduction``
    says otherwise. Returns (z, kl), or (z, kl, log_q) with log_prob. The divergence does not depend on the samples.
    """
    check_halves(mu, logvar)
    if (
        prior is not None or samples is not None or log_prob
        or scale != "logvar" or scale_eps or scale_clamp is not None
    ):  # fmt: skip
        found: tuple[Tensor, ...] = general(
            mu, logvar, True, True, eps=eps, generator=generator, batch_offset=batch_offset, samples=samples,
            log_prob=log_prob, prior=prior, reduction=reduction, free_bits=free_bits,
            scale=scale, scale_eps=scale_eps, scale_clamp=scale_clamp,
        )  # fmt: skip
        return found
    batch_offset = check_noise(mu.shape, "mu", mu, eps, generator, batch_offset)
    free_bits = check_divergence(reduction, free_bits)
    if takes_triton(mu, eps):
        from fastvae.autograd import gaussian as fused

        posterior = Posterior(True, True, 1, reduction, free_bits)
        z, kl = fused.gaussian(posterior, mu, logvar, eps, generator, batch_offset)
        return z, kl
    return reference.gaussian.gaussian_sample_kl(
        mu,
        logvar,
        eps=eps,
        generator=generator,
        batch_offset=batch_offset,
        reduction=reduction,
        free_bits=free_bits,
    )


@overload
def gaussian_sample_kl_packed(
    moments: Tensor, *, log_prob: Literal[False] = False, **options: Unpack[SamplingKLPacked]
) -> tuple[Tensor, Tensor]: ...
@overload
def gaussian_sample_kl_packed(
    moments: Tensor, *, log_prob: Literal[True, "detached"], **options: Unpack[SamplingKLPacked]
) -> tuple[Tensor, Tensor, Tensor]: ...
def gaussian_sample_kl_packed(
    moments: Tensor,
    *,
    dim: int = 1,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
    batch_offset: int | None = None,
    samples: int | None = None,
    log_prob: LogProb = False,
    prior: Prior | None = None,
    reduction: str = "none",
    free_bits: float = 0.0,
    scale: Scale = "logvar",
    scale_eps: float = 0.0,
    scale_clamp: tuple[float, float] | None = None,
) -> tuple[Tensor, ...]:
    """`gaussian_sample_kl` of an encoder's output that holds both halves, moments = [mu | logvar] along ``dim``.

    The halves are read where they lie and the gradient is one tensor: no chunk, no copy, no concatenation.

    Args:
        moments: [B, ...] with an even size along ``dim``.
        dim: the dimension that is split; not the batch. A prior in one tensor is split along the same.
        eps, generator, batch_offset, samples, log_prob, prior, reduction, free_bits, scale, scale_eps, scale_clamp: as
            in `gaussian_sample_kl`.

    Returns:
        z, of the shape of one half, and the divergence; or (z, kl, log_q).

    Raises:
        TypeError: moments is not a floating-point tensor.
        ValueError: fewer than 2 dimensions, a dim that is out of range, the batch, or odd in size; and as in
            `gaussian_sample_kl`.
    """
    dim, half = check_packed(moments, dim)
    if (
        prior is not None or samples is not None or log_prob
        or scale != "logvar" or scale_eps or scale_clamp is not None
    ):  # fmt: skip
        found: tuple[Tensor, ...] = general(
            moments, None, True, True, dim=dim, half=half, eps=eps, generator=generator, batch_offset=batch_offset,
            samples=samples, log_prob=log_prob, prior=prior, reduction=reduction, free_bits=free_bits,
            scale=scale, scale_eps=scale_eps, scale_clamp=scale_clamp,
        )  # fmt: skip
        return found
    batch_offset = check_noise(half, "moments", moments, eps, generator, batch_offset)
    free_bits = check_divergence(reduction, free_bits)
    if takes_triton(moments, eps):
        from fastvae.autograd import gaussian as fused

        posterior = Posterior(True, True, dim, reduction, free_bits)
        z, kl = fused.gaussian(posterior, moments, None, eps, generator, batch_offset)
        return z, kl
    return reference.gaussian.gaussian_sample_kl_packed(
        moments,
        dim=dim,
        eps=eps,
        generator=generator,
        batch_offset=batch_offset,
        reduction=reduction,
        free_bits=free_bits,
    )
