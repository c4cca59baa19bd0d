"""Networks: the convolutional VAE of the reference example."""

from fastvae.models.conv_vae import ConvVAE, VAEOutput

__all__ = ["ConvVAE", "VAEOutput"]
