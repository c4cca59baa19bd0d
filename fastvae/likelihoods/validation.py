"""Check the values of a target, which no operation does."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae.likelihoods.likelihood import Likelihood


def validate(likelihood: Likelihood, target: Tensor) -> None:
    """Check that the likelihood allows the values of a target. The target may be on any device.

    Operations do not check values, because the host would have to wait for the device in every step. Call this function
    once on the data instead. Numbers must be finite. A bounded "unit" target must lie in [0, 1]. Counts must be whole
    and not negative. Classes must not be negative; the number of classes is not known here. A target of bytes has no
    wrong values.

    Raises:
        ValueError: the likelihood does not allow a value; the message has the value, its position and what is expected.
        TypeError: ``likelihood`` is not a Likelihood, or the likelihood does not read the target's type or dtype.
    """
    # Imported here, because they import this package.
    from fastvae.functional.checks import check_is_likelihood, check_target_dtype

    check_is_likelihood(likelihood)
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a torch.Tensor, got {type(target).__name__}")
    classes = likelihood.target == "class" and target.dtype is torch.int64
    if not classes:
        check_target_dtype(target, likelihood)
    if target.dtype is torch.uint8:
        return
    if classes:
        _refuse(likelihood, target, "the number of a class, 0 or more", target < 0)
        return
    _refuse(likelihood, target, "finite", ~target.isfinite())
    if likelihood.target == "unit" and likelihood.bounded:
        _refuse(likelihood, target, "in [0, 1]", (target < 0) | (target > 1))
    if likelihood.counts:
        _refuse(likelihood, target, "a count, a whole number from 0 on", (target < 0) | (target != target.floor()))


def _refuse(likelihood: Likelihood, target: Tensor, expected: str, wrong: Tensor) -> None:
    places = wrong.nonzero()
    if len(places):
        place = places[0].tolist()
        more = f", and {len(places) - 1} more" if len(places) > 1 else ""
        raise ValueError(
            f"target must be {expected} for {likelihood}, got {target[tuple(place)].item()} at {place}{more}"
        )
