"""What a likelihood is: settings, parameters, a formula in plain PyTorch, and the same formula as a Triton function."""

from __future__ import annotations

import ast
import importlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache, cached_property
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

TARGETS = ("unit", "number", "class")


class Grouping(NamedTuple):
    """Where the parameters and the target of a `Likelihood.grouped` have the axis that belongs to one element."""

    axis: int  # a dimension of the parameters
    target_axis: int | None  # one of the target; None where it has a number less
    size: int  # that many numbers along the axis are of one kind, such as the means of a mixture's components


class Term:
    """Decorates the Triton function of a likelihood.

    `triton.jit` is applied when a kernel first uses the function, so defining a likelihood imports no Triton. At that
    time `triton.language` is put into the function's module as ``tl``, together with ``numerics``, ``special`` and
    ``counts`` of `fastvae.kernels`. A term may call another term that is imported into its module.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        raise TypeError("a term is called by kernels and by other terms, not from Python")

    @cached_property
    def jit(self) -> Any:
        import triton
        import triton.language as tl

        from fastvae.kernels import counts, numerics, special

        names = self.function.__globals__
        names.update(tl=tl, numerics=numerics, special=special, counts=counts)
        for name in self.function.__code__.co_names:
            if isinstance(called := names.get(name), Term):
                names[name] = called.jit
        return triton.jit(self.function)


@dataclass(frozen=True)
class Likelihood:
    """The negative log-likelihood of independent elements. The first parameter has the target's shape. The others may
    have any shape that can be broadcast to it.

    A subclass is a frozen dataclass whose fields are its settings: numbers, strings, booleans, None, or tuples of them.
    It defines the attributes below; those with a default are optional. An attribute that depends on the settings is a
    property. `fastvae.likelihoods.check` compares the term with the formula.
    """

    parameters: ClassVar[tuple[str, ...]]
    """The names of the parameters, in the order in which they are given."""
    target: ClassVar[str]
    """The kind of numbers in a target. "unit": numbers in [0, 1]; uint8 is read as t / 255. "number": any numbers.
    "class": class numbers, int64 or uint8, if the target lacks the axis of `grouping`, else any numbers.
    """
    bounded: ClassVar[bool] = True
    """Whether a "unit" target must lie in [0, 1]. If not, floats may be any numbers, and bytes are read as t / 255."""
    counts: ClassVar[bool] = False
    """Whether a "number" target holds counts, whole numbers from 0 on. Only `fastvae.likelihoods.validate` uses it."""
    reads_bytes: ClassVar[bool] = True
    """Whether a target may be uint8."""
    roundings: ClassVar[tuple[int, ...]]
    """The numbers of roundings, relative errors of 2^-24, along the term's longest chain of operations: for the value,
    for each parameter's slope, and for the target's slope if it has one. Count one for an operation, two for
    `numerics.reciprocal`, three for `log1p`, four for `exp`, eight for `sigmoid`. For a product add the roundings of
    both factors, for a sum those of the summand that has more. Do not count earlier roundings of an input, because the
    bound has a part for each input. (A target of bytes has two roundings.)
    """
    formula: ClassVar[Callable[..., Tensor]]
    """``def formula(self, *parameters, target)``: each element's negative log-likelihood in nats, in plain PyTorch.

    It is the specification. It runs without a GPU, the term is compared with it, and torch differentiates it for
    gradients of higher order. Write it in a form that is stable in float32.
    """
    target_has_slope: ClassVar[bool] = False
    """Whether the term returns the target's slope too. Without it, a call whose target requires grad uses the formula,
    because no kernel computes that gradient.
    """
    slope_factor: ClassVar[float] = 1.0
    """A constant factor that the term leaves out of every slope, because the kernel multiplies slopes anyway."""
    reconstruction_weight: ClassVar[float] = 1.0
    """The default weight of the value in the evidence lower bound."""
    omitted: ClassVar[float] = 0.0
    """The nats per element that the formula leaves out of the negative log-likelihood. `fastvae.evaluation.elbo` and
    `log_likelihood` add them: -log p(target | parameters) = reconstruction_weight * value + omitted, for each element.
    """
    heavy: ClassVar[bool] = False
    """Whether the term takes hundreds of instructions. A thread then computes 4 elements at a time instead of 16,
    because 16 would not fit into its registers.
    """
    term: ClassVar[Term | None] = None
    """``@Term def term(parameters, target, SETTINGS: tl.constexpr, FAST: tl.constexpr)`` returns (value, slopes) of a
    tile, in float32. ``parameters`` is a tuple of tiles, and ``SETTINGS`` is `settings`. Pass ``FAST`` on to
    `numerics`. slopes is a tuple with the slope of each parameter and then that of the target. Without a term the
    formula runs on every device.
    """

    grouped: ClassVar[bool] = False
    """Whether an element has an axis of its own in the parameters, such as the classes of a pixel; see `grouping`."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ("parameters", "target", "roundings", "formula"):
            if not hasattr(cls, name):
                raise TypeError(f"{cls.__name__} must define {name}, as fastvae.likelihoods.Likelihood describes it")
        _check_description(cls.__name__, cls)

    def __post_init__(self) -> None:
        """Checks what are properties. A subclass that checks its settings here calls it at the end."""
        _check_description(type(self).__name__, self)

    def grouping(self, parameters: torch.Size, target: torch.Size) -> Grouping:
        """The position of an element's axis in tensors of these shapes, for a `grouped` likelihood.

        The formula returns a value for each element, in the parameters' shape with size 1 along the axis. The term is
        ``def term(slots, targets, place, SIZE: tl.constexpr, SETTINGS: tl.constexpr, FAST: tl.constexpr)``. A slot is a
        tile [elements, power of 2] of `Grouping.size` = SIZE neighbours along the axis. It is 0 where place >= SIZE.
        targets is one such tile if the target has the parameters' axis, else a tile [elements, 1] for each number along
        the target's axis. The term returns a value [elements, 1] and the slopes of each slot.

        Raises ``ValueError`` for shapes that do not match.
        """
        raise NotImplementedError(f"{type(self).__name__} must define grouping(parameters, target)")

    def inner_factors(self, parameters: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        """Further arguments of a `grouped` likelihood's formula, all of them ones, with the parameters' layout. The
        formula multiplies certain intermediate results by them: those whose rounding error has no equal among the
        errors of the inputs. The error bound then has a part for each.
        """
        return ()

    def output_channels(self, channels: int) -> int:
        """The number of channels that a decoder returns for images with this number of channels: those of each
        parameter, one after the other.

        Raises ``ValueError`` for images that the likelihood does not support.
        """
        return len(self.parameters) * channels

    def slopes(self, *parameters_and_target: Any, **_: Any) -> tuple[Tensor, ...]:
        """The derivative of each element's value by each parameter, in plain PyTorch. By default torch derives it from
        `formula`.

        Override it if that is slow or inaccurate. The derivative has the target's shape even if the parameter is
        smaller, because the caller multiplies each element by its weight and then sums.
        """
        *parameters, target = parameters_and_target
        parameters = [parameter.expand_as(parameters[0]) for parameter in parameters]
        transformed: Any = torch.func.vjp(lambda *given: self.formula(*given, target), *parameters)
        value, backward = transformed
        return tuple(backward(torch.ones_like(value)))

    def draw(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """Random parameters and a target of this shape, float32 on the CPU. `check` compares term and formula at them.

        Override it if a parameter has a limited range, such as a rate, which is positive.
        """
        parameters = [3 * torch.randn(shape, generator=generator) for _ in self.parameters]
        draw = torch.rand if self.target == "unit" else torch.randn
        return *parameters, draw(shape, generator=generator)

    def mean(self, *parameters: Any, **_: Any) -> Tensor:
        """The mean of the target for these parameters, for pictures of reconstructions and samples."""
        raise NotImplementedError(f"{type(self).__name__} must define mean({', '.join(self.parameters)})")

    @property
    def complete(self) -> Likelihood:
        """The same likelihood with the parts that depend on the target, such as log t!, which `omitted` cannot express
        as a number. `fastvae.evaluation.elbo` and `log_likelihood` compute this one.
        """
        return self

    @property
    def settings(self) -> tuple[Any, ...]:
        """The numbers that the term gets as ``SETTINGS``: the values of the fields. An override may return numbers
        computed from them.
        """
        return self._values

    @property
    def key(self) -> str:
        """A string from which `from_key` builds an equal likelihood, because registered operations and files can only
        hold strings.
        """
        named = zip(fields(self), self._values, strict=True)
        settings = ", ".join(f"{field.name}={_literal(value)}" for field, value in named)
        return f"{type(self).__module__}:{type(self).__qualname__}({settings})"

    @property
    def _values(self) -> tuple[Any, ...]:
        """The values of the fields.

        Raises ``TypeError`` for a value of another type than those above, and for a field that equality leaves out,
        because what is compiled is kept for equal likelihoods.
        """
        values = []
        for field in fields(self):
            value = getattr(self, field.name)
            if not _is_setting(value):
                raise TypeError(
                    f"{type(self).__name__}.{field.name} must be a number, a text, a boolean, None, or a tuple of "
                    f"them, because the term is compiled for it, got {type(value).__name__}: {value!r}"
                )
            if not field.compare:
                raise TypeError(f"{type(self).__name__}.{field.name} must not be a field with compare=False")
            values.append(value)
        return tuple(values)


def _check_description(name: str, described: Any) -> None:
    """Of a class, or of an instance, where the properties of the class have values."""
    parameters, target, term = described.parameters, described.target, described.term
    if not isinstance(parameters, property) and (
        not parameters or isinstance(parameters, str) or not all(name.isidentifier() for name in parameters)
    ):
        raise TypeError(f"{name}.parameters must be a tuple of names, got {parameters!r}")
    if not isinstance(target, property) and target not in TARGETS:
        raise TypeError(f"{name}.target must be one of {', '.join(TARGETS)}, got {target!r}")
    if not (term is None or isinstance(term, (property, Term))):
        raise TypeError(f"{name}.term must be decorated with @fastvae.likelihoods.Term, got {term!r}")
    if isinstance(parameters, property) or isinstance(described.roundings, property):
        return
    slopes = len(parameters) + described.target_has_slope
    if len(described.roundings) != 1 + slopes:
        raise TypeError(
            f"{name}.roundings must have {1 + slopes} numbers, of the value and of {slopes} slopes, "
            f"got {described.roundings!r}"
        )


def check_scale(name: str, value: Any) -> None:
    """Check a setting that is the width of a distribution, or None if the width is a parameter."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, or None where it is learned, got {value!r}")
    if not 1e-18 <= value <= 1e18:  # of which the inverse of the square is a number in float32 too
        raise ValueError(f"{name} must be positive and finite, from 1e-18 to 1e18, got {value}")


def check_minimum(name: str, value: Any, fixed: bool = False) -> None:
    """Check the least value of a learned parameter, or None. ``fixed``: the parameter is not learned."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number or None, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite or None, got {value}")
    if fixed:
        raise ValueError(f"{name} must be None where the width is given, because nothing is learned, got {value}")


def _is_setting(value: Any) -> bool:
    if type(value) is tuple:
        return all(_is_setting(part) for part in value)
    # Not their subclasses, like numpy's float64, whose texts are no literals.
    return type(value) in (bool, int, float, str, type(None))


def _literal(value: Any) -> str:
    """The text of a setting, as Python reads it: of an infinity a number beyond all floats, because `inf` is a name."""
    if type(value) is tuple:
        parts = ", ".join(map(_literal, value))
        return f"({parts},)" if len(value) == 1 else f"({parts})"
    if type(value) is float and math.isinf(value):
        return "1e999" if value > 0 else "-1e999"
    return repr(value)


class NotImported(ValueError):
    """A key names a module that is not imported yet. A string from a file must not import modules."""


def from_key(key: str) -> Likelihood:
    """The likelihood whose `key` this is.

    Keys are stored in files. Therefore nothing in the string is executed, and only modules of `fastvae.likelihoods` are
    imported. Import the module of your own likelihood first.

    Raises `NotImported`, a ``ValueError``, if the module is not imported, and ``ValueError`` if the string names no
    likelihood.
    """
    try:
        module, name, _ = _parsed(key)
        kind = vars(_imported(module, key)).get(name)
        if not (isinstance(kind, type) and issubclass(kind, Likelihood)):
            raise TypeError(f"{module} has no likelihood of the name {name!r}")
        return _made(kind, key)  # type: ignore[arg-type]  # mypy does not see that a class is hashable
    except NotImported:
        raise
    except (ImportError, SyntaxError, TypeError, ValueError) as error:
        raise ValueError(
            f"{key!r} names no likelihood: it must be module:Class(settings), with a class at the top level of a "
            f"module ({error})"
        ) from error


@cache
def _parsed(key: str) -> tuple[str, str, dict[str, Any]]:
    """Module, class and settings."""
    module, _, rest = key.partition(":")
    name, _, settings = rest.partition("(")
    call = ast.parse(f"settings({settings}", mode="eval").body
    if not isinstance(call, ast.Call) or call.args:
        raise ValueError("its settings must be name=value, ...")
    return module, name, {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}


@cache
def _made(kind: type[Likelihood], key: str) -> Likelihood:
    """One object for one class and key. Not for the key alone, because a notebook may define its class anew."""
    _, _, settings = _parsed(key)
    return kind(**settings)


def _imported(module: str, key: str) -> ModuleType:
    if module in sys.modules:
        return sys.modules[module]
    package = __name__.rpartition(".")[0]
    if not module.startswith(f"{package}."):
        raise NotImported(f"the likelihood {key} is defined in {module}, which is not imported: import {module} first")
    return importlib.import_module(module)
