"""Launches and bytes of the operations as users write them in eager PyTorch (`plain.py`), beside fastvae's.

    python benchmarks/eager_cost.py [--compile]

prints a table as Markdown. It needs no GPU, because it counts the operations that autograd and PyTorch dispatch,
forward and backward. A launch is an operation that is neither a view nor an allocation. Its bytes are those of the
tensors that it reads and returns, each counted once. Second reads of a tensor and the workspace of a sum are not
counted. fastvae's numbers come from its list of operations, which `tests/test_launches.py` and `tests/test_traffic.py`
check. With `--compile` the table has two more columns: the loops that torch.compile generates for the same code on a
CPU, and the bytes that Inductor counts.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._inductor import metrics
from torch._inductor.utils import fresh_cache
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import plain
from fastvae.operations import Operation, Spec, named, operations

# Views and allocations run no kernel.
FREE = {
    "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "narrow",
    "new_empty", "new_empty_strided", "permute", "reshape", "select", "slice", "split", "split_with_sizes", "squeeze",
    "t", "transpose", "unbind", "unsqueeze", "view",
}  # fmt: skip

ROWS = {
    "gaussian_sample_kl_packed": "sampling and divergence",
    "elbo_loss": "squared error of a sigmoid, and the bound",
    "elbo_loss_Bernoulli": "Bernoulli, and the bound",
    "elbo_loss_Gaussian": "Gaussian with a learned variance, and the bound",
    "elbo_loss_NegativeBinomial_dispersion_per_column": "negative binomial with a dispersion per gene, and the bound",
    "elbo_loss_ZeroInflatedNegativeBinomial": "zero-inflated negative binomial, and the bound",
}


class Cost(TorchDispatchMode):
    """The launches and bytes of what runs between enter and exit."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ not in FREE:
            self.launches += 1
            tensors = {id(it): it for it in tree_leaves((args, kwargs, result)) if isinstance(it, Tensor)}
            self.bytes += sum(size_in_memory(tensor) for tensor in tensors.values())
        return result


def size_in_memory(tensor: Tensor) -> int:
    """In memory: what is expanded counts once."""
    numbers = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numbers *= size if stride else 1
    return numbers * tensor.element_size()


SHAPE = (64, 4096)


def step(operation: Operation, function: Callable[..., Any], context: AbstractContextManager[Any]) -> None:
    """A training step's part, forward and backward, in the context; what comes to it from outside, before."""
    tensors = operation.inputs(Spec(SHAPE))
    with context:
        outputs = function(*tensors)
    upstream = [torch.ones_like(output) for output in outputs]
    with context:
        torch.autograd.grad(outputs, [tensor for tensor in tensors if tensor.requires_grad], upstream)


def plainly(operation: Operation) -> Callable[..., Any]:
    return lambda *tensors: operation(plain, *tensors)[: operation.roots]


def eager_cost(operation: Operation) -> tuple[int, float]:
    """Launches, and bytes per float32 element."""
    cost = Cost()
    step(operation, plainly(operation), cost)
    return cost.launches, cost.bytes / math.prod(SHAPE)


def compiled_cost(operation: Operation) -> tuple[int, float]:
    """Inductor's loops, and the bytes per float32 element that it counts."""
    torch._logging.set_logs(inductor_metrics=True)  # else it does not count
    torch.compiler.reset()
    metrics.reset()
    with fresh_cache():
        step(operation, torch.compile(plainly(operation)), nullcontext())
    return metrics.generated_kernel_count, metrics.num_bytes_accessed / math.prod(SHAPE)


def table(compiled: bool = False) -> list[str]:
    """The lines of the table; with the columns of torch.compile, if asked for."""
    titles = ["forward and backward", "launches: eager", "fastvae", "bytes per float32 element: eager", "fastvae"]
    titles += ["torch.compile, on a CPU: loops", "bytes per element"] * compiled
    lines = [titles, ["---", *["--:"] * (len(titles) - 1)]]
    every = named(operations())
    for name, text in ROWS.items():
        operation = every[name]
        launches, moved = eager_cost(operation)
        own = sum(sum(operation.bytes_per_element(direction)) for direction in operation.directions)
        row = [text, launches, sum(operation.launches.values()), round(moved), own]
        if compiled:
            loops, moved = compiled_cost(operation)
            row += [loops, round(moved)]
        lines.append([str(it) for it in row])
    return [f"| {' | '.join(line)} |" for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="what torch.compile makes of them, too")
    print("\n".join(table(parser.parse_args().compile)))


if __name__ == "__main__":
    main()
