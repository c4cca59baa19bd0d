"""An entry of the list of operations."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from fastvae.likelihoods import Likelihood

Call = Callable[..., Any]
REDUCTIONS = ("none", "batchmean", "sum", "mean")


@dataclass(frozen=True)
class Spec:
    """The tensors on which an operation is tried."""

    shape: tuple[int, ...]  # of z, or of the target, or as `Operation.elements` reads it
    dtype: torch.dtype = torch.float32
    target_dtype: torch.dtype | None = None  # dtype, unless given
    layout: Callable[[Tensor], Tensor] = Tensor.contiguous  # of every tensor but kl
    device: torch.device | str = "cpu"
    seed: int = 0


@dataclass(frozen=True)
class Operation:
    """A public function, and how the tests call it: its arguments, its options, and the arguments that get gradients.

    `forward` and `backward` name the tensors of the event's size that are read and written: "mu + logvar -> z". An
    operation may move the bytes of these tensors and no others. A gradient is named after its tensor: "z_grad".
    """

    name: str  # the function's name, and what is particular about this entry
    function: str  # of fastvae.functional
    arguments: tuple[str, ...]  # the tensors
    gradients: tuple[str, ...]  # of these arguments
    outputs: tuple[str, ...]  # what the function returns, flattened
    roots: int  # a training step differentiates so many of the outputs, the first ones
    forward: str
    backward: str | None  # None: the gradients are among the outputs
    kernels: Mapping[str, tuple[str, ...]]  # "forward", "backward": in order, "module.kernel" of fastvae.kernels
    roundings: Mapping[str, int]  # of each output and gradient, without the levels of sums: the kernels' docstrings
    launches: Mapping[str, int]  # "forward", "backward": Triton launches and operations of torch
    options: Mapping[str, Any] = field(default_factory=dict)  # what the function is called with
    reductions: tuple[str, ...] = ()  # that the function takes with these options
    call: Call = lambda function, *tensors, **options: function(*tensors, **options)
    draws_noise: bool = False  # where no `eps` is given
    likelihood: Likelihood | None = None
    computes: str | None = None  # the text of its row in the documentation; None: it has no row
    measured: bool = True  # by the benchmarks
    smaller: Mapping[str, str] = field(default_factory=dict)  # parameters with one number per "column" or "channel"
    long_rows: bool = False  # a shape is that of the logits, of which no program can hold those along dimension 1

    def __call__(self, library: Any, *tensors: Tensor, **options: Any) -> tuple[Tensor, ...]:
        """The outputs. `library` has the function: it is fastvae.functional, or a module with the same names."""
        return flattened(self.call(getattr(library, self.function), *tensors, **{**self.options, **options}))

    def inputs(self, spec: Spec) -> tuple[Tensor, ...]:
        """The arguments. Those named in `gradients` require grad."""
        generator = torch.Generator().manual_seed(spec.seed)
        drawn: dict[str, Tensor] = {}
        if self.likelihood:
            names = (*self.likelihood.parameters, "target")
            # There is one number of each column or channel also where there are no elements.
            shape = tuple(max(1, size) for size in spec.shape) if self.smaller else self.elements(spec.shape)
            drawn = dict(zip(names, self.likelihood.draw(shape, generator), strict=True))
            if self.long_rows:  # of independent numbers, in any order
                count = prod(spec.shape)
                drawn = {name: values.flatten()[:count].view(spec.shape) for name, values in drawn.items()}
        tensors = []
        for name in self.arguments:
            if name in ("moments", "prior"):
                halves = [_draw(half, spec.shape, generator) for half in ("mu", "logvar")]
                tensor = spec.layout(torch.cat(halves, 1).to(spec.device, spec.dtype))
            elif name == "kl":
                tensor = torch.logspace(-2, 2, spec.shape[0], device=spec.device)
            else:
                dtype = spec.target_dtype if name == "target" and spec.target_dtype else spec.dtype
                values = drawn[name] if name in drawn else _draw(name, spec.shape, generator)
                if name in self.smaller:
                    tensor = _one_of_each(self.smaller[name], values, spec.shape).to(spec.device, dtype).contiguous()
                    tensors.append(tensor.requires_grad_(name in self.gradients))
                    continue
                if self.smaller:
                    values = values[tuple(map(slice, spec.shape))]
                if dtype is torch.uint8:
                    values = values.clamp(0, 255) if self.target_kind == "number" else (255 * values).round()
                tensor = spec.layout(values.to(spec.device, dtype))
            tensors.append(tensor.requires_grad_(name in self.gradients and tensor.is_floating_point()))
        return tuple(tensors)

    def elements(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the elements that have a value of the formula, for the shape of a `Spec`. If an element has an
        axis of its own, this axis replaces the channels of images.
        """
        if self.long_rows:
            assert self.likelihood is not None
            return (-(-prod(shape) // self.likelihood.draw((1,))[0].numel()),)  # whose numbers fill those rows
        grouped = self.likelihood is not None and self.likelihood.grouped
        return (shape[0], *shape[2:]) if grouped and len(shape) == 4 else shape

    def shape_of_z(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """And so of the noise, given the shape of a `Spec`."""
        samples = self.options.get("samples")
        return shape if samples is None else (samples, *shape)

    @property
    def target_kind(self) -> str | None:
        return self.likelihood.target if self.likelihood else None

    @property
    def directions(self) -> tuple[str, ...]:
        return ("forward",) if self.backward is None else ("forward", "backward")

    def formula(self, direction: str) -> str:
        formula = self.forward if direction == "forward" else self.backward
        assert formula is not None, f"{self.name} has no backward pass"
        return formula

    def tensors_moved(self, direction: str) -> tuple[list[str], list[str]]:
        """The names of the tensors of the event's size: those that the operation reads, and those that it writes."""
        read, written = self.formula(direction).split("->")
        return re.findall(r"\w+", read), re.findall(r"\w+", written)

    def bytes_per_element(
        self, direction: str, dtype: torch.dtype = torch.float32, target_dtype: torch.dtype | None = None
    ) -> tuple[int, int]:
        """The bytes read and written per element of z or of the likelihood."""
        numbers = self.numbers_of_an_element

        def size(names: list[str]) -> int:
            of_target = (target_dtype or dtype).itemsize
            sizes = [of_target if name.startswith("target") else dtype.itemsize for name in names]
            return sum(
                size * numbers.get(name.removesuffix("_grad"), 1) for size, name in zip(sizes, names, strict=True)
            )

        read, written = self.tensors_moved(direction)
        return size(read), size(written)

    @property
    def numbers_of_an_element(self) -> dict[str, int]:
        """How many numbers of each tensor belong to an element that has an axis of its own."""
        if self.likelihood is None or not self.likelihood.grouped or self.long_rows:
            return {}
        names = (*self.likelihood.parameters, "target")
        return {name: of_one.numel() for name, of_one in zip(names, self.likelihood.draw((1,)), strict=True)}


def _one_of_each(kind: str, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A smaller parameter [columns] or [channels, 1, ...] for a target of that shape, of numbers drawn for every
    element.
    """
    if kind == "column":
        return values[(0,) * (values.ndim - 1)][: shape[-1]]
    first = values[0, : shape[1]]
    for dim in range(1, first.ndim):
        first = first.narrow(dim, 0, 1)
    return first


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    normal = torch.randn(shape, generator=generator)
    return 0.7 * normal - 0.5 if name.endswith("logvar") else normal


def flattened(result: Any) -> tuple[Tensor, ...]:
    """The tensors of a result, which is a tensor or a nested tuple of tensors."""
    if isinstance(result, Tensor):
        return (result,)
    tensors: list[Tensor] = []
    for part in result:
        tensors += flattened(part)
    return tuple(tensors)
