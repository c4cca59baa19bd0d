"""Fused posteriors in the autoencoders of diffusers.

    from fastvae.integrations.diffusers import fuse, unfuse

    print(fuse(vae))  # an AutoencoderKL, for example
    posterior = vae.encode(images).latent_dist
    z, kl = posterior.sample(generator), posterior.kl()

`fuse` takes every autoencoder whose methods construct a DiagonalGaussianDistribution or an
OobleckDiagonalGaussianDistribution: AutoencoderKL, AutoencoderKLWan, AutoencoderKLCogVideoX, AutoencoderOobleck and
others, and subclasses of your own. The posteriors that this one autoencoder makes are then a `Posterior` or an
`OobleckPosterior`, which are subclasses of the library's classes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import CellType, CodeType, FunctionType
from typing import Any

from diffusers.models.autoencoders.autoencoder_oobleck import OobleckDiagonalGaussianDistribution
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import nn

from fastvae.integrations.diffusers_posterior import (
    FUSED,
    CorrectOobleckPosterior,
    CorrectPosterior,
    OobleckPosterior,
    Posterior,
)
from fastvae.integrations.fusion import Report, class_name, exchange, restore

__all__ = ["CorrectOobleckPosterior", "CorrectPosterior", "OobleckPosterior", "Posterior", "fuse", "unfuse"]

Texts = dict[str, str]


def fuse(vae: nn.Module, *, correct: bool = False) -> Report:
    """Let the posteriors that this autoencoder makes be fused.

    The methods of ``vae`` that construct a posterior of the library are exchanged for copies, in which the posterior's
    name stands for the fused class. All else is as the library has it. A copy sees the other globals of the library's
    module as they are at the time of this call.

    Args:
        vae: an autoencoder of diffusers; of a pipeline it is ``pipe.vae``.
        correct: give the right numbers where those of the library are wrong. The report's ``defects`` say where.

    Returns:
        What is fused, what stays the library's code and why, and which of its numbers are wrong.

    Raises:
        TypeError: no method of the class constructs such a posterior.
        ValueError: such a method was replaced on this object by other code.
    """
    methods: dict[str, _Method] = {}
    fused: Texts = {}
    kept: Texts = {}
    made: set[Any] = set()
    for name, owner in _constructing(type(vae)):
        value = vars(owner)[name]
        posteriors = _posteriors(value)
        names = ", ".join(sorted(posterior.__name__ for posterior in posteriors))
        if not posteriors:
            kept[name] = f"{owner.__name__} overrides it with code that constructs no posterior itself"
        elif not posteriors & FUSED.keys():
            kept[name] = f"it constructs a {names}, for which there are no fused operations here"
        elif not isinstance(value, FunctionType) or _copy(value, _classes(correct)) is None:
            kept[name] = f"it constructs a {names}, but is no plain method, or its decorator hides it"
        else:
            methods[name] = _Method(type(vae), name, correct)
            fused[name] = f"constructs a fused {names}"
            made |= posteriors & FUSED.keys()
    if not fused and not kept:
        raise TypeError(
            "vae must be an autoencoder of diffusers that makes a DiagonalGaussianDistribution, such as AutoencoderKL "
            f"(of a pipeline, pipe.vae), got {class_name(vae)}"
        )
    defects: Texts = {}
    for posterior in made:
        for entries, more in zip((fused, kept, defects), _TEXTS[posterior](correct), strict=True):
            entries.update({f"posterior.{name}": text for name, text in more.items()})
    return exchange(vae, Report(class_name(vae), fused, kept, defects, correct), methods)


def unfuse(vae: nn.Module) -> None:
    """Let the autoencoder make the library's posteriors again. Nothing happens if it is not fused."""
    restore(vae)


# --- what the report says of a posterior: fused, kept and defects -----------------------------------------------------

_SAMPLE = "one launch; where the moments need a gradient, it also computes what the next kl() returns"
_LAZY = "computed when they are first read"
_ON_CPU = "the library's formulas, because no kernel runs there"


def _texts(correct: bool) -> tuple[Texts, Texts, Texts]:
    fused = {
        "sample": _SAMPLE,
        "kl": "one launch, also kl(other)" + ("" if correct else "; a copy before it for latents of 5 dimensions"),
        "nll": "one launch and the clamp, summed over all dimensions but the batch",
        "logvar, std, var": _LAZY,
    }
    kept = {
        "sample, kl, nll on the CPU and in float64": _ON_CPU + (", with the right sums" if correct else ""),
        "kl(other) of another shape, nll over other dims": "the library's code",
        "deterministic": "the library's code: the posterior's std is 0",
    }
    if not correct:
        kept["kl, nll of latents [B, C, T]"] = "the library's error"
    defects = {
        "kl, nll of latents without 4 dimensions": "sums dimensions 1 to 3 only: [B, W] for videos [B, C, T, H, W], an "
        "IndexError for audio [B, C, T]",
        "kl, nll in float16": "exp(logvar) is infinite above a logvar of 11.09 and 0 below -17.33; a result above "
        "65504 is infinite",
    }
    return fused, kept, defects


def _texts_of_oobleck(correct: bool) -> tuple[Texts, Texts, Texts]:
    fused = {"sample": _SAMPLE, "kl": "one launch, and the multiplication of its result", "logvar, std, var": _LAZY}
    kept = {"sample, kl on the CPU and in float64": _ON_CPU + (", with the factor 1/2" if correct else "")}
    if correct:
        fused["kl(other)"] = "as kl, also on the CPU"
        kept["kl(other) of another shape"] = "the library's code and number"
    else:
        kept["kl(other)"] = "the library's code, because its number is no divergence"
    defects = {
        "kl": "it is twice the divergence, because the factor 1/2 is missing",
        "kl(other)": "log(var / other.var) has the wrong sign, besides",
    }
    return fused, kept, defects


_TEXTS = {DiagonalGaussianDistribution: _texts, OobleckDiagonalGaussianDistribution: _texts_of_oobleck}


# --- copies of methods ------------------------------------------------------------------------------------------------


class _Method:
    """A copy of a class's method that constructs fused posteriors. It is called with the object. It is pickled as the
    class and the name.
    """

    def __init__(self, cls: type, name: str, correct: bool) -> None:
        function = getattr(cls, name)
        self._of = cls, name, correct
        self._copy: Any = _copy(function, _classes(correct))
        functools.update_wrapper(self, function)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._copy(*arguments, **named)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Method, self._of


def _constructing(cls: type) -> Iterator[tuple[str, type]]:
    """The names under which the class or one of its bases has a function that constructs a posterior, and the first
    class that defines the name.
    """
    names = dict.fromkeys(name for base in cls.__mro__ for name, value in vars(base).items() if _posteriors(value))
    for name in names:
        yield name, next(base for base in cls.__mro__ if name in vars(base))


def _posteriors(value: Any) -> set[type]:
    """The classes of posteriors that the code of a function names, and that of the functions that it wraps."""
    value = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
    found = set()
    while isinstance(value, FunctionType):
        for name in _names(value.__code__):
            named = value.__globals__.get(name)
            if isinstance(named, type) and (
                issubclass(named, tuple(FUSED)) or named.__name__.endswith("DiagonalGaussianDistribution")
            ):
                found.add(named)
        value = getattr(value, "__wrapped__", None)
    return found


def _names(code: CodeType) -> Iterator[str]:
    """The names of globals and attributes in the code, and in the functions that it defines."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _classes(correct: bool) -> dict[Any, type]:
    """The fused class in the place of each of the library's."""
    return {posterior: corrected if correct else fused for posterior, (fused, corrected) in FUSED.items()}


def _copy(function: FunctionType, classes: dict[Any, type]) -> FunctionType | None:
    """The function with other classes in the place of those that its code, or that of the function that it wraps,
    names. None if it names none, or does not hold what it wraps in its closure.

    The copy's globals have no __name__, because torch.compile reads a global from the module of that name.
    """
    variables, cells = function.__globals__, function.__closure__
    named = {name: variables.get(name) for name in _names(function.__code__)}
    others = {name: classes[value] for name, value in named.items() if isinstance(value, type) and value in classes}
    if others:
        variables = {**variables, **others}
        variables.pop("__name__", None)
    wrapped = getattr(function, "__wrapped__", None)
    copy_of_wrapped = _copy(wrapped, classes) if isinstance(wrapped, FunctionType) else None
    holders = [cell for cell in cells or () if copy_of_wrapped is not None and cell.cell_contents is wrapped]
    if not others and not holders:
        return None
    cells = cells and tuple(CellType(copy_of_wrapped) if cell in holders else cell for cell in cells)
    copy = FunctionType(function.__code__, variables, function.__name__, function.__defaults__, cells)
    copy.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(copy, function)
    return copy
