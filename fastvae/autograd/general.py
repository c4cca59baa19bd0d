"""Autograd of the posterior with another prior, another scale, several samples or log-densities.

Saved for backward: the moments, the prior, a given eps, and the pair (seed, offset) from which backward makes the noise
again, in the memory order that mu had in forward. Neither the noise nor the standard deviation is stored.

The log-density as a function of z alone is a node of its own behind z, so that what it sends to z passes through the
hooks of z.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvae import random
from fastvae.autograd.general_operations import noise_of
from fastvae.autograd.registration import apply, is_differentiated, is_traced, operations, refuse_vmap
from fastvae.kernels import general_gradients as gradients
from fastvae.kernels import general_posterior as kernels
from fastvae.kernels.layout import in_order_of
from fastvae.reference.gaussian import General, divergence, log_densities, log_variance, standard_deviation
from fastvae.reference.precision import in_float32

_NO_GRADIENT = (None,) * 6  # of the noise


def _halves(posterior: General, first: Any, second: Tensor | None) -> Sequence[Tensor]:
    return first.chunk(2, posterior.dim) if second is None else (first, second)


def _differentiable_gradients(
    posterior: General,
    tensors: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    eps: Tensor | None,
    rng: Sequence[Any],
) -> list[Tensor | None]:
    """The gradients of mu, second and the prior's by torch's own differentiation of the specification, around the same
    noise.
    """
    mu, second = tensors[:2]
    assert mu is not None
    given = [tensor for tensor in tensors if tensor is not None]
    z_grad, kl_grad, log_q_grad = grads
    noise = None if z_grad is None else noise_of(posterior, mu, second, eps, rng)
    reading = _reading(posterior)

    def formula(*each: Any) -> list[Tensor]:
        of = iter(each)
        mu, second, prior_mu, prior_second = (None if tensor is None else next(of) for tensor in tensors)
        mu, second = _halves(posterior, mu, second)
        results = []
        if noise is not None:
            z = in_float32(mu) + standard_deviation(second, *reading) * noise
            results.append(z.to(mu.dtype))
        if kl_grad is not None:
            prior = None
            if prior_mu is not None:
                prior_mu, prior_second = _halves(posterior, prior_mu, prior_second)
                prior = in_float32(prior_mu), log_variance(prior_second, posterior.prior_scale, *reading[1:])
            logvar = log_variance(second, *reading)
            results.append(divergence(in_float32(mu), logvar, prior, posterior.reduction, posterior.free_bits))
        if log_q_grad is not None:
            # Of the noise it has no gradient, but it has a value for each sample.
            zero = in_float32(second).new_zeros([posterior.samples] * (posterior.samples > 0) + [*second.shape])
            results.append(log_densities(zero, log_variance(second, *reading)))
        return results

    transformed: Any = torch.func.vjp(formula, *given)
    results, backward = transformed
    upstream = [
        grad.to(result.dtype)
        for grad, result in zip((grad for grad in grads if grad is not None), results, strict=True)
    ]
    gradients = iter(backward(upstream))
    return [None if tensor is None else next(gradients) for tensor in tensors]


def _reading(posterior: General) -> tuple[str, float, tuple[float, float] | None]:
    clamps = posterior.low > -float("inf") or posterior.high < float("inf")
    return posterior.scale, posterior.scale_eps, (posterior.low, posterior.high) if clamps else None


class GeneralGaussian(torch.autograd.Function):
    """z, kl and log_q, those that the posterior asks for, of (posterior, mu, second, prior_mu, prior_second, eps,
    *rng). With second None, mu holds both, halves along posterior.dim; and so does the prior's.
    """

    # The arguments one by one: torch.compile counts them to tell this form from forward(ctx, ...).
    @staticmethod
    def forward(
        posterior: General,
        mu: Tensor,
        second: Tensor | None,
        prior_mu: Tensor | None,
        prior_second: Tensor | None,
        eps: Tensor | None,
        seed_tensor: Tensor | None,
        offset_tensor: Tensor | None,
        seed: int,
        offset: int,
        batch_offset: int,
    ) -> tuple[Tensor, ...]:
        others = mu, second, prior_mu, prior_second, eps, seed_tensor, offset_tensor, seed, offset, batch_offset
        if is_traced(mu, second, prior_mu, prior_second, eps, seed_tensor, offset_tensor):
            return tuple(operations.general(*posterior, *others))
        return tuple(kernels.general(posterior, *others))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.posterior, *tensors, ctx.seed, ctx.offset, ctx.batch_offset = inputs
        ctx.strides = tensors[0].stride()
        kl = output[int(ctx.posterior.draws)] if ctx.posterior.free_bits else None
        ctx.save_for_backward(*tensors, kl)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        posterior = ctx.posterior
        z_grad = grads[0] if posterior.draws else None
        kl_grad = grads[int(posterior.draws)] if posterior.diverges else None
        log_q_grad = grads[-1] if posterior.log_prob else None
        upstream = z_grad, kl_grad, log_q_grad
        mu, second, prior_mu, prior_second, eps, seed_tensor, offset_tensor, kl = ctx.saved_tensors
        rng = seed_tensor, offset_tensor, ctx.seed, ctx.offset, ctx.batch_offset
        tensors = mu, second, prior_mu, prior_second
        # Only the divergence knows the prior.
        reaches = True, True, kl_grad is not None, kl_grad is not None
        needed = [need and reached for need, reached in zip(ctx.needs_input_grad[1:5], reaches, strict=True)]
        every = *tensors, *upstream, kl, eps, seed_tensor, offset_tensor
        found: Sequence[Tensor | None]
        if all(grad is None for grad in upstream) or not any(needed):
            return None, *[None] * 4, *_NO_GRADIENT
        if is_differentiated(*every):
            tensors = in_order_of(mu, ctx.strides), *tensors[1:]
            found = _differentiable_gradients(posterior, tensors, upstream, eps, rng)
            return None, *[grad if need else None for grad, need in zip(found, needed, strict=True)], *_NO_GRADIENT
        others = *tensors, ctx.strides, needed, *upstream, kl, eps, *rng
        if is_traced(*every):
            found = operations.general_backward(*posterior, *others)
        else:
            found = gradients.general_backward(posterior, *others)
        each = iter(found)
        return None, *[next(each) if need else None for need in needed], *_NO_GRADIENT

    vmap = refuse_vmap("gaussian_sample, gaussian_kl or gaussian_sample_kl")


class Score(torch.autograd.Function):
    """log_q as a function of z alone, of (posterior, z, log_q, mu, second, eps, *rng)."""

    @staticmethod
    def forward(
        posterior: General,
        z: Tensor,
        log_q: Tensor,
        mu: Tensor,
        second: Tensor | None,
        eps: Tensor | None,
        seed_tensor: Tensor | None,
        offset_tensor: Tensor | None,
        seed: int,
        offset: int,
        batch_offset: int,
    ) -> Tensor:
        return log_q.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.posterior, z, _, mu, second, eps, seed_tensor, offset_tensor, *ctx.numbers = inputs
        ctx.strides = mu.stride()
        ctx.save_for_backward(z, mu, second, eps, seed_tensor, offset_tensor)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, log_q_grad: Tensor | None) -> tuple[Tensor | None, ...]:
        posterior = ctx.posterior
        z, mu, second, eps, seed_tensor, offset_tensor = ctx.saved_tensors
        rng = seed_tensor, offset_tensor, *ctx.numbers
        z_grad = None
        if log_q_grad is None:
            pass
        elif is_differentiated(z, mu, second, log_q_grad, eps, seed_tensor, offset_tensor):
            mu = in_order_of(mu, ctx.strides)
            std = standard_deviation(_halves(posterior, mu, second)[1].detach(), *_reading(posterior))
            # What is added to the noise is 0, with the gradient of (z - mu) / std in z.
            noise = noise_of(posterior, mu, second, eps, rng) + (in_float32(z) - in_float32(z).detach()) / std
            score = -(log_q_grad.view(*log_q_grad.shape, *[1] * (std.ndim - 1)) * noise) / std
            z_grad = score.to(z.dtype)
        elif is_traced(z, mu, second, log_q_grad, eps, seed_tensor, offset_tensor):
            z_grad = operations.general_score(*posterior, mu, second, ctx.strides, log_q_grad, eps, *rng)
        else:
            z_grad = gradients.score(posterior, mu, second, ctx.strides, log_q_grad, eps, *rng)
        return None, z_grad, None, None, None, *_NO_GRADIENT

    vmap = refuse_vmap("gaussian_sample or gaussian_sample_kl")


def general(
    posterior: General,
    mu: Tensor,
    second: Tensor | None,
    prior_mu: Tensor | None,
    prior_second: Tensor | None,
    eps: Tensor | None = None,
    generator: torch.Generator | None = None,
    batch_offset: int | None = None,
    detached: bool = False,
) -> Any:
    """z, kl and log_q, those that the posterior asks for; one alone, or a tuple. detached: log_q is a function of z
    alone.
    """
    rng = kernels.NO_RNG
    if posterior.draws and eps is None:
        rng = (*random.reserve(mu.device, generator), batch_offset or 0)
    sums = bool(posterior.free_bits) and posterior.reduction == "batchmean"
    if sums:
        posterior = posterior._replace(reduction="per_dimension")
    results = [*apply(GeneralGaussian, posterior, mu, second, prior_mu, prior_second, eps, *rng)]
    if sums:
        kl = int(posterior.draws)
        results[kl] = results[kl].sum()
    if detached:
        results[-1] = apply(
            Score,
            posterior,
            results[0],
            results[-1].detach(),
            mu.detach(),
            None if second is None else second.detach(),
            eps,
            *rng,
        )
    return results[0] if len(results) == 1 else tuple(results)
