"""The likelihoods and priors that a flag names, and the model of data of a shape."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae.likelihoods import (
    Bernoulli,
    ContinuousBernoulli,
    DiscretizedLogistic,
    Gaussian,
    Laplace,
    Likelihood,
    SigmoidMSE,
)
from fastvae.models.conv_vae import ConvVAE
from fastvae.models.tabular_vae import TabularVAE
from fastvae.models.vae import VAE
from fastvae.priors import MixturePrior, Prior, VampPrior

# Of bytes read as [0, 1]. Least widths of 0.05, and of about a quarter of a byte: on the bundled digits the losses fall
# from epoch to epoch with these. Without one, pixels that are always black would let their width, and the loss, fall
# without end.
OF_PICTURES: dict[str, Likelihood] = {
    "sigmoid-mse": SigmoidMSE(),
    "bernoulli": Bernoulli(),
    "continuous-bernoulli": ContinuousBernoulli(),
    "gaussian": Gaussian(sigmoid=True, min_logvar=-6.0),
    "laplace": Laplace(min_log_scale=-3.0),
    "discretized-logistic": DiscretizedLogistic(min_log_scale=-7.0),
}
# Of standardised numbers; a least width of a thirtieth of their deviation.
OF_NUMBERS: dict[str, Likelihood] = {"gaussian": Gaussian(min_logvar=-7.0), "laplace": Laplace(min_log_scale=-3.5)}


PRIORS = ("standard", "mixture", "vamp")
MIXTURE_COMPONENTS, VAMP_COMPONENTS = 64, 100


def prior_of(name: str, latent_dim: int, samples: Tensor) -> Prior | None:
    """A new prior of this name, on the CPU, for a model of samples [N, ...], bytes of pictures or standardised
    numbers. A `VampPrior` begins at some of them. None: N(0, I).
    """
    if name == "standard":
        return None
    if name == "mixture":
        return MixturePrior(latent_dim, MIXTURE_COMPONENTS)
    some = samples[torch.randperm(len(samples))[:VAMP_COMPONENTS].to(samples.device)].cpu()
    shape, of_pictures = tuple(some.shape[1:]), some.dtype is torch.uint8
    data = some / 255 if of_pictures else some  # as `VAE.encode` reads them
    return VampPrior(shape, VAMP_COMPONENTS, data=data, bounds=(0.0, 1.0) if of_pictures else None)


def model_of(shape: tuple[int, ...], latent_dim: int, likelihood: Likelihood, prior: Prior | None = None) -> VAE:
    """A new `TabularVAE` of samples [columns], or `ConvVAE` of samples [C, H, W]."""
    if len(shape) == 1:
        return TabularVAE(shape[0], latent_dim, likelihood=likelihood, prior=prior)
    channels, height, width = shape
    return ConvVAE((channels, height, width), latent_dim, likelihood=likelihood, prior=prior)
