"""The operations as `torch.nn` modules. They have settings but no parameters."""

from fastvae.nn.elbo import ELBOLoss
from fastvae.nn.gaussian import GaussianKL, GaussianSampling, GaussianSamplingKL
from fastvae.nn.likelihood import NegativeLogLikelihood, SigmoidMSELoss
from fastvae.nn.pairwise import (
    GaussianMixtureLogProb,
    ImportanceWeightedBound,
    MaximumMeanDiscrepancy,
    TotalCorrelation,
)

__all__ = [
    "ELBOLoss",
    "GaussianKL",
    "GaussianMixtureLogProb",
    "GaussianSampling",
    "GaussianSamplingKL",
    "ImportanceWeightedBound",
    "MaximumMeanDiscrepancy",
    "NegativeLogLikelihood",
    "SigmoidMSELoss",
    "TotalCorrelation",
]
