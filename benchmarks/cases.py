"""What is measured: the public operations at three sizes, forward, and forward with backward."""

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

# The same names twice: in plain PyTorch, and the public functions.
EAGER, FUSED = plain, F

BETA = 0.5
# An upstream gradient that is not 1 is what a weighted loss or a loss scale gives.
OTHER_GRADIENT = 0.37


class Operation(NamedTuple):
    """A public function of the family's file, as the benchmarks call it.

    `call(library, *tensors)` returns the tensors that have gradients; `arguments` names its tensors; `forward` and
    `backward` are the tensors of the event's size that must be read and written, so the compulsory bytes per element
    are their number times the item size. Noise is compulsory nowhere: it can be made, and made again.
    """

    call: Callable[..., tuple[Tensor, ...]]
    arguments: tuple[str, ...]
    forward: int
    backward: int | None  # None: the gradient is a result of the function
    draws_noise: bool = False


def _elbo_value_and_grad(library: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
    values, gradients = library.elbo_value_and_grad(*tensors, beta=BETA)
    return (*values, *gradients)


_SAMPLE_KL: dict[str, Any] = {"forward": 3, "backward": 5, "draws_noise": True}
GAUSSIAN = {
    "gaussian_sample": Operation(
        lambda library, *tensors: (library.gaussian_sample(*tensors),), ("mu", "logvar"), 3, 4, draws_noise=True
    ),
    "gaussian_kl": Operation(lambda library, *tensors: (library.gaussian_kl(*tensors),), ("mu", "logvar"), 2, 4),
    "gaussian_kl_free_bits": Operation(
        lambda library, *tensors: (library.gaussian_kl(*tensors, free_bits=0.5),), ("mu", "logvar"), 2, 4
    ),
    "gaussian_sample_kl": Operation(
        lambda library, *tensors: library.gaussian_sample_kl(*tensors, reduction="batchmean"),
        ("mu", "logvar"),
        **_SAMPLE_KL,
    ),
    "gaussian_sample_kl_packed": Operation(
        lambda library, *tensors: library.gaussian_sample_kl_packed(*tensors, reduction="batchmean"),
        ("moments",),
        **_SAMPLE_KL,
    ),
}
RECONSTRUCTION = {
    "sigmoid_mse_loss": Operation(
        lambda library, *tensors: (library.sigmoid_mse_loss(*tensors),), ("logits", "target"), 2, 3
    ),
}
ELBO = {
    "elbo_loss": Operation(
        lambda library, *tensors: (library.elbo_loss(*tensors, beta=BETA).loss,), ("logits", "target", "kl"), 2, 3
    ),
    "elbo_value_and_grad": Operation(_elbo_value_and_grad, ("logits", "target", "kl"), 3, None),
}
OPERATIONS = {**GAUSSIAN, **RECONSTRUCTION, **ELBO}

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
        return moments if self.operation in GAUSSIAN else image

    @property
    def elements(self) -> int:
        """Of z, or of the logits."""
        return prod(self.shape) // (2 if self.operation in GAUSSIAN else 1)

    @property
    def compulsory_bytes(self) -> int:
        operation = OPERATIONS[self.operation]
        tensors = operation.forward + ((operation.backward or 0) if self.backward else 0)
        return tensors * self.elements * DTYPES[self.dtype].itemsize

    def function(self, library: Any) -> Callable[..., tuple[Tensor, ...]]:
        """The operation of `library` as a function of tensors, as torch.compile takes it."""
        call = OPERATIONS[self.operation].call

        def function(*tensors: Tensor) -> tuple[Tensor, ...]:
            return call(library, *tensors)

        return function

    def step(self, function: Callable[..., tuple[Tensor, ...]], inputs: Inputs) -> tuple[Tensor, ...]:
        """What is timed: the results, and with `backward` the gradients after them."""
        results = function(*inputs.tensors)
        if not self.backward:
            return results
        return (*results, *torch.autograd.grad(results, inputs.leaves, inputs.upstream))

    def inputs(self, device: torch.device, seed: int) -> Inputs:
        generator = torch.Generator(device).manual_seed(seed)
        dtype = DTYPES[self.dtype]

        def normal(shape: tuple[int, ...], scale: float = 1.0, shift: float = 0.0) -> Tensor:
            values = torch.empty(shape, dtype=dtype, device=device)
            if self.channels_last:
                values = values.to(memory_format=torch.channels_last)
            return values.normal_(shift, scale, generator=generator)

        half = (self.shape[0], self.shape[1] // 2, *self.shape[2:])
        makers: dict[str, Callable[[], Tensor]] = {
            "mu": lambda: normal(half),
            "logvar": lambda: normal(half, 0.5, -1.0),
            "moments": lambda: normal(self.shape, 0.5, -0.5),
            "logits": lambda: normal(self.shape, 2.0),
            "target": lambda: torch.sigmoid_(normal(self.shape, 2.0)),
            # What the sampler gives, whatever the images' dtype.
            "kl": lambda: torch.full((self.shape[0],), 7.0, device=device),
        }
        operation = OPERATIONS[self.operation]
        tensors = tuple(makers[name]() for name in operation.arguments)
        if not self.backward:
            return Inputs(tensors, ())
        for name, tensor in zip(operation.arguments, tensors, strict=True):
            tensor.requires_grad_(name != "target")
        upstream = [normal(half)] if operation.draws_noise else []
        if self.operation != "gaussian_sample":
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
