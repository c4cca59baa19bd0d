"""Data in batches, and noise that is the same in each call and does not change the random numbers of training."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from fastvae.models import VAE
from fastvae.models.vae import given

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

# Bounds the memory: of 512 images of 28x28, the largest activations (32 channels in float32) take 51 MB.
_PIXELS = 512 * 28 * 28


class Batch(NamedTuple):
    """Samples [B, ...], or all of them [N, ...].

    input: read by the encoder. target: compared with the decoder's output; by default the input. condition: a further
    argument of encoder and decoder, or None.
    """

    input: Tensor
    target: Tensor
    condition: Tensor | None = None

    @property
    def given(self) -> dict[str, Tensor]:
        """The condition as an argument of the model's methods."""
        return given(self.condition)


def batch_size(data: Tensor) -> int:
    """The number of samples [N, ...] in a batch: 512 for images of 28x28, fewer for larger ones."""
    places = data.shape[2:] if data.ndim == 4 else data.shape[1:]  # an image's channels do not count
    return max(1, min(512, _PIXELS // max(1, math.prod(places))))


def batches(
    model: VAE, images: Tensor, target: Tensor | None = None, condition: Tensor | None = None
) -> Iterator[Batch]:
    """Batches of all samples [N, ...], with the last partial batch, on the model's device. Without a target the samples
    are the target.

    Raises ``ValueError`` if there are no samples, or if target or condition have another number of rows.
    """
    if images.shape[0] == 0:
        raise ValueError(f"images must hold at least one image, got shape {list(images.shape)}")
    for name, rows in (("target", target), ("condition", condition)):
        if rows is not None and len(rows) != len(images):
            raise ValueError(f"{name} must have a row for each of the {len(images)} samples, got {list(rows.shape)}")
    device, count = device_of(model), batch_size(images)
    for first in range(0, len(images), count):
        part = slice(first, first + count)
        inputs = images[part].to(device)
        yield Batch(
            inputs,
            inputs if target is None else target[part].to(device),
            None if condition is None else condition[part].to(device),
        )


def seeded_generator(model: VAE, seed: int = 0) -> torch.Generator:
    """A separate generator on the model's device."""
    return torch.Generator(device_of(model)).manual_seed(seed)


def device_of(model: VAE) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def evaluation_mode(model: VAE) -> Iterator[None]:
    """The model in evaluation mode: without Dropout, and with BatchNorm's stored statistics. Afterwards each module
    returns to its earlier mode.
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
    """Decorates a function of a model: it runs without gradients and in `evaluation_mode`."""

    @functools.wraps(function)
    def call(model: VAE, /, *arguments: Parameters.args, **named: Parameters.kwargs) -> Result:
        with torch.no_grad(), evaluation_mode(model):
            return function(model, *arguments, **named)

    return call
