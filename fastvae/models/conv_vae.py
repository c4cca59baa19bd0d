"""The convolutional VAE of MathWorks' "Train Variational Autoencoder (VAE) to Generate Images", for images of any size.

At the defaults, with shapes (C, H, W):

    encoder                                    decoder
    image                       1, 28, 28      project                              64, 7, 7
    convolution, ReLU          32, 14, 14      transposed convolution, ReLU       64, 14, 14
    convolution, ReLU            64, 7, 7      transposed convolution, ReLU       32, 28, 28
    fully connected      32 = mu | logvar      transposed convolution, stride 1    1, 28, 28 = logits

Kernels are 3x3, strides 2 but for the last layer's. Nothing is applied to the projection; in older releases of the
example a transposed convolution, 7x7, had its place, and ReLU followed (``projection_relu``). 228,193 parameters in 14
tensors: Glorot uniform weights and zero biases. Where the likelihood has several parameters, the last layer has so many
times the channels.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fastvae.functional.checks import check_is_likelihood
from fastvae.likelihoods import Likelihood, SigmoidMSE, from_key
from fastvae.models.same_padding import KERNEL, Downsample, Upsample, halved
from fastvae.models.vae import VAE, Moments, made_prior, positive_integers
from fastvae.priors import Prior


class Split(nn.Module):
    """Cuts the channels into as many equal parts, which are views."""

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.parts = parts

    def extra_repr(self) -> str:
        return str(self.parts)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.chunk(self.parts, 1)


class ConvVAE(VAE):
    """Convolutional variational autoencoder with a diagonal Gaussian posterior.

    Each of ``channels`` is one level: a convolution in the encoder, which leaves ceil(size / 2), and its adjoint in the
    decoder, which restores exactly the size the encoder had there. So every image size works, even or odd.

    Args:
        image_shape: (C, H, W).
        latent_dim: K, the size of z.
        channels: the output channels of the encoder's convolutions, first to last.
        likelihood: of the images, or its ``key``, as `settings` hold it. The last layer has C channels for each of its
            parameters, one after the other, or as many as `Likelihood.output_channels` says.
        projection_channels: of the projection; None: as many as the encoder's last convolution has.
        projection_relu: apply ReLU to the projection, as older releases of the example did.
        prior: one of `fastvae.priors`, or its settings, as `settings` hold them; None: N(0, I).

    Raises:
        TypeError: a likelihood that is none.
        ValueError: a size that is not a positive integer, no channels, a key that names no likelihood (see
            `fastvae.likelihoods.from_key`), or images that the likelihood is not of.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (1, 28, 28),
        latent_dim: int = 16,
        channels: tuple[int, ...] = (32, 64),
        likelihood: Likelihood | str = SigmoidMSE(),
        projection_channels: int | None = None,
        projection_relu: bool = False,
        prior: Prior | Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(likelihood, str):
            likelihood = from_key(likelihood)
        check_is_likelihood(likelihood)
        if len(image_shape) != 3 or not positive_integers(*image_shape):
            raise ValueError(f"image_shape must be three positive integers (C, H, W), got {image_shape}")
        if not positive_integers(latent_dim):
            raise ValueError(f"latent_dim must be a positive integer, got {latent_dim!r}")
        if not channels or not positive_integers(*channels):
            raise ValueError(f"channels must be one or more positive integers, got {channels}")
        if projection_channels is None:
            projection_channels = channels[-1]
        if not positive_integers(projection_channels):
            raise ValueError(f"projection_channels must be a positive integer or None, got {projection_channels!r}")
        encoder: OrderedDict[str, nn.Module] = OrderedDict()
        depth, height, width = image_shape
        sizes = []  # of the image before each convolution: what the decoder has to restore
        for level, outputs in enumerate(channels, start=1):
            encoder[f"conv{level}"] = Downsample(depth, outputs)
            encoder[f"relu{level}"] = nn.ReLU()
            sizes.append((height, width))
            depth, height, width = outputs, halved(height), halved(width)
        encoder["flatten"] = nn.Flatten()
        encoder["moments"] = nn.Linear(depth * height * width, 2 * latent_dim)

        decoder: OrderedDict[str, nn.Module] = OrderedDict()
        depth = projection_channels
        decoder["project"] = nn.Linear(latent_dim, depth * height * width)
        if projection_relu:
            decoder["relu0"] = nn.ReLU()
        decoder["unflatten"] = nn.Unflatten(1, (depth, height, width))
        for level, outputs in enumerate(reversed(channels), start=1):
            decoder[f"transposed_conv{level}"] = Upsample(depth, outputs, sizes.pop())
            decoder[f"relu{level}"] = nn.ReLU()
            depth = outputs
        count = len(likelihood.parameters)
        decoder["logits"] = nn.ConvTranspose2d(depth, likelihood.output_channels(image_shape[0]), KERNEL, padding=1)
        if count > 1:
            decoder["split"] = Split(count)
        prior = made_prior(prior, latent_dim, tuple(image_shape))
        super().__init__(nn.Sequential(encoder), nn.Sequential(decoder), latent_dim, likelihood, prior)
        self.image_shape = tuple(image_shape)
        self.latent_dim = latent_dim
        self.channels = tuple(channels)
        self.projection_channels, self.projection_relu = projection_channels, projection_relu
        self.reset_parameters()

    @property
    def data_shape(self) -> tuple[int, ...]:
        """The shape of one sample: ``image_shape``."""
        return self.image_shape

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments this model was made with, by name; of the likelihood its key and of a prior its settings,
        because files hold no objects.

        Those of the projection, and the prior, are among them where they are not the defaults.
        """
        settings: dict[str, Any] = {
            "image_shape": self.image_shape,
            "latent_dim": self.latent_dim,
            "channels": self.channels,
            "likelihood": self.likelihood.key,
        }
        if self.projection_channels != self.channels[-1]:
            settings["projection_channels"] = self.projection_channels
        if self.projection_relu:
            settings["projection_relu"] = True
        if self.prior is not None:
            settings["prior"] = self.prior.settings
        return settings

    def reset_parameters(self) -> None:
        """Glorot uniform weights, within sqrt(6 / (fan_in + fan_out)) of 0, and zero biases; a prior stays as it is."""
        for name, parameter in (*self.encoder.named_parameters(), *self.decoder.named_parameters()):
            if name.endswith("weight"):
                nn.init.xavier_uniform_(parameter)
            else:
                nn.init.zeros_(parameter)

    def encode(self, x: Tensor, condition: Tensor | None = None) -> Moments:
        """The moments [mu | logvar], [B, 2K], of the posteriors of images [B, C, H, W].

        Images are floating point, or uint8 (see `VAE.encode`). Raises ``ValueError`` for another shape or a condition,
        ``TypeError`` for another dtype.
        """
        if condition is not None:
            raise ValueError("condition must be None for a ConvVAE, whose encoder takes images alone: see VAE")
        if x.ndim != 4 or tuple(x.shape[1:]) != self.image_shape:
            raise ValueError(f"x must have shape [B, {', '.join(map(str, self.image_shape))}], got {list(x.shape)}")
        return super().encode(x)
