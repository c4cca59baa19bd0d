"""What `train` is called with: what cannot be, and what is most likely meant otherwise."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastvae.evaluation import Batch
from fastvae.likelihoods import Likelihood
from fastvae.models import VAE
from fastvae.training.data import tensors
from fastvae.training.listener import Listener
from fastvae.training.settings import COMPARING, Training
from fastvae.training.state import TrainingState


def check_model(model: object) -> None:
    """Raises ``TypeError`` unless it is a `VAE`, compiled or not, and ``ValueError`` if it has nothing to train."""
    if not isinstance(getattr(model, "_orig_mod", model), VAE):
        raise TypeError(f"model must be a fastvae.models.VAE, got {_kind(model)}")
    assert isinstance(model, nn.Module)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("model must have a parameter that requires a gradient, got none")


def check_objective(
    settings: Training, model: VAE, size: int | None, batch_size: int | None, *, together: bool
) -> None:
    """Raises ``ValueError`` where the objective does not go with the model's prior, the data, of which there are `size`
    where that is known, or processes that train together.
    """
    objective = settings.objective
    if getattr(model, "_orig_mod", model).prior is not None:
        if settings.free_bits:
            raise ValueError(f"free_bits must be 0 where the model has a prior of its own, got {settings.free_bits}")
        if objective in COMPARING:
            raise ValueError(
                'objective must be "elbo", "iwae" or "dreg" where the model has a prior of its own, because '
                f"{objective} trains none"
            )
    if objective == "beta-tc" and size is None:
        raise ValueError("objective beta-tc needs the number of training samples, which a stream does not tell")
    if objective in COMPARING and batch_size == 1:
        raise ValueError(f"batch_size must be at least 2 for the objective {objective}, which compares samples, got 1")
    if together and objective != "elbo":
        raise ValueError(
            f'objective must be "elbo" where several processes train, got "{objective}"'
            + (", which is of a whole batch" if objective in COMPARING else "")
        )


def look_at(name: str, samples: Batch, *, model: VAE, first: bool) -> None:
    """Look at samples before the model does. Raises ``TypeError`` or ``ValueError`` for what it cannot take; the first
    process warns of targets that its likelihood does not have.
    """
    parameter = next(model.parameters())
    if samples.input.dtype not in (torch.uint8, parameter.dtype):
        raise TypeError(
            f"{name} must be uint8 (read as x / 255) or of the model's dtype, {parameter.dtype}, "
            f"got {samples.input.dtype}"
        )
    if samples.input.ndim < 2:
        raise ValueError(f"{name} must have shape [N, ...], got {list(samples.input.shape)}")
    devices = {part.device for part in tensors(samples)}
    if len(devices) > 1 or devices - {parameter.device, torch.device("cpu")}:
        found = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"{name} must be on the model's device, {parameter.device}, or the CPU, got {found}")
    if first:
        warn_of_values(name, samples.target, model.likelihood)


def check_arguments(settings: object, listeners: object, resume: object) -> None:
    """Raises ``TypeError`` unless they are what `train` takes by these names."""
    if not isinstance(settings, Training):
        raise TypeError(f"settings must be a fastvae.training.Training, got {_kind(settings)}")
    if not isinstance(listeners, Sequence):
        raise TypeError(f"listeners must be a sequence of fastvae.training.Listener, got {_kind(listeners)}")
    for listener in listeners:
        if not isinstance(listener, Listener):
            raise TypeError(f"listeners must be objects of fastvae.training.Listener, got {_kind(listener)}")
    if resume is not None and not isinstance(resume, TrainingState):
        raise TypeError(f"resume must be a TrainingState, of a listener or a Checkpoint, got {_kind(resume)}")


def warn_of_values(name: str, images: Tensor, likelihood: Likelihood) -> None:
    """Warn of values that the likelihood's target does not have. They are looked at on their device, and read once."""
    if not images.is_floating_point():
        return
    # In parts: of images that do not lie in memory one after the other, aminmax makes a copy.
    bounds = torch.stack([torch.stack(part.aminmax()) for part in torch.split(images, 1024)])
    low, high = torch.stack([bounds[:, 0].min(), bounds[:, 1].max()]).tolist()
    bounded = likelihood.target == "unit" and likelihood.bounded
    if math.isnan(low):
        expected = "values from 0 to 1" if bounded else "numbers"
        warnings.warn(f"{name} hold NaN, expected {expected}", stacklevel=3)
    elif bounded and (low < 0 or high > 1):
        warnings.warn(
            f"{name} hold values from {low:g} to {high:g}, expected 0 to 1, the targets of {likelihood}",
            stacklevel=3,
        )


def warn_of_warmup(kl_warmup: float, epochs: int) -> None:
    """Warn where the divergence never has its weight."""
    if kl_warmup > epochs:
        warnings.warn(
            f"kl_warmup is {kl_warmup:g} epochs, of {epochs}: the weight of the divergence ends below "
            f"{epochs / kl_warmup:.3g} beta",
            stacklevel=3,
        )


def _kind(value: object) -> str:
    kind = type(value)
    return "None" if value is None else f"{kind.__module__}.{kind.__qualname__}"
