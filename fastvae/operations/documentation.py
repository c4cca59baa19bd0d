"""The documentation's table of operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import gcd

import torch

from fastvae.operations.likelihoods import in_short
from fastvae.operations.operation import Operation


def table(operations: Sequence[Operation], computes: bool) -> list[str]:
    """The lines of the documentation's table of operations. ``computes`` adds a column with what each computes."""
    titles = ["function", "computes", "launches, forward + backward", "bytes per float32 element, forward + backward"]
    rows = [titles, ["---"] * 4, *(_row(operation) for operation in operations if operation.computes)]
    return [f"| {' | '.join(row if computes else [row[0], *row[2:]])} |".replace(" --- ", "---") for row in rows]


def _row(operation: Operation) -> list[str]:
    # What belongs together: a logit and its number in the target, or all of a mixture's pixel.
    share = gcd(*operation.numbers_of_an_element.values()) or 1

    def both_directions(number: Callable[[str], int]) -> str:
        numbers = [str(number(direction)) for direction in operation.directions]
        return " + ".join(numbers) if len(numbers) > 1 else f"{numbers[0]} in all"

    moved = both_directions(lambda direction: sum(operation.bytes_per_element(direction)) // share)
    if operation.target_kind == "unit":
        of_uint8 = both_directions(lambda d: sum(operation.bytes_per_element(d, target_dtype=torch.uint8)) // share)
        moved += f"; {of_uint8.removesuffix(' in all')} with a uint8 target"
    given = list(operation.arguments)
    if operation.likelihood and (count := len(operation.likelihood.parameters)) > 1:
        given[:count] = [f"({', '.join(given[:count])})"]
    if operation.function == "negative_log_likelihood":
        assert operation.likelihood is not None
        given.append(in_short(operation.likelihood))
    elif operation.name != operation.function:
        given = _with_prior(given)
        given += [f"{name}={value!r}".replace("'", '"') for name, value in operation.options.items()]
    return [
        f"`{operation.function}({', '.join(given)})`",
        operation.computes or "",
        both_directions(operation.launches.__getitem__),
        moved,
    ]


def _with_prior(given: list[str]) -> list[str]:
    """The arguments with the prior as it is given."""
    moments = [name for name in given if not name.startswith("prior")]
    halves = ", ".join(given[len(moments) :])
    return [*moments, f"prior=({halves})" if "," in halves else f"prior={halves}"] if halves else moments
