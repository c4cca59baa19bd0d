"""The multinomial likelihood of counts, from logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastvae.likelihoods.categorical import ROUNDINGS, check_dim, softmax_cross_entropy, softmax_grouping, term
from fastvae.likelihoods.likelihood import Grouping, Likelihood


@dataclass(frozen=True)
class Multinomial(Likelihood):
    """-sum_k t_k log softmax(logits)_k of counts t, over dimension ``dim``; without the multinomial coefficient, which
    no gradient sees.

    The target has the logits' shape; weights may stand for counts. It is not checked to be positive, because that would
    take a synchronisation: other numbers give what the formula says. Each row of the other dimensions is one value, and
    reduction="mean" is a mean over these.

    Choose it where the sum of the counts says nothing about what is modelled: items that a user chose (Mult-VAE), or
    counts of a cell whose depth is not of interest.
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
        """The probability of each kind: the mean of the counts over their sum."""
        return torch.softmax(logits, self.dim)

    def draw(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """For rows of this shape: counts of 5 kinds, in dimension 1."""
        logits = 3 * torch.randn((shape[0], 5, *shape[1:]), generator=generator)
        counts = torch.poisson(6 * torch.rand(logits.shape, generator=generator), generator)
        return logits.movedim(1, self.dim), counts.movedim(1, self.dim)
