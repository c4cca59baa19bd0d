"""A model as what a file can hold, the name of its class, settings and tensors, and the way back."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastvae.models.conv_vae import ConvVAE
from fastvae.models.tabular_vae import TabularVAE
from fastvae.models.vae import VAE

# Those that a file alone gives back, by the names in files.
BUILT: dict[str, type[VAE]] = {"fastvae.models.ConvVAE": ConvVAE, "fastvae.models.TabularVAE": TabularVAE}


class Stored(NamedTuple):
    """model: the name of its class. settings: the arguments that build it, None where it does not offer them.
    likelihood: its key. tensors: its state_dict, contiguous and on the CPU.
    """

    model: str
    settings: dict[str, Any] | None
    likelihood: str
    tensors: dict[str, Tensor]


def stored(model: VAE) -> Stored:
    """What a file holds of a model, compiled or not.

    The settings are those of the model's attribute ``settings``, a dict, if it has one: the arguments that its class is
    called with.

    Raises ``TypeError`` for what is no VAE, and for settings that are not made of what JSON holds; ``ValueError`` for a
    ConvVAE that its settings do not build, because a layer was replaced, added or removed, or because its likelihood's
    key does not give the likelihood back: it would come back as another one.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, VAE):
        raise TypeError(f"model must be a fastvae.models.VAE, got {_name(type(model))}")
    settings = getattr(model, "settings", None)
    name = next((name for name, kind in BUILT.items() if kind is type(model)), _name(type(model)))
    if name in BUILT:
        _check_built(model, _built(name, settings))
    elif settings is not None:
        _check_settings(settings)
    tensors = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    return Stored(name, settings, model.likelihood.key, tensors)


def restored(held: Stored, model: VAE | type[VAE] | None = None) -> VAE:
    """The model, on the CPU, with the dtypes of the tensors, which are copied.

    model: of a class that is not fastvae's, that class, which is called with the settings; or a model whose copy gets
    the tensors. Settings without a likelihood are of before there was a choice, and mean `SigmoidMSE`.

    Raises errors of many kinds; `fastvae.likelihoods.NotImported` if the likelihood's module is to be imported first.
    """
    if any(value.is_meta for value in held.tensors.values()):
        raise ValueError("it has tensors without values")
    if model is None:
        if held.model not in BUILT:
            raise ModelNeeded(
                f"it holds a model of the class {held.model}, which no file builds: give a model of that class, or the "
                "class, as in fastvae.load(path, model)"
            )
        built = _built(held.model, held.settings)
        # Copies: tensors of a file may share memory, and a mapped one changes when its file is written to.
        tensors = {name: value.clone(memory_format=torch.contiguous_format) for name, value in held.tensors.items()}
        built.load_state_dict(tensors, assign=True)
        return built
    if isinstance(model, type):
        if held.settings is None:
            raise ModelNeeded(f"it holds no settings of {held.model}: give a model in place of its class")
        with torch.random.fork_rng(devices=[]):  # the weights that are drawn are thrown away
            model = model(**held.settings)
    own = copy.deepcopy(getattr(model, "_orig_mod", model)).cpu()
    if _without_module(own.likelihood.key) != _without_module(held.likelihood):
        raise ValueError(f"it holds a model with the likelihood {held.likelihood}, got one with {own.likelihood}")
    for name, value in own.state_dict(keep_vars=True).items():
        if name in held.tensors and value.is_floating_point():
            value.data = value.data.to(held.tensors[name].dtype)
    own.load_state_dict(held.tensors)  # not assigned, so that parameters that are shared stay shared
    return own


class ModelNeeded(ValueError):
    """A file alone does not give the model back."""


def _check_built(model: VAE, built: VAE) -> None:
    if built.likelihood != model.likelihood:
        raise ValueError(
            f"model must have the likelihood that its key gives, {built.likelihood}, got {model.likelihood}"
        )
    expected, found = _layers(built), _layers(model)
    if found != expected:
        wanted, got = next(pair for pair in zip_longest(expected, found) if pair[0] != pair[1])
        raise ValueError(
            f"model must have the layers that its settings make, {wanted or 'no more'}, got {got or 'no more'}"
        )


def _check_settings(settings: object) -> None:
    try:
        if not isinstance(settings, Mapping):
            raise TypeError(f"they are a {type(settings).__name__}")
        json.dumps(dict(settings))
    except (TypeError, ValueError) as error:
        raise TypeError(
            "model.settings must be a dict of numbers, texts, booleans, None, and lists or dicts of them, because "
            f"files hold no objects (a likelihood's key is a text): {error}"
        ) from error


def _built(name: str, settings: Mapping[str, Any] | None) -> VAE:
    with torch.device("meta"):  # no weights are drawn that would be thrown away
        return BUILT[name](**settings or {})


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


def _without_module(key: str) -> str:
    """A class that a script defines is in __main__ there, and elsewhere in the script's module."""
    return key.partition(":")[2]
