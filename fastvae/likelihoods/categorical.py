"""The categorical likelihood, from logits: softmax cross entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastvae.likelihoods.likelihood import Grouping, Likelihood, Term

if TYPE_CHECKING:
    import triton.language as tl

    from fastvae.kernels import numerics, special


@Term
def term(slots, targets, place, SIZE: tl.constexpr, SETTINGS: tl.constexpr, FAST: tl.constexpr):
    """sum_k t_k (L - l_k), L = log sum e^l; slopes T softmax(l) - t, T = sum t. For a class t, t_k is 1 if k is t, else
    0.

    With m = max l, L - l_k = log1p(o) + (m - l_k), and no part is negative. o is the sum of e^(l - m) over all logits
    except one of the greatest, so that no digits are lost if one class has nearly all of the probability.
    """
    there = place < SIZE
    logits = tl.where(there, slots[0], -float("inf"))
    most = tl.max(logits, axis=1, keep_dims=True)
    weights = numerics.exp(logits - most, FAST)
    greatest = logits == most
    others = tl.sum(tl.where(greatest, 0.0, weights), axis=1, keep_dims=True)
    others += tl.sum(tl.where(greatest, 1.0, 0.0), axis=1, keep_dims=True) - 1.0
    weights = weights * numerics.reciprocal(1.0 + others, FAST)
    spread, below = special.log1p(others, FAST), tl.where(there, most - logits, 0.0)
    target = targets[0]
    if target.shape[1] == 1:
        hit = place == target
        value = spread + tl.sum(tl.where(hit, below, 0.0), axis=1, keep_dims=True)
        value = tl.where((target >= 0) & (target < SIZE), value, float("nan"))
        slope = weights - tl.where(hit, 1.0, 0.0)
    else:
        total = tl.sum(target, axis=1, keep_dims=True)
        value = total * spread + tl.sum(numerics.product(target, below), axis=1, keep_dims=True)
        slope = total * weights - target
    return value, (slope,)


# Of the sum of weights 5 + 20, for up to 2^20 classes, and a sum; of log1p 3 more. Times the sum of the target, 20, and
# a sum, that is the value. A slope has both sums, exp 5, a reciprocal 2, and two products and a sum.
ROUNDINGS = (51, 56)


def softmax_grouping(dim: int, logits: torch.Size, target: torch.Size, takes_classes: bool) -> Grouping:
    if not -len(logits) <= dim < len(logits) or dim % len(logits) == 0:
        raise ValueError(
            f"dim must name a dimension of logits other than the batch, got {dim} for shape {list(logits)}"
        )
    axis = dim % len(logits)
    if logits[axis] == 0:
        raise ValueError(f"logits must have a number along dimension {dim}, got shape {list(logits)}")
    if target == logits:
        return Grouping(axis, axis, logits[axis])
    without = (*logits[:axis], *logits[axis + 1 :])
    if takes_classes and tuple(target) == without:
        return Grouping(axis, None, logits[axis])
    classes = f", or {list(without)} for classes" if takes_classes else ""
    raise ValueError(f"target must have the shape of logits, {list(logits)}{classes}, got {list(target)}")


def check_dim(dim: object) -> None:
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dim must be an integer, got {dim!r}")
    if dim == 0:
        raise ValueError("dim must name a dimension other than the batch, got 0")


@dataclass(frozen=True)
class Categorical(Likelihood):
    """-log softmax(logits)_t for a class t, or -sum_k t_k log softmax(logits)_k for probabilities t, over ``dim``.

    A target of classes is int64 or uint8 and lacks that dimension: logits [B, K, H, W] with a target [B, H, W]. A
    target of the logits' shape, floating point or uint8, holds a probability for each class, such as one-hot vectors.
    It equals torch's ``cross_entropy``. The event is all dimensions but the batch and the classes. reduction="mean" is
    the mean over the elements that have a class. A class outside of 0 to K - 1 raises no error, because checking it
    would need a synchronisation. Its value is NaN.

    Choose it for labels, tokens, and pixels of few kinds.
    """

    dim: int = 1

    parameters = ("logits",)
    target = "class"
    roundings = ROUNDINGS
    grouped = True
    term = term

    def __post_init__(self) -> None:
        check_dim(self.dim)
        super().__post_init__()

    def grouping(self, parameters: torch.Size, target: torch.Size) -> Grouping:
        return softmax_grouping(self.dim, parameters, target, takes_classes=True)

    def formula(self, logits: Tensor, target: Tensor) -> Tensor:
        if target.ndim == logits.ndim:
            return softmax_cross_entropy(logits, target, self.dim)
        target = target.unsqueeze(self.dim if self.dim > 0 else self.dim % logits.ndim)
        valid = (target >= 0) & (target < logits.shape[self.dim])
        picked = logits.gather(self.dim, torch.where(valid, target, 0).long())
        return torch.logsumexp(logits, self.dim, keepdim=True) - torch.where(valid, picked, torch.nan)

    def mean(self, logits: Tensor) -> Tensor:
        """The probability of each class."""
        return torch.softmax(logits, self.dim)

    def sample(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Classes, int64, drawn from the distribution. The generator must be on the logits' device."""
        probabilities = torch.softmax(logits.float(), self.dim).movedim(self.dim, -1)
        drawn = torch.multinomial(probabilities.flatten(0, -2), 1, generator=generator)
        return drawn.view(probabilities.shape[:-1])

    def draw(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """Logits and probabilities of 5 classes, in dimension 1, for elements of this shape."""
        logits = 3 * torch.randn((shape[0], 5, *shape[1:]), generator=generator)
        target = torch.softmax(2 * torch.randn(logits.shape, generator=generator), 1)
        return logits.movedim(1, self.dim), target.movedim(1, self.dim)


def softmax_cross_entropy(logits: Tensor, target: Tensor, dim: int) -> Tensor:
    """sum_k t_k (log sum e^l - l_k), with size 1 along the dimension."""
    return (target * (torch.logsumexp(logits, dim, keepdim=True) - logits)).sum(dim, keepdim=True)
