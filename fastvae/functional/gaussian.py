"""The diagonal Gaussian posterior q(z|x) = N(mu, diag(exp(logvar))): reparameterised samples and the divergence from
N(0, I).

Shapes are [B, ...] of any rank from 2 up; dtypes float16, bfloat16, float32, and float64 on the reference path.
Arithmetic is float32 (float64 for float64); z has the dtype of mu, the divergence is float32 (float64). logvar is not
clamped.

Noise is torch's: it follows `torch.manual_seed`, `torch.random.fork_rng`, activation checkpointing and ``generator``,
and is new at each call and at each replay of a captured CUDA graph. The fused path regenerates it in backward instead
of storing it, and draws other numbers than the reference path does from the same seed; pass ``eps`` to fix the noise
of both.

Source: Kingma and Welling, "Auto-Encoding Variational Bayes", 2013, section 2.4 and appendix B.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae import reference
from fastvae.functional.checks import check_divergence, check_halves, check_noise, check_packed, takes_triton
from fastvae.reference.gaussian import Posterior


def gaussian_sample(
    mu: Tensor,
    logvar: Tensor,
    *,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
    batch_offset: int | None = None,
) -> Tensor:
    """Draw z = mu + exp(logvar / 2) * eps with eps ~ N(0, I), differentiable in mu and logvar.

    Args:
        mu, logvar: [B, ...], of one shape, dtype and device.
        eps: the noise, of mu's shape; drawn if None. It must not require grad.
        generator: a torch.Generator of mu's device; the default generator if None.
        batch_offset: where mu is a part of a batch that several processes share, the number of samples before this
            part. Parts drawn from the same seed then have the noise that the whole batch would have had, in one call
            with a batch_offset of 0, on either backend.

    Returns:
        z, of mu's shape, dtype and memory format.

    Raises:
        TypeError: not a floating-point tensor; mu and logvar of different dtypes.
        ValueError: shapes or devices that differ, fewer than 2 dimensions, a batch_offset that is negative or
            counts more than 2^63 elements, or eps together with generator or batch_offset.
    """
    check_halves(mu, logvar)
    batch_offset = check_noise(mu.shape, "mu", mu, eps, generator, batch_offset)
    if takes_triton(mu, eps):
        from fastvae.autograd import gaussian as fused

        return fused.gaussian(Posterior(True, False), mu, logvar, eps, generator, batch_offset)[0]
    return reference.gaussian.gaussian_sample(mu, logvar, eps=eps, generator=generator, batch_offset=batch_offset)


def gaussian_kl(mu: Tensor, logvar: Tensor, *, reduction: str = "batchmean", free_bits: float = 0.0) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, I)) = sum_event (mu^2 + exp(logvar) - 1 - logvar) / 2, in nats.

    Args:
        mu, logvar: [B, ...], of one shape, dtype and device.
        reduction: "none" per sample, shape [B]; "batchmean" their mean; "sum" over everything; "mean" over every
            element; "per_dimension" the batch mean of each element of the event.
        free_bits: in nats; with reduction "batchmean" or "per_dimension" only. Each dimension's batch mean counts as
            at least so much, max(mean_B kl_d, free_bits), and has no gradient below: a dimension is not pushed onto
            the prior for the last of its information. 0: off.

    Returns:
        The divergence, float32 (float64), shape [B], [], or that of an event.

    Raises:
        TypeError: not a floating-point tensor; mu and logvar of different dtypes.
        ValueError: shapes or devices that differ, fewer than 2 dimensions, an unknown reduction, a free_bits that is
            negative, not finite, or given with another reduction.

    Source of free_bits: Kingma et al., "Improved Variational Inference with Inverse Autoregressive Flow", 2016,
        appendix C.
    """
    check_halves(mu, logvar)
    free_bits = check_divergence(reduction, free_bits)
    if takes_triton(mu):
        from fastvae.autograd import gaussian as fused

        return fused.gaussian(Posterior(False, True, 1, reduction, free_bits), mu, logvar)[0]
    return reference.gaussian.gaussian_kl(mu, logvar, reduction=reduction, free_bits=free_bits)


def gaussian_sample_kl(
    mu: Tensor,
    logvar: Tensor,
    *,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
    batch_offset: int | None = None,
    reduction: str = "none",
    free_bits: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`gaussian_sample` and `gaussian_kl` of the same posterior, in one launch forward and one backward.

    Arguments, results and errors are those of the two functions; the divergence is per sample unless ``reduction``
    says otherwise.
    """
    check_halves(mu, logvar)
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


def gaussian_sample_kl_packed(
    moments: Tensor,
    *,
    dim: int = 1,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
    batch_offset: int | None = None,
    reduction: str = "none",
    free_bits: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`gaussian_sample_kl` of an encoder's output that holds both halves, moments = [mu | logvar] along ``dim``.

    The halves are read where they lie and the gradient is one tensor: no chunk, no copy, no concatenation.

    Args:
        moments: [B, ...] with an even size along ``dim``.
        dim: the dimension that is split; not the batch.
        eps, generator, batch_offset, reduction, free_bits: as in `gaussian_sample_kl`.

    Returns:
        z, of the shape of one half, and the divergence.

    Raises:
        TypeError: moments is not a floating-point tensor.
        ValueError: fewer than 2 dimensions, a dim that is out of range, the batch, or odd in size; and as in
            `gaussian_sample_kl`.
    """
    dim, half = check_packed(moments, dim)
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
