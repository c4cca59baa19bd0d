"""The log-probability of images under a model: the evidence lower bound, and a tighter bound by importance sampling.

Both estimate log p(x) in nats per image, for the model that was trained: z of the model's prior, N(0, I) unless it has
one of its own, and independent pixels x with the model's likelihood given the decoder's output. They include the
constants that the likelihood's formula leaves out (its ``omitted`` and ``complete``). For `SigmoidMSE`, a Gaussian of
variance 1 around the sigmoid, this is -D / 2 * log(2 pi) for the D values of an image, -720.4 nats at 28x28. A variance
of 1 is wide for pixels in [0, 1], so p(x) changes little with training.

Compare these numbers only between models with the same likelihood and the same reading of the images. A density of
numbers, a probability of counts, and `Bernoulli` with grey values, which is neither, have different units.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import fastvae.functional as F
from fastvae.evaluation.batches import Batch, batch_size, batches, measuring, seeded_generator
from fastvae.models import VAE


@measuring
def elbo(
    model: VAE, images: Tensor, *, seed: int = 0, target: Tensor | None = None, condition: Tensor | None = None
) -> Tensor:
    """The evidence lower bound of each image, log p(x|z) - KL(q(z|x) || p(z)) with one sampled z, float64 [N], in nats.

    If the model has a prior of its own, the divergence is estimated from the same z.

    Images, target and condition are as in `evaluate`. With the same seed, 0, the mean is minus the loss of `evaluate`,
    minus the omitted constants.

    Raises ``ValueError`` if there are no images.

    Source: Kingma and Welling, "Auto-Encoding Variational Bayes", 2013, equation 10.
    """
    generator = seeded_generator(model, seed)
    bounds = []
    for batch in batches(model, images, target, condition):
        z, kl = model.sample_kl(model.encode(batch.input, **batch.given), generator=generator)
        bounds.append(_log_density(model, z, batch) - kl.double())
    return torch.cat(bounds)


@measuring
def log_likelihood(
    model: VAE,
    images: Tensor,
    *,
    samples: int = 100,
    seed: int = 0,
    target: Tensor | None = None,
    condition: Tensor | None = None,
) -> Tensor:
    """log p(x) of each image by importance sampling, float64 [N], in nats.

    The estimate is log(1/S sum_s w_s), w_s = p(x|z_s) p(z_s) / q(z_s|x), with S = ``samples`` draws of z_s ~ q(z|x).
    Its expectation is a lower bound of log p(x), which grows with S from the evidence lower bound at S = 1 towards log
    p(x).

    Images, target and condition are as in `evaluate`. It needs as much memory as `evaluate`, for any N and S. The noise
    of an image depends on the seed and the image's index, not on the batches.

    Raises ``ValueError`` if there are no images, or samples is not a positive integer.

    Source: Burda, Grosse and Salakhutdinov, "Importance Weighted Autoencoders", 2016, section 3 and appendix A.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples must be a positive integer, got {samples!r}")
    results: list[Tensor] = []
    first = 0
    for batch in batches(model, images, target, condition):
        generator = seeded_generator(model, seed)
        mu, logvar = (half.contiguous() for half in model.posterior(batch.input, **batch.given))
        at_once = max(1, batch_size(images) // len(mu))
        total = torch.full((len(mu),), -math.inf, dtype=torch.float64, device=mu.device)
        for done in range(0, samples, at_once):
            # A draw for each sample, addressed by the images' numbers, so that batching does not show in the noise.
            draws = [
                F.gaussian_sample(mu, logvar, generator=generator, batch_offset=first)
                for _ in range(min(at_once, samples - done))
            ]
            log_weights = _log_weights(model, batch, mu, logvar, torch.stack(draws))
            total = torch.logaddexp(total, torch.logsumexp(log_weights, 0))
        results.append(total - math.log(samples))
        first += len(mu)
    return torch.cat(results)


def bits_per_dimension(nats: float, dimensions: int) -> float:
    """-nats / (D log 2): convert a bound or log-likelihood of images with D values to bits per value.

    For a density of pixels in [0, 1] this is not the code length of bytes, which is 8 bits more. For probabilities of
    the 256 bytes, as in `DiscretizedLogistic`, it is the code length.
    """
    return -nats / (dimensions * math.log(2))


def _log_weights(model: VAE, batch: Batch, mu: Tensor, logvar: Tensor, z: Tensor) -> Tensor:
    """log p(x|z) + log p(z) - log q(z|x) of S samples z [S, B, ...] for each of B images: float64 [S, B]."""
    wide, wide_mu, wide_logvar = z.double(), mu.double(), logvar.double()
    terms = wide_logvar + (wide - wide_mu).square() * torch.exp(-wide_logvar) + math.log(2 * math.pi)
    log_q = -0.5 * terms.flatten(2).sum(2)
    # N(0, I) in float64; a prior of the model's own in the precision that it has.
    log_p = model.log_prior(wide if model.prior is None else z).double()

    def repeated(rows: Tensor) -> Tensor:
        return rows.repeat(len(z), *[1] * (rows.ndim - 1))

    condition = None if batch.condition is None else repeated(batch.condition)
    density = _log_density(model, z.flatten(0, 1), Batch(batch.input, repeated(batch.target), condition))
    return density.view(len(z), len(mu)) + log_p - log_q


def _log_density(model: VAE, z: Tensor, batch: Batch) -> Tensor:
    """log p(x|z) of each pair of a z and a target, float64 [B]."""
    likelihood, target = model.likelihood.complete, batch.target
    parameters = model.decode(z, **batch.given)
    values = F.negative_log_likelihood(parameters, target, likelihood, reduction="none").double()
    return -(likelihood.reconstruction_weight * values + likelihood.omitted * target[0].numel())
