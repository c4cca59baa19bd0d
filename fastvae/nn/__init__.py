"""The operations as `torch.nn` modules; they hold settings, no parameters."""

from fastvae.nn.elbo import ELBOLoss
from fastvae.nn.gaussian import GaussianKL, GaussianSampling, GaussianSamplingKL
from fastvae.nn.likelihood import NegativeLogLikelihood, SigmoidMSELoss

__all__ = [
    "ELBOLoss",
    "GaussianKL",
    "GaussianSampling",
    "GaussianSamplingKL",
    "NegativeLogLikelihood",
    "SigmoidMSELoss",
]
