"""The multinomial likelihood of counts, from logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastvae.likelihoods.categorical import ROUNDINGS, check_dim, softmax_cross_entropy, softmax_grouping, term
from fastvae.likelihoods.likelihood import Grouping, Likelihood


@dataclass(frozen=True)
class Multinomial(Likelihood):
    """-sum_k t_k log softmax(logits)_k for counts t, over dimension ``dim``. The multinomial coefficient is left out,
    because no gradient depends on it.

    The target has the logits' shape. It may hold weights in place of counts. Negative numbers raise no error, because
    checking would need a synchronisation; the value is then the result of the formula. There is one value for each row
    along ``dim``, and reduction="mean" is the mean over these values.

    Choose it if the sum of the counts is not of interest, for example for the items that a user chose (Mult-VAE), or
    the counts of a cell whose depth does not matter.
    """

    dim: int = 1

    parameters = ("logits",)
    target = "number"
    roundings = ROUNDINGS
    grouped = True
    term = term

    def __post_init__(self) -> None:
        check_dim(self.dim)
        super().__post_init__()

    def grouping(self, parameters: torch.Size, target: torch.Size) -> Grouping:
        return softmax_grouping(self.dim, parameters, target, takes_classes=False)

    def formula(self, logits: Tensor, target: Tensor) -> Tensor:
        return softmax_cross_entropy(logits, target, self.dim)

    def mean(self, logits: Tensor) -> Tensor:
        """The probability of each kind, which is the mean of the counts divided by their sum."""
        return torch.softmax(logits, self.dim)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """Logits and counts of 5 kinds, in dimension 1, for rows of this shape."""
        logits = 3 * torch.randn((shape[0], 5, *shape[1:]), generator=generator)
        counts = torch.poisson(6 * torch.rand(logits.shape, generator=generator), generator)
        return logits.movedim(1, self.dim), counts.movedim(1, self.dim)
