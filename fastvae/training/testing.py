"""The test of a model on batches that hold a target or a condition of their own, or that a loader makes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

import fastvae.functional as F
from fastvae.evaluation import Evaluation
from fastvae.evaluation.batches import measuring, seeded_generator
from fastvae.models import VAE
from fastvae.reference.precision import in_precision
from fastvae.training.data import Batch


@measuring
def evaluate_batches(model: VAE, batches: Iterable[Batch], *, beta: float | Tensor = 1.0) -> Evaluation:
    """`fastvae.evaluation.evaluate` on batches on the model's device. Raises ``ValueError`` if there are none."""
    generator, likelihood = seeded_generator(model), model.likelihood
    losses, errors = [], []
    for batch in batches:
        given = {} if batch.condition is None else {"condition": batch.condition}
        moments = model.encode(batch.input, **given)
        z, kl = F.gaussian_sample_kl_packed(moments, generator=generator)
        values = F.negative_log_likelihood(model.decode(z, **given), batch.target, likelihood, reduction="none")
        losses.append(likelihood.reconstruction_weight * values + beta * kl)
        shown = model.decode(moments.chunk(2, 1)[0], **given)
        *parameters, target = in_precision(shown, batch.target, likelihood)
        errors.append((likelihood.mean(*parameters) - target).square().flatten(1).mean(1))
    if not losses:
        raise ValueError("test_data must give at least one batch, got none")
    loss, mse = torch.stack([torch.cat(losses).mean(), torch.cat(errors).mean()]).tolist()
    return Evaluation(loss, mse)
