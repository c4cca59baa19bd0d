"""Networks: a VAE around any encoder and decoder, and the convolutional one of the reference example."""

from fastvae.models.conv_vae import ConvVAE
from fastvae.models.keras import conv_vae_from_keras
from fastvae.models.matlab import conv_vae_from_matlab
from fastvae.models.vae import VAE, VAEOutput

__all__ = ["VAE", "ConvVAE", "VAEOutput", "conv_vae_from_keras", "conv_vae_from_matlab"]
