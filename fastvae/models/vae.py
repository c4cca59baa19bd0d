"""A variational autoencoder around any encoder and decoder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastvae.functional as F
from fastvae.functional.checks import check_is_likelihood
from fastvae.likelihoods import Likelihood, SigmoidMSE
from fastvae.priors import Prior, from_settings
from fastvae.reference.precision import Parameters, in_float32

Moments = Tensor | tuple[Tensor, Tensor]


class VAEOutput(NamedTuple):
    """What a VAE returns for a batch, K being the latent dimension.

    logits: the parameters of the likelihood, as `VAE.decode` returns them: a tensor [B, ...], for `SigmoidMSE` and
    `Bernoulli` before the sigmoid, or a tuple where there are several. z [B, K]: a sample of each posterior. kl
    [B]: their divergence from N(0, I) in nats, or with free bits that of the batch for each of them; of a model with a
    prior the estimate log q(z|x) - log p(z). Latents that are images themselves have z [B, K, h, w].
    """

    logits: Parameters
    z: Tensor
    kl: Tensor


class VAE(nn.Module):
    """Variational autoencoder with a diagonal Gaussian posterior, of images, signals, volumes, tables: data [B, ...].

    Args:
        encoder: a module from data [B, ...], floating point, to the moments of the posteriors: a tensor [mu | logvar]
            along dimension 1, [B, 2K] or [B, 2K, h, w], or a tuple (mu, logvar), as an encoder with two heads returns.
        decoder: a module from z, [B, K] or [B, K, h, w], to the parameters of the likelihood: a tensor of the data's
            shape, or a tuple where the likelihood has several. Those after the first may be smaller, such as an
            ``nn.Parameter`` [C, 1, 1] of the decoder.
        latent_shape: the shape of one z, K or (K, h, w).
        likelihood: of the data given the decoder's output, one of `fastvae.likelihoods` or one of your own. Training
            and evaluation take it from here.
        prior: of the latents, one of `fastvae.priors` or one of your own, whose parameters are the model's too; None:
            N(0, I).

    A conditional VAE has an encoder and a decoder that take two arguments, encoder(x, condition) and
    decoder(z, condition). The methods then take the condition, a tensor [B, ...] of any dtype, by that name.

    Raises:
        TypeError: a likelihood or a prior that is none.
        ValueError: a latent_shape that is not made of positive integers; a prior of other latents, or one that is
            another model's.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_shape: int | tuple[int, ...],
        likelihood: Likelihood = SigmoidMSE(),
        prior: Prior | None = None,
    ) -> None:
        super().__init__()
        check_is_likelihood(likelihood)
        if prior is not None and not isinstance(prior, Prior):
            raise TypeError(f"prior must be a fastvae.priors.Prior or None, got {prior!r}")
        shape = latent_shape if isinstance(latent_shape, tuple) else (latent_shape,)
        if not shape or not positive_integers(*shape):
            raise ValueError(f"latent_shape must be a positive integer or a tuple of them, got {latent_shape!r}")
        self.encoder = encoder
        self.decoder = decoder
        self.latent_shape = shape
        self.likelihood = likelihood
        self.prior = prior
        if prior is not None:
            prior.belongs_to(self)

    def encode(self, x: Tensor, condition: Tensor | None = None) -> Moments:
        """The moments of the posteriors of data [B, ...], as the encoder returns them: see `posterior` for two tensors.

        Data are floating point, or uint8. Bytes are read as the likelihood reads its target: as x / 255 where that is
        "unit", else as the numbers themselves. Integers of other types are handed on where the target is "class".

        Raises ``TypeError`` for another dtype, and for an encoder that returns neither a tensor nor two.
        """
        unit = self.likelihood.target == "unit"
        if x.dtype is torch.uint8:
            x = x.to(self._parameter().dtype)
            x = x / 255 if unit else x
        elif not x.is_floating_point() and self.likelihood.target != "class":
            read = "x / 255" if unit else "x"
            raise TypeError(f"x must be uint8 (read as {read}) or floating point, got {x.dtype}")
        moments: Moments = self.encoder(x) if condition is None else self.encoder(x, condition)
        if isinstance(moments, Tensor) or (isinstance(moments, tuple) and len(moments) == 2):
            return moments
        got = f"{len(moments)} in a tuple" if isinstance(moments, tuple) else type(moments).__name__
        raise TypeError(f"encoder must return a tensor [mu | logvar] or a tuple (mu, logvar), got {got}")

    def posterior(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(mu, logvar), [B, K] each, of the posteriors of data (see `encode`). Of one tensor they are views."""
        return halves(self.encode(x, **given(condition)))

    def decode(self, z: Tensor, condition: Tensor | None = None) -> Parameters:
        """The likelihood's parameters given latents z: a tensor [B, ...], or a tuple of several, as the decoder
        returns them.

        Raises ``ValueError`` for a z of another shape, and for a decoder that returns another number of them.
        """
        if z.shape[1:] != self.latent_shape:
            raise ValueError(f"z must have shape [B, {', '.join(map(str, self.latent_shape))}], got {list(z.shape)}")
        parameters: Parameters = self.decoder(z) if condition is None else self.decoder(z, condition)
        names = self.likelihood.parameters
        if len(as_tuple(parameters)) != len(names):
            got = f"{len(parameters)} in a tuple" if isinstance(parameters, tuple) else type(parameters).__name__
            raise ValueError(
                f"decoder must return the parameters of {self.likelihood}, {len(names)} tensor(s) "
                f"({', '.join(names)}), got {got}"
            )
        return parameters

    def decode_mean(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        """Data [B, ...] of latents z: the likelihood's mean given `decode`'s parameters."""
        return self.likelihood.mean(*as_tuple(self.decode(z, **given(condition))))

    def forward(
        self,
        x: Tensor,
        batch_offset: int | None = None,
        free_bits: float = 0.0,
        condition: Tensor | None = None,
    ) -> VAEOutput:
        """Encode data (see `encode`), sample their posteriors, decode the samples.

        ``batch_offset``: the number of samples before these in a batch that several processes share; from one seed they
        then draw the noise of the whole batch (see `fastvae.functional.gaussian_sample`). ``free_bits``: in nats for
        each dimension of z (see `fastvae.functional.gaussian_kl`); of a model without a prior, else ``ValueError``.
        """
        moments = self.encode(x, **given(condition))
        if not free_bits:
            z, kl = self.sample_kl(moments, batch_offset=batch_offset)
        elif self.prior is None:
            z, kl = sample_kl(moments, batch_offset=batch_offset, reduction="batchmean", free_bits=free_bits)
            kl = kl.expand(len(z))
        else:
            raise ValueError(f"free_bits must be 0 where the model has a prior of its own, got {free_bits}")
        return VAEOutput(self.decode(z, **given(condition)), z, kl)

    def sample_kl(
        self, moments: Moments, generator: torch.Generator | None = None, batch_offset: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """A sample z of each posterior that `encode` returned, and the divergences [B] from the model's prior, in nats.

        Of N(0, I) it is the closed one, in one launch. Of another prior it is log q(z|x) - log p(z) of that sample,
        which is right on average and may be negative.
        """
        if self.prior is None:
            return sample_kl(moments, generator=generator, batch_offset=batch_offset)
        mu, logvar = halves(moments)
        z, log_q = F.gaussian_sample(mu, logvar, generator=generator, batch_offset=batch_offset, log_prob=True)
        return z, log_q - self.log_prior(z)

    def log_prior(self, z: Tensor) -> Tensor:
        """log p(z) in nats of latents [..., *latent_shape], shape [...]."""
        if self.prior is not None:
            return self.prior.log_prob(z)
        terms = in_float32(z).square() + math.log(2 * math.pi)
        return -0.5 * terms.flatten(z.ndim - len(self.latent_shape)).sum(-1)

    @torch.no_grad()
    def reconstruct(self, x: Tensor, deterministic: bool = False, condition: Tensor | None = None) -> Tensor:
        """Data [B, ...] decoded from samples of the posteriors of x (see `encode`): the likelihood's means.

        With ``deterministic=True`` they are decoded from the posteriors' means, z = mu.
        """
        moments = self.encode(x, **given(condition))
        z = halves(moments)[0] if deterministic else sample_kl(moments)[0]
        return self.decode_mean(z, **given(condition))

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None, condition: Tensor | None = None) -> Tensor:
        """Data [n, ...] decoded from z of the prior, N(0, I) unless the model has its own: the likelihood's means.

        ``generator`` is of the model's device, the default generator if None; a condition has ``n`` rows. Raises
        ``ValueError``.
        """
        if n < 0:
            raise ValueError(f"n must not be negative, got {n}")
        if condition is not None and len(condition) != n:
            raise ValueError(f"condition must have a row for each of the {n} samples, got {list(condition.shape)}")
        parameter = self._parameter()
        if generator is not None and generator.device.type != parameter.device.type:
            raise ValueError(f"generator must be of the model's device, {parameter.device}, got {generator.device}")
        if self.prior is None:
            z = torch.randn(n, *self.latent_shape, generator=generator, device=parameter.device, dtype=parameter.dtype)
        else:
            z = self.prior.sample(n, generator)
        return self.decode_mean(z, **given(condition))

    def _parameter(self) -> nn.Parameter:
        """Any parameter: they share one device and dtype."""
        return next(self.parameters())


def given(condition: Tensor | None) -> dict[str, Tensor]:
    """The argument that a model's methods get, which it gets only where there is one: those of a class of your own may
    take data alone.
    """
    return {} if condition is None else {"condition": condition}


def halves(moments: Moments) -> tuple[Tensor, Tensor]:
    """(mu, logvar) of what an encoder returned; of one tensor they are views."""
    mu, logvar = moments.chunk(2, 1) if isinstance(moments, Tensor) else moments
    return mu, logvar


def sample_kl(moments: Moments, **options: Any) -> tuple[Tensor, Tensor]:
    """A sample z of the posteriors of what an encoder returned, and the divergence: `gaussian_sample_kl`, which has the
    options, or of one tensor `gaussian_sample_kl_packed`, which reads it where it lies.
    """
    if isinstance(moments, Tensor):
        return F.gaussian_sample_kl_packed(moments, **options)
    return F.gaussian_sample_kl(*moments, **options)


def made_prior(
    prior: Prior | Mapping[str, Any] | None, latent_shape: int | tuple[int, ...], data_shape: tuple[int, ...]
) -> Prior | None:
    """The prior that a model is given, or that of the settings that a file holds."""
    return from_settings(prior, latent_shape, data_shape) if isinstance(prior, Mapping) else prior


def as_tuple(parameters: Parameters) -> tuple[Tensor, ...]:
    return parameters if isinstance(parameters, tuple) else (parameters,)


def positive_integers(*sizes: int) -> bool:
    return all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes)
