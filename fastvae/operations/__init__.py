"""The public operations, in one list.

Every test, table and benchmark of all operations reads this list: the tests of the error bound, launches, bytes,
layouts, autograd and torch.compile; the tables of the compiled code; the cases of the benchmarks; and the table of
operations in the documentation. A new operation therefore needs one entry: in `posterior`, or in `LIKELIHOODS` of
`likelihoods`. Kernels are given by name, because these modules import no Triton.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fastvae.likelihoods import Bernoulli, Gaussian, Likelihood, Multinomial, SigmoidMSE
from fastvae.operations.documentation import table
from fastvae.operations.likelihoods import (
    LIKELIHOODS,
    LONG_ROWS,
    SMALLER,
    in_short,
    of_likelihood,
    of_long_rows,
    of_smaller,
)
from fastvae.operations.operation import REDUCTIONS, Operation, Spec, flattened
from fastvae.operations.posterior import of_posterior

__all__ = [
    "LIKELIHOODS", "PAIRWISE", "REDUCTIONS", "SMALLER", "Operation", "Spec", "all_kernel_names", "flattened",
    "in_short", "kernel_names", "named", "of_each_kind", "of_likelihood", "of_smaller", "operations", "table",
]  # fmt: skip

# The kernels of the objectives that are no list's entries, because their inputs have not the shape of one batch.
PAIRWISE = {
    "gaussian_mixture_log_prob": (
        "mixture_log_prob.mixture_kernel",
        "mixture_log_prob.mixture_rows_kernel",
        "mixture_log_prob.mixture_components_kernel",
    ),
    "importance_weighted_bound": ("importance_weighted.bound_kernel", "importance_weighted.bound_backward_kernel"),
    "total_correlation": (
        "decomposition.total_correlation_kernel",
        "decomposition.total_correlation_rows_kernel",
        "decomposition.total_correlation_posteriors_kernel",
    ),
    "maximum_mean_discrepancy": (
        "mean_discrepancy.discrepancy_kernel",
        "mean_discrepancy.discrepancy_gradients_kernel",
    ),
}


def operations(extra: Sequence[Likelihood] = ()) -> list[Operation]:
    """Every public operation, and the operations of ``extra`` likelihoods, which are not part of fastvae."""
    of_likelihoods = [it for likelihood in (*LIKELIHOODS, *extra) for it in of_likelihood(likelihood)]
    smaller = [it for entry in SMALLER for it in of_smaller(*entry)]
    return [*of_posterior(), *of_likelihoods, *smaller, *(it for each in LONG_ROWS for it in of_long_rows(each))]


def of_each_kind(operations: Sequence[Operation]) -> list[Operation]:
    """The operations of the posterior, and those of a few likelihoods: with one parameter, with two, with a smaller
    parameter, with elements that have an axis of their own, and with long rows.

    Tests of launches, bytes and layouts use these, because kernels and launchers do not depend on a likelihood's term.
    """
    return [it for it in operations if it.likelihood in (None, SigmoidMSE(), Bernoulli(), Gaussian(), Multinomial())]


def named(operations: Iterable[Operation]) -> dict[str, Operation]:
    return {operation.name: operation for operation in operations}


def kernel_names(operations: Sequence[Operation]) -> list[str]:
    """The names of the operations' kernels, "module.kernel" of fastvae.kernels, each once."""
    return sorted({kernel for operation in operations for kernels in operation.kernels.values() for kernel in kernels})


def all_kernel_names() -> list[str]:
    """Those of every operation and objective."""
    return sorted({*kernel_names(operations()), *(kernel for kernels in PAIRWISE.values() for kernel in kernels)})
