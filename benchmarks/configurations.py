"""What the tables of compiled code hold: the operations and objectives, in the configurations that are compiled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastvae.functional as F
from fastvae.kernels import batch
from fastvae.likelihoods import Bernoulli, SigmoidMSE
from fastvae.operations import Operation, Spec, named, operations
from launches import Launch, record
from pairwise import OBJECTIVES, in_directions

channels_last = partial(Tensor.contiguous, memory_format=torch.channels_last)


class Configuration(NamedTuple):
    """An operation in one direction, as it is compiled ahead of time."""

    operation: Operation
    direction: str
    spec: Spec
    options: Mapping[str, Any]

    def record(self) -> Launch:
        tensors, launches = self.operation.inputs(self.spec), {}
        outputs: list[Tensor] = []
        launches["forward"] = record(lambda: outputs.extend(self.operation(F, *tensors, **self.options)))
        if self.direction == "backward":
            roots, leaves = outputs[: self.operation.roots], [t for t in tensors if t.requires_grad]
            # Dense, as a decoder and the bound give them; one number for all dimensions, as the gradient of a sum is.
            upstream = [
                root.new_ones(()).expand(root.shape)
                if name == "kl" and self.options.get("reduction") is None
                else torch.ones_like(root)
                for name, root in zip(self.operation.outputs, roots, strict=False)
            ]
            launches["backward"] = record(lambda: torch.autograd.grad(roots, leaves, upstream))
        return launches[self.direction][-1]  # of long rows, after the sums


# The operations of the posterior share kernels; these are the forms that differ. "rows" are samples of which a program
# has several; "long" samples or batches are shared by many programs.
POSTERIOR = {
    ("gaussian_sample", "forward"): ("long",),
    ("gaussian_kl", "forward"): ("long",),
    ("gaussian_sample_kl", "backward"): ("long",),
    ("gaussian_sample_kl_packed", "forward"): ("rows", "long", "channels_last"),
    ("gaussian_sample_kl_packed", "backward"): ("rows", "long", "channels_last"),
    ("gaussian_sample_kl_packed_per_dimension", "forward"): ("rows", "long"),
    ("gaussian_sample_kl_packed_per_dimension", "backward"): ("rows", "long"),
}


def of_general(dtype: torch.dtype) -> Iterator[tuple[str, Operation]]:
    """By size: the pair of kernels of any prior, scale and number of samples, in forms that differ in most lines. Those
    of bfloat16 differ in loads and stores only, which are most in a block of a hierarchical VAE.
    """
    listed = named(operations())
    to_prior = listed["gaussian_sample_kl_packed_prior"]
    to_shared = replace(
        to_prior,
        name="gaussian_sample_kl_packed_shared_prior",
        forward="mu + logvar -> z",
        backward="mu + logvar + z_grad -> mu_grad + logvar_grad",
        call=lambda function, moments, prior, **options: function(moments, prior=prior[:1], **options),
    )
    softplus = listed["gaussian_sample_kl_softplus"]
    clamped = replace(softplus, name=f"{softplus.name}_clamp", options={**softplus.options, "scale_clamp": (-8.0, 8.0)})
    samples = listed["gaussian_sample_samples"]
    yield "long", to_prior
    yield "rows", to_shared
    if dtype is torch.float32:
        yield from (("rows", to_prior), ("long", clamped), ("rows", samples), ("long", samples))


# Of these every operation is compiled, for each dtype; of the others the loss with its gradients in float32.
BY_DTYPE = (SigmoidMSE(), Bernoulli())


def configurations(dtype: torch.dtype) -> Iterator[tuple[str, Configuration]]:
    """By size: what of the operations is compiled. float16 compiles to the code of bfloat16."""
    sizes = {
        "rows": Spec((512, 16), dtype),
        "long": Spec((512, 16384), dtype),
        "channels_last": Spec((512, 16, 32, 32), dtype, layout=channels_last),
    }
    for operation in operations():
        for direction in operation.directions:
            if operation.long_rows:
                if dtype is torch.float32 and operation.reductions:  # each of the kernels once
                    yield "long", Configuration(operation, direction, Spec((16, 65536), dtype), {"reduction": "none"})
            elif operation.likelihood is None:
                # The packed moments are those of the bound, which takes the divergence of each sample.
                options = {"reduction": "none"} if operation.name == "gaussian_sample_kl_packed" else {}
                for size in POSTERIOR.get((operation.name, direction), ()):
                    yield size, Configuration(operation, direction, sizes[size], options)
            elif operation.measured and (dtype is torch.float32 or operation.likelihood in BY_DTYPE):
                if operation.likelihood not in BY_DTYPE and not operation.smaller and operation.backward is not None:
                    continue  # what differs is the term, and the loss with its gradient has all of it
                long = Spec((16, 3, 32, 32), dtype) if operation.numbers_of_an_element else sizes["long"]
                yield from ((size, it) for size, it in _of_likelihood(operation, direction, long))
    for size, operation in of_general(dtype):
        options = {"reduction": "none"} if operation.name.endswith("prior") else {}
        for direction in operation.directions:
            yield size, Configuration(operation, direction, sizes[size], options)


def _of_likelihood(operation: Operation, direction: str, long: Spec) -> Iterator[tuple[str, Configuration]]:
    options: dict[str, Any] = {"reduction": "none" if direction == "forward" else "mean"}
    if "kl" in operation.arguments:
        options = {"beta": torch.ones(())}  # as a training loop gives it
    specs = {"long": long}
    if operation.likelihood == SigmoidMSE():
        specs["odd"] = Spec((8, 16385), long.dtype)  # a size that 16 does not divide
        if long.dtype is torch.float32:
            specs["uint8 target"] = replace(long, target_dtype=torch.uint8)
            specs["images"] = Spec((128, 1, 28, 28))  # shared by many programs, in smaller tiles
        else:
            specs["float32 target"] = replace(long, target_dtype=torch.float32)
    for size, spec in specs.items():
        # With a sum for each sample, rows of an odd size start at any address.
        as_one_row = size == "odd" and "reduction" in options
        yield size, Configuration(operation, direction, spec, {"reduction": "mean"} if as_one_row else options)


def pairwise_launches() -> Iterator[tuple[str, Launch]]:
    """The kernels of the objectives of pairs and of samples in float32, with gradients to every input."""
    for name, objective in OBJECTIVES.items():
        for size, sizes in objective.table.items():
            every = range(len(objective.inputs(sizes, torch.float32)))
            for call in in_directions(objective, sizes, torch.float32, every):
                for launch in record(call):
                    kernel = launch.kernel.fn.__name__.removesuffix("_kernel")
                    yield f"{name} {kernel} {size} float32", launch


def launches() -> Iterator[tuple[str, Launch]]:
    """Each kernel in the configurations that fastvae uses, by name."""
    for dtype in (torch.float32, torch.bfloat16):
        for size, it in configurations(dtype):
            yield f"{it.operation.name} {it.direction} {size} {str(dtype).removeprefix('torch.')}", it.record()
    yield from pairwise_launches()
    photos = torch.empty(512, 1, 28, 28, dtype=torch.uint8)
    (launch,) = record(lambda: batch.gather_batch(photos, torch.arange(128)))
    yield "gather_batch forward uint8 images float32", launch
