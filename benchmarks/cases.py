"""The cases that are measured: the public operations at three sizes, forward, and forward with backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastvae.functional as F
import plain
from fastvae.operations import Spec, operations

# The same names twice: in plain PyTorch, and the public functions.
EAGER, FUSED = plain, F

# An upstream gradient that is not 1 is what a weighted loss or a loss scale gives.
OTHER_GRADIENT = 0.37


OPERATIONS = {operation.name: operation for operation in operations() if operation.measured}
GAUSSIAN = {name: it for name, it in OPERATIONS.items() if it.likelihood is None}
RECONSTRUCTION = {name: it for name, it in OPERATIONS.items() if it.likelihood and "kl" not in it.arguments}
ELBO = {name: it for name, it in OPERATIONS.items() if it.likelihood and "kl" in it.arguments}

# Shapes of moments and of images. "launch" is where a call costs what its launches cost; "bandwidth" has at least 64
# million elements on a GPU, and on a CPU what leaves its caches. "smoke" runs the code, and nothing is timed.
SHAPES: dict[str, dict[str, tuple[tuple[int, ...], tuple[int, ...]]]] = {
    "cuda": {
        "launch": ((128, 32), (128, 1, 28, 28)),
        "medium": ((64, 8, 64, 64), (16, 3, 256, 256)),
        "bandwidth": ((64, 8, 512, 512), (22, 3, 1024, 1024)),
    },
    "cpu": {
        "launch": ((128, 32), (128, 1, 28, 28)),
        "medium": ((64, 8, 64, 64), (16, 3, 256, 256)),
        "bandwidth": ((64, 8, 128, 128), (16, 3, 512, 512)),
    },
    "smoke": {
        "launch": ((4, 6), (4, 1, 5, 5)),
        "medium": ((4, 6, 5, 5), (4, 3, 6, 6)),
        "bandwidth": ((2, 4, 40, 40), (2, 3, 40, 40)),
    },
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Inputs(NamedTuple):
    """The arguments of a call, and the upstream gradients of what it returns."""

    tensors: tuple[Tensor, ...]
    upstream: tuple[Tensor, ...]

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return tuple(tensor for tensor in self.tensors if tensor.requires_grad)

    @property
    def bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)


@dataclass(frozen=True)
class Case:
    """One cell of the table: an operation, and on what. `sizes` is a key of `SHAPES`."""

    operation: str
    regime: str
    backward: bool
    dtype: str = "float32"
    channels_last: bool = False
    unit_gradient: bool = True
    sizes: str = "cuda"

    def __str__(self) -> str:
        parts = [self.operation, "forward+backward" if self.backward else "forward", self.regime, self.dtype]
        if self.channels_last:
            parts.append("channels_last")
        if not self.unit_gradient:
            parts.append("scaled")
        return "-".join(parts)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "shape": self.shape, "elements": self.elements}

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the first argument; moments are given as both halves."""
        moments, image = SHAPES[self.sizes][self.regime]
        if numbers := OPERATIONS[self.operation].numbers_of_an_element:
            # As many numbers as an image, or an image, if one has more.
            channels = next(iter(numbers.values()))
            return (max(1, image[0] * image[1] // channels), channels, *image[2:])
        return moments if self.operation in GAUSSIAN else image

    @property
    def elements(self) -> int:
        """Of z, or of the logits."""
        return prod(self.shape) // (2 if self.operation in GAUSSIAN else 1)

    @property
    def compulsory_bytes(self) -> int:
        """Noise is compulsory nowhere: it can be made, and made again."""
        operation, dtype = OPERATIONS[self.operation], DTYPES[self.dtype]
        directions = operation.directions if self.backward else ("forward",)
        # An element that has an axis of its own is one of them.
        elements = prod(operation.elements(self.shape)) if operation.numbers_of_an_element else self.elements
        return sum(sum(operation.bytes_per_element(direction, dtype)) for direction in directions) * elements

    def function(self, library: Any) -> Callable[..., tuple[Tensor, ...]]:
        """The operation of `library` as a function of tensors, as torch.compile takes it; of the bound only the
        loss, which is what a training step differentiates.
        """
        operation = OPERATIONS[self.operation]

        def function(*tensors: Tensor) -> tuple[Tensor, ...]:
            return operation(library, *tensors)[: operation.roots or None]

        return function

    def step(self, function: Callable[..., tuple[Tensor, ...]], inputs: Inputs) -> tuple[Tensor, ...]:
        """What is timed: the results, and with `backward` the gradients after them."""
        results = function(*inputs.tensors)
        if not self.backward:
            return results
        return (*results, *torch.autograd.grad(results, inputs.leaves, inputs.upstream))

    def inputs(self, device: torch.device, seed: int) -> Inputs:
        operation, dtype = OPERATIONS[self.operation], DTYPES[self.dtype]
        shape = (self.shape[0], self.shape[1] // 2, *self.shape[2:]) if self.operation in GAUSSIAN else self.shape
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        spec = Spec(shape, dtype, None, lambda tensor: tensor.contiguous(memory_format=memory_format), device, seed)
        tensors = operation.inputs(spec)
        if not self.backward:
            return Inputs(tuple(tensor.detach() for tensor in tensors), ())
        generator = torch.Generator(device).manual_seed(seed + 1)
        upstream = []
        for name in operation.outputs[: operation.roots]:
            if name == "z":
                upstream.append(torch.empty_like(spec.layout(torch.empty(shape, dtype=dtype, device=device))))
                upstream[-1].normal_(generator=generator)
            else:
                upstream.append(torch.tensor(1.0 if self.unit_gradient else OTHER_GRADIENT, device=device))
        return Inputs(tensors, tuple(upstream))


def matrix(sizes: str) -> Iterator[Case]:
    """Every case."""
    for name, regime, dtype in product(OPERATIONS, SHAPES[sizes], DTYPES):
        shape = Case(name, regime, False, sizes=sizes).shape
        # A memory format is one only where there are channels and pixels.
        for channels_last in (False, True) if len(shape) == 4 and shape[1] > 1 else (False,):
            yield Case(name, regime, False, dtype, channels_last, True, sizes)
            if OPERATIONS[name].backward is not None:
                for unit_gradient in (True, False):
                    yield Case(name, regime, True, dtype, channels_last, unit_gradient, sizes)


def headline(sizes: str) -> list[Case]:
    """The 15 cells that say most, most telling first; with the training step they are the 16 that run by default."""
    packed, loss, both = "gaussian_sample_kl_packed", "sigmoid_mse_loss", "elbo_value_and_grad"
    return [
        Case(packed, "launch", True, sizes=sizes),
        Case(both, "launch", False, sizes=sizes),
        Case(packed, "bandwidth", True, sizes=sizes),
        Case(both, "bandwidth", False, sizes=sizes),
        Case(packed, "medium", True, sizes=sizes),
        Case(both, "medium", False, sizes=sizes),
        Case(loss, "bandwidth", True, sizes=sizes),
        Case(packed, "bandwidth", True, "bfloat16", sizes=sizes),
        Case(both, "bandwidth", False, "bfloat16", sizes=sizes),
        Case("gaussian_kl", "bandwidth", True, sizes=sizes),
        Case("elbo_loss", "bandwidth", True, sizes=sizes),
        Case("gaussian_sample", "bandwidth", False, sizes=sizes),
        Case(packed, "medium", True, channels_last=True, sizes=sizes),
        Case(loss, "launch", True, sizes=sizes),
        Case(loss, "bandwidth", True, "bfloat16", unit_gradient=False, sizes=sizes),
    ]
