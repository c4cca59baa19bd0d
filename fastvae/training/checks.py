"""What `train` is called with: what cannot be, and what is most likely meant otherwise."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from numbers import Integral, Real

import torch
from torch import Tensor, nn

from fastvae.likelihoods import Likelihood
from fastvae.models import VAE


def check_model(model: object) -> None:
    """Raises ``TypeError`` unless it is a `VAE`, compiled or not, and ``ValueError`` if it has nothing to train."""
    if not isinstance(getattr(model, "_orig_mod", model), VAE):
        raise TypeError(f"model must be a fastvae.models.VAE, got {_kind(model)}")
    assert isinstance(model, nn.Module)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("model must have a parameter that requires a gradient, got none")


def check_images(name: str, images: object, model: nn.Module) -> None:
    """Raises ``TypeError`` or ``ValueError`` unless they are images that the model can take."""
    if not isinstance(images, Tensor):
        raise TypeError(
            f"{name} must be a tensor [N, C, H, W] of all images, from which batches are made, got {_kind(images)}"
        )
    parameter = next(model.parameters())
    if images.dtype not in (torch.uint8, parameter.dtype):
        raise TypeError(
            f"{name} must be uint8 (read as x / 255) or of the model's dtype, {parameter.dtype}, got {images.dtype}"
        )
    if images.ndim != 4:
        raise ValueError(f"{name} must have shape [N, C, H, W], got {list(images.shape)}")
    if images.device != parameter.device and images.device.type != "cpu":
        raise ValueError(f"{name} must be on the model's device, {parameter.device}, or the CPU, got {images.device}")
    if len(images) == 0:
        raise ValueError(f"{name} must hold at least one image, got none")


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


def integer(name: str, value: object, low: int, high: int | None = None, what: str = "") -> int:
    """The value, from `low` to `high`; raises ``TypeError`` or ``ValueError``."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    converted = int(value)
    if converted < low or (high is not None and converted > high):
        expected = f"at least {low}" if high is None else f"{low} to {high}"
        raise ValueError(f"{name} must be {expected}{what}, got {value}")
    return converted


def number(name: str, value: object, expected: str, fits: Callable[[float], bool]) -> float:
    """The value as a float; raises ``TypeError`` or ``ValueError`` unless it `fits`, which is what is `expected`."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        converted = float(value)
    except OverflowError:
        converted = math.inf
    if not fits(converted):
        raise ValueError(f"{name} must be {expected}, got {value if math.isfinite(converted) else converted}")
    return converted


def positive(value: float) -> bool:
    return 0 < value < math.inf


def not_negative(value: float) -> bool:
    return 0 <= value < math.inf


def _kind(value: object) -> str:
    kind = type(value)
    return "None" if value is None else f"{kind.__module__}.{kind.__qualname__}"
