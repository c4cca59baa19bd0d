"""A `ConvVAE` as what a file can hold, settings and tensors, and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from fastvae.models.conv_vae import ConvVAE


def stored(model: ConvVAE) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The settings of a model, and its state_dict as contiguous tensors on the CPU.

    Raises ``TypeError`` for another class, and ``ValueError`` for a model that its settings do not build, because a
    layer was replaced, added or removed, or because its likelihood's key does not give the likelihood back: it would
    come back as another one.
    """
    if type(model) is not ConvVAE:
        raise TypeError(f"model must be a fastvae.models.ConvVAE, which settings can build, got {_name(type(model))}")
    likelihood = _built(model.settings).likelihood
    if likelihood != model.likelihood:
        raise ValueError(f"model must have the likelihood that its key gives, {likelihood}, got {model.likelihood}")
    built, found = _layers(_built(model.settings)), _layers(model)
    if found != built:
        expected, got = next(pair for pair in zip_longest(built, found) if pair[0] != pair[1])
        raise ValueError(
            f"model must have the layers that its settings make, {expected or 'no more'}, got {got or 'no more'}"
        )
    return model.settings, {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}


def restored(settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ConvVAE:
    """The model, on the CPU, with the dtypes of the tensors, which are copied.

    Settings without a likelihood are of before there was a choice, and mean `SigmoidMSE`. Raises errors of many kinds;
    `fastvae.likelihoods.NotImported` if the likelihood's module is to be imported first.
    """
    model = _built(settings)
    if any(value.is_meta for value in tensors.values()):
        raise ValueError("it has tensors without values")
    # Copies: tensors of a file may share memory, and a mapped one changes when its file is written to.
    model.load_state_dict(
        {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}, assign=True
    )
    return model


def _built(settings: Mapping[str, Any]) -> ConvVAE:
    with torch.device("meta"):  # no weights are drawn that would be thrown away
        return ConvVAE(**settings)


def _layers(model: nn.Module) -> list[str]:
    """Of each module in order: its name, class, arguments, and the shapes of its own tensors."""
    layers = []
    for name, module in model.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        shapes = ", ".join(f"{tensor} {list(value.shape)}" for tensor, value in own)
        layers.append(f"{name or 'model'}: {_name(type(module))}({module.extra_repr()}) {shapes}".rstrip())
    return layers


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
