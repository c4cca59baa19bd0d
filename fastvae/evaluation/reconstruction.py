"""The test loss of a model, and the squared error of each reconstruction.

Every epoch uses the same noise, see `fastvae.evaluation.batches`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

import fastvae.functional as F
from fastvae.evaluation.batches import Batch, batches, measuring, seeded_generator
from fastvae.models import VAE
from fastvae.models.vae import halves, sample_kl
from fastvae.reference.precision import in_precision


class Evaluation(NamedTuple):
    """Means over a set of images.

    loss: the negative evidence lower bound with a sampled z, in nats per image, as in training; or the loss that was
        asked for.
    mse: the mean squared error between the pixels and the likelihood's mean, with z = mu.
    """

    loss: float
    mse: float


def evaluate(
    model: VAE,
    images: Tensor,
    *,
    beta: float | Tensor = 1.0,
    target: Tensor | None = None,
    condition: Tensor | None = None,
) -> Evaluation:
    """The test loss and error of a model on images [N, C, H, W], uint8 or floats in [0, 1], on its device or the CPU.

    Data of another shape [N, ...] are allowed if the model takes them. If the target of the model's likelihood is not
    "unit", floats may have any value, and uint8 is read as the number itself. ``target``: compared with the
    reconstructions in place of the images. ``condition``: the condition of each sample, for a conditional model.

    Raises ``ValueError`` if there are no images, or if target or condition have another number of rows.
    """
    return evaluate_batches(model, batches(model, images, target, condition), beta=beta)


@measuring
def evaluate_batches(
    model: VAE,
    batches: Iterable[Batch],
    *,
    beta: float | Tensor = 1.0,
    loss: Callable[[VAE, Batch, torch.Generator], Tensor] | None = None,
) -> Evaluation:
    """`evaluate` for batches on the model's device. Raises ``ValueError`` if there are none.

    loss: the mean loss of a batch, with the generator's noise, instead of the negative evidence lower bound.
    """
    generator, likelihood = seeded_generator(model), model.likelihood
    losses, errors = [], []
    for batch in batches:
        moments = model.encode(batch.input, **batch.given)
        if loss is None:
            z, kl = model.sample_kl(moments, generator=generator)
            parameters = model.decode(z, **batch.given)
            values = F.negative_log_likelihood(parameters, batch.target, likelihood, reduction="none")
            losses.append(likelihood.reconstruction_weight * values + beta * kl)
        else:
            losses.append(loss(model, batch, generator).expand(len(batch.input)))
        errors.append(_squared_errors(model, halves(moments)[0], batch))
    if not losses:
        raise ValueError("batches must hold at least one batch, got none")
    return Evaluation(*torch.stack([torch.cat(losses).mean(), torch.cat(errors).mean()]).tolist())


@measuring
def reconstruction_errors(
    model: VAE,
    images: Tensor,
    *,
    deterministic: bool = False,
    target: Tensor | None = None,
    condition: Tensor | None = None,
) -> Tensor:
    """The mean squared error of each reconstruction's pixels, mean((X - Y)^2), [N].

    Images, target and condition are as in `evaluate`. z is sampled, or z = mu with ``deterministic=True``. For classes,
    X is 1 for a pixel's class and 0 for the others, and Y has the probabilities of the classes.
    """
    generator = seeded_generator(model)
    errors = []
    for batch in batches(model, images, target, condition):
        moments = model.encode(batch.input, **batch.given)
        z = halves(moments)[0] if deterministic else sample_kl(moments, generator=generator)[0]
        errors.append(_squared_errors(model, z, batch))
    return torch.cat(errors)


def _squared_errors(model: VAE, z: Tensor, batch: Batch) -> Tensor:
    """The mean over each image's pixels, [B], of the squared error of the likelihood's mean."""
    likelihood = model.likelihood
    *parameters, target = in_precision(model.decode(z, **batch.given), batch.target, likelihood)
    mean = likelihood.mean(*parameters)
    if likelihood.target == "class" and target.ndim < mean.ndim:
        axis = likelihood.grouping(parameters[0].shape, target.shape).axis
        target = one_hot(target, mean.shape[axis]).movedim(-1, axis)
    return (mean - target).square().flatten(1).mean(1)
