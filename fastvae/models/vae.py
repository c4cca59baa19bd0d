"""A variational autoencoder around any encoder and decoder."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

import fastvae.functional as F
from fastvae.functional.checks import check_is_likelihood
from fastvae.likelihoods import Likelihood, SigmoidMSE
from fastvae.reference.precision import Parameters


class VAEOutput(NamedTuple):
    """What a VAE returns for a batch, K being the latent dimension.

    logits: the parameters of the likelihood, as `VAE.decode` returns them: a tensor [B, C, H, W], for `SigmoidMSE` and
    `Bernoulli` before the sigmoid, or a tuple where there are several. z [B, K]: a sample of each posterior. kl
    [B]: their divergence from N(0, I) in nats, or with free bits that of the batch for each of them. Latents that are
    images themselves have z [B, K, h, w].
    """

    logits: Parameters
    z: Tensor
    kl: Tensor


class VAE(nn.Module):
    """Variational autoencoder with a diagonal Gaussian posterior.

    Args:
        encoder: a module from images [B, C, H, W], floating point in [0, 1], to moments [mu | logvar] along dimension
            1: [B, 2K], or [B, 2K, h, w].
        decoder: a module from z, [B, K] or [B, K, h, w], to the parameters of the likelihood: a tensor of the images'
            shape, or a tuple where the likelihood has several. Those after the first may be smaller, such as an
            ``nn.Parameter`` [C, 1, 1] of the decoder.
        latent_shape: the shape of one z, K or (K, h, w).
        likelihood: of the images given the decoder's output, one of `fastvae.likelihoods` or one of your own. Training
            and evaluation take it from here.

    Raises:
        TypeError: a likelihood that is none.
        ValueError: a latent_shape that is not made of positive integers.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_shape: int | tuple[int, ...],
        likelihood: Likelihood = SigmoidMSE(),
    ) -> None:
        super().__init__()
        check_is_likelihood(likelihood)
        shape = latent_shape if isinstance(latent_shape, tuple) else (latent_shape,)
        if not shape or not positive_integers(*shape):
            raise ValueError(f"latent_shape must be a positive integer or a tuple of them, got {latent_shape!r}")
        self.encoder = encoder
        self.decoder = decoder
        self.latent_shape = shape
        self.likelihood = likelihood

    def encode(self, x: Tensor) -> Tensor:
        """The moments [mu | logvar] of the posteriors of images [B, C, H, W].

        Images are floating point in [0, 1], or uint8, which is read as x / 255. Raises ``TypeError`` for another dtype.
        """
        if x.dtype is torch.uint8:
            x = x.to(self._parameter().dtype) / 255
        elif not x.is_floating_point():
            raise TypeError(f"x must be uint8 (read as x / 255) or floating point, got {x.dtype}")
        moments: Tensor = self.encoder(x)
        return moments

    def decode(self, z: Tensor) -> Parameters:
        """The likelihood's parameters given latents z: a tensor [B, C, H, W], or a tuple of several, as the decoder
        returns them.

        Raises ``ValueError`` for a z of another shape, and for a decoder that returns another number of them.
        """
        if z.shape[1:] != self.latent_shape:
            raise ValueError(f"z must have shape [B, {', '.join(map(str, self.latent_shape))}], got {list(z.shape)}")
        parameters: Parameters = self.decoder(z)
        names = self.likelihood.parameters
        if len(as_tuple(parameters)) != len(names):
            got = f"{len(parameters)} in a tuple" if isinstance(parameters, tuple) else type(parameters).__name__
            raise ValueError(
                f"decoder must return the parameters of {self.likelihood}, {len(names)} tensor(s) "
                f"({', '.join(names)}), got {got}"
            )
        return parameters

    def decode_mean(self, z: Tensor) -> Tensor:
        """Images [B, C, H, W] of latents z: the likelihood's mean given `decode`'s parameters."""
        return self.likelihood.mean(*as_tuple(self.decode(z)))

    def forward(self, x: Tensor, batch_offset: int | None = None, free_bits: float = 0.0) -> VAEOutput:
        """Encode images (see `encode`), sample their posteriors, decode the samples.

        ``batch_offset``: the number of samples before these in a batch that several processes share; from one seed they
        then draw the noise of the whole batch (see `fastvae.functional.gaussian_sample`). ``free_bits``: in nats for
        each dimension of z (see `fastvae.functional.gaussian_kl`).
        """
        reduction = "batchmean" if free_bits else "none"
        z, kl = F.gaussian_sample_kl_packed(
            self.encode(x), batch_offset=batch_offset, reduction=reduction, free_bits=free_bits
        )
        return VAEOutput(self.decode(z), z, kl.expand(len(z)) if free_bits else kl)

    @torch.no_grad()
    def reconstruct(self, x: Tensor, deterministic: bool = False) -> Tensor:
        """Images [B, C, H, W] decoded from samples of the posteriors of x (see `encode`): the likelihood's means.

        With ``deterministic=True`` they are decoded from the posteriors' means, z = mu.
        """
        moments = self.encode(x)
        z = moments.chunk(2, 1)[0] if deterministic else F.gaussian_sample_kl_packed(moments)[0]
        return self.decode_mean(z)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``n`` images [n, C, H, W] decoded from z ~ N(0, I): the likelihood's means.

        ``generator`` is of the model's device, the default generator if None. Raises ``ValueError``.
        """
        if n < 0:
            raise ValueError(f"n must not be negative, got {n}")
        parameter = self._parameter()
        if generator is not None and generator.device.type != parameter.device.type:
            raise ValueError(f"generator must be of the model's device, {parameter.device}, got {generator.device}")
        z = torch.randn(n, *self.latent_shape, generator=generator, device=parameter.device, dtype=parameter.dtype)
        return self.decode_mean(z)

    def _parameter(self) -> nn.Parameter:
        """Any parameter: they share one device and dtype."""
        return next(self.parameters())


def as_tuple(parameters: Parameters) -> tuple[Tensor, ...]:
    return parameters if isinstance(parameters, tuple) else (parameters,)


def positive_integers(*sizes: int) -> bool:
    return all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes)
