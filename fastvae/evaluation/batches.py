"""Images in batches, and noise that is the same each time and leaves the random numbers of training where they were."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from fastvae.models import VAE

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

# Bounds the memory: of 512 images of 28x28, the largest activations (32 channels in float32) take 51 MB.
_PIXELS = 512 * 28 * 28


def batch_size(images: Tensor) -> int:
    """How many images [N, C, H, W] are looked at together: 512 of 28x28, fewer larger ones."""
    return max(1, min(512, _PIXELS // (images.shape[-2] * images.shape[-1])))


def batches(model: VAE, images: Tensor) -> Iterator[Tensor]:
    """All images, the last partial batch too, on the model's device. Raises ``ValueError`` if there are none."""
    if images.shape[0] == 0:
        raise ValueError(f"images must hold at least one image, got shape {list(images.shape)}")
    for batch in torch.split(images, batch_size(images)):
        yield batch.to(device_of(model))


def seeded_generator(model: VAE, seed: int = 0) -> torch.Generator:
    """A generator of its own, on the model's device."""
    return torch.Generator(device_of(model)).manual_seed(seed)


def device_of(model: VAE) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def evaluation_mode(model: VAE) -> Iterator[None]:
    """The model as in use: without Dropout, and with the statistics that BatchNorm has; afterwards each module is in
    the mode that it was in.
    """
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in in_training:
            module.training = True


def measuring(
    function: Callable[Concatenate[VAE, Parameters], Result],
) -> Callable[Concatenate[VAE, Parameters], Result]:
    """For functions of a model: without gradients, and in `evaluation_mode`."""

    @functools.wraps(function)
    def call(model: VAE, /, *arguments: Parameters.args, **named: Parameters.kwargs) -> Result:
        with torch.no_grad(), evaluation_mode(model):
            return function(model, *arguments, **named)

    return call
