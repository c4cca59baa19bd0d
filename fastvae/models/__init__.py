"""Networks: a VAE around any encoder and decoder, the convolutional one of the reference example, and one of tables."""

from fastvae.models.conv_vae import ConvVAE
from fastvae.models.keras import conv_vae_from_keras
from fastvae.models.matlab import conv_vae_from_matlab
from fastvae.models.tabular_vae import TabularVAE
from fastvae.models.vae import VAE, VAEOutput

__all__ = ["VAE", "ConvVAE", "TabularVAE", "VAEOutput", "conv_vae_from_keras", "conv_vae_from_matlab"]
