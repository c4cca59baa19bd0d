"""How well a model explains images: the test loss, and the squared error of each reconstruction.

Every epoch is measured with the same noise, see `fastvae.evaluation.batches`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import fastvae.functional as F
from fastvae.evaluation.batches import batches, measuring, seeded_generator
from fastvae.models import VAE
from fastvae.reference.precision import in_precision


class Evaluation(NamedTuple):
    """Means over a set of images.

    loss: the negative evidence lower bound with sampled z, in nats per image, as training defines it.
    mse: the mean squared error of the pixels from the likelihood's mean, with z = mu.
    """

    loss: float
    mse: float


@measuring
def evaluate(model: VAE, images: Tensor, *, beta: float | Tensor = 1.0) -> Evaluation:
    """The test loss and error of a model on images [N, C, H, W], uint8 or floats in [0, 1], on its device or the CPU.

    Where the target of the model's likelihood is "number", floats may be any, and it reads uint8 as it is.

    Raises ``ValueError`` if there are no images.
    """
    generator, likelihood = seeded_generator(model), model.likelihood
    losses, errors = [], []
    for batch in batches(model, images):
        moments = model.encode(batch)
        z, kl = F.gaussian_sample_kl_packed(moments, generator=generator)
        values = F.negative_log_likelihood(model.decode(z), batch, likelihood, reduction="none")
        losses.append(likelihood.reconstruction_weight * values + beta * kl)
        errors.append(_squared_errors(model, moments.chunk(2, 1)[0], batch))
    loss, mse = torch.stack([torch.cat(losses).mean(), torch.cat(errors).mean()]).tolist()
    return Evaluation(loss, mse)


@measuring
def reconstruction_errors(model: VAE, images: Tensor, *, deterministic: bool = False) -> Tensor:
    """The mean squared error of each reconstruction's pixels, mean((X - Y)^2), [N].

    Images as in `evaluate`. z is sampled, or z = mu with ``deterministic=True``.
    """
    generator = seeded_generator(model)
    errors = []
    for batch in batches(model, images):
        moments = model.encode(batch)
        mu = moments.chunk(2, 1)[0]
        z = mu if deterministic else F.gaussian_sample_kl_packed(moments, generator=generator)[0]
        errors.append(_squared_errors(model, z, batch))
    return torch.cat(errors)


def _squared_errors(model: VAE, z: Tensor, images: Tensor) -> Tensor:
    """The mean over each image's pixels, [B], of the squared error of the likelihood's mean."""
    *parameters, target = in_precision(model.decode(z), images, model.likelihood)
    return (model.likelihood.mean(*parameters) - target).square().flatten(1).mean(1)
