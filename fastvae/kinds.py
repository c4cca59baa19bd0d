"""Kinds of numbers. The same definition checks arguments and reads flags, so both have the same error messages."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, NamedTuple

from torch import Tensor


class Kind(NamedTuple):
    """words: the description of an allowed value in error messages. number: int or float. fits: whether a number is
    allowed.
    """

    words: str
    number: type[int] | type[float]
    fits: Callable[[float], bool]

    def checked(self, name: str, value: object) -> Any:
        """The value as an int or a float. NumPy's numbers and tensors with one element are accepted.

        Raises ``TypeError`` for a value that is not a number (or not an integer), and ``ValueError`` for a number that
        is not allowed.
        """
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if not isinstance(value, Integral if self.number is int else Real) or isinstance(value, bool):
            raise TypeError(f"{name} must be {self.words}, got {value!r}")
        try:
            converted: float = self.number(value)  # type: ignore[call-overload]
        except OverflowError:  # of an integer beyond all floats
            converted = value = math.inf
        if not self.fits(converted):
            raise ValueError(f"{name} must be {self.words}, got {value}")
        return converted

    def read(self, text: str) -> Any:
        """The number in a flag's text, for argparse. Raises ``ArgumentTypeError``."""
        try:
            if self.number is int and not (text.isascii() and text.isdigit()):
                raise ValueError
            value = self.number(text)
        except ValueError:
            value = math.nan
        if not self.fits(value):
            raise argparse.ArgumentTypeError(f"must be {self.words}, got {text!r}")
        return value


POSITIVE_INTEGER = Kind("a positive integer", int, lambda value: value > 0)
SEED = Kind("an integer from 0 to 2^63 - 1", int, lambda value: 0 <= value < 2**63)
POSITIVE_NUMBER = Kind("a positive number", float, lambda value: 0 < value < math.inf)
NON_NEGATIVE_NUMBER = Kind("a number that is not negative", float, lambda value: 0 <= value < math.inf)
FRACTION = Kind("a number between 0 and 1", float, lambda value: 0 < value < 1)
