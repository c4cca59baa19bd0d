"""A mixture of discretised logistics, whose colours depend on each other linearly.

Salimans et al., "PixelCNN++", 2017, section 2; Child, "Very Deep VAEs", 2021, whose layout and clamp these are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastvae.likelihoods.discretized_logistic import DiscretizedLogistic
from fastvae.likelihoods.discretized_logistic import term as logistic
from fastvae.likelihoods.likelihood import Grouping, Likelihood, Term

if TYPE_CHECKING:
    import triton.language as tl

    from fastvae.kernels import numerics


@Term
def tanh(x, FAST: tl.constexpr):
    """(tanh x, 1 - tanh^2 x), computed from e^-2|x|, so that neither cancels. Near 1 the difference from 1 is smaller,
    and so is its rounding error.
    """
    twice = -2.0 * tl.abs(x)
    e = numerics.exp(twice, FAST)
    r = numerics.reciprocal(1.0 + e, FAST)
    size = tl.where(twice < -1.0, tl.fma(-2.0 * e, r, 1.0), -numerics.expm1(twice, e) * r)
    return tl.where(x < 0, -size, size), (4.0 * e) * (r * r)


@Term
def term(slots, targets, place, SIZE: tl.constexpr, SETTINGS: tl.constexpr, FAST: tl.constexpr):
    """-log sum_i w_i e^-v_i, where v_i is the value of component i, the sum of `logistic` over the colours, and w_i its
    weight, softmax(logits).

    With m_i = 1 - e^-v_i and n = sum_i w_i m_i the value is -log(1 - n), and the slope of a logit is w_i (m_i - n) / (1
    - n). Neither cancels near a value of 0. For values above log 2, where m_i rounds to 1, the value is a difference of
    log-sum-exps, and the slope is the difference of the weights before and after. The slope of v_i is component i's
    share of the sum.
    """
    there = place < SIZE
    logits = tl.where(there, slots[0], -float("inf"))
    relative = logits - tl.max(logits, axis=1, keep_dims=True)
    weights = numerics.exp(relative, FAST)
    total = tl.sum(weights, axis=1, keep_dims=True)
    weights = weights * numerics.reciprocal(total, FAST)

    # Not unpacked at once, because triton 3.6 finds no names in nested tuples.
    value, of_red = logistic((slots[1], slots[2]), targets[0], SETTINGS, FAST)
    if len(slots) == 10:
        red, green = tl.fma(2.0, targets[0], -1.0), tl.fma(2.0, targets[1], -1.0)
        c0, slope0 = tanh(slots[3], FAST)
        c1, slope1 = tanh(slots[6], FAST)
        c2, slope2 = tanh(slots[9], FAST)
        mean_green, mean_blue = tl.fma(c0, red, slots[4]), tl.fma(c2, green, tl.fma(c1, red, slots[7]))
        value_green, of_green = logistic((mean_green, slots[5]), targets[1], SETTINGS, FAST)
        value_blue, of_blue = logistic((mean_blue, slots[8]), targets[2], SETTINGS, FAST)
        value += value_green + value_blue

    missing = -numerics.expm1(-value, numerics.exp(-value, FAST))
    missed = tl.sum(numerics.product(weights, missing), axis=1, keep_dims=True)
    kept = numerics.reciprocal(tl.maximum(1.0 - missed, 0.5), FAST)
    joint = relative - value
    most = tl.max(joint, axis=1, keep_dims=True)
    most = tl.where(most == -float("inf"), 0.0, most)
    share = numerics.exp(joint - most, FAST)
    sum_of_shares = tl.sum(share, axis=1, keep_dims=True)
    share = share * numerics.reciprocal(sum_of_shares, FAST)
    near = missed < 0.5
    far_value = numerics.log(total, FAST) - (most + numerics.log(sum_of_shares, FAST))
    mixed = tl.where(near, numerics.log1p(missed * kept), far_value)
    by_logit = tl.where(near, weights * (missing - missed) * kept, weights - share)
    # These slopes have the sum 0. A weight of nearly 1 would differ from its share by less than their rounding.
    others = tl.sum(tl.where(weights > 0.5, 0.0, by_logit), axis=1, keep_dims=True)
    by_logit = tl.where(weights > 0.5, -others, by_logit)
    # `logistic` has 0 below the least log scale too, but 0 times a share of NaN would be NaN.
    slopes = (by_logit, share * of_red[0], tl.where(slots[2] >= SETTINGS[2], share * of_red[1], 0.0))
    if len(slots) == 10:
        mean_green, mean_blue = share * of_green[0], share * of_blue[0]
        scale_green = tl.where(slots[5] >= SETTINGS[2], share * of_green[1], 0.0)
        scale_blue = tl.where(slots[8] >= SETTINGS[2], share * of_blue[1], 0.0)
        # mypy wants tuples of one length.
        slopes += (mean_green * slope0 * red, mean_green, scale_green, mean_blue * slope1 * red)  # type: ignore[assignment]
        slopes += (mean_blue, scale_blue, mean_blue * slope2 * green)  # type: ignore[assignment]
    return mixed, slopes


@dataclass(frozen=True)
class DiscretizedLogisticMixture(Likelihood):
    """-log sum_i w_i P_i(t) for each pixel. P_i is the product of `DiscretizedLogistic`'s masses over the colours.

    The parameters are one tensor, with 10 M numbers for a pixel of three colours and 3 M numbers for a pixel of one
    colour. M is ``mixtures``. The numbers are M logits of the weights w, and then for each colour M means, M log scales
    and, with three colours, M coefficients. Component i's mean of green is m + tanh(c) r, with the coefficient c of
    red. Its mean of blue is m + tanh(c') r + tanh(c'') g, with the coefficients of green and blue. r and g are the
    target's red and green on [-1, 1].
    ``dim`` is the dimension of these numbers and of the colours: 1 for parameters [B, 10 M, H, W] with a target [B, 3,
    H, W], or -1 for [B, H, W, 10 M] with [B, H, W, 3]. None finds it from the shapes. There is one value for each
    pixel, so reduction="mean" is a mean over pixels. ``bins``, ``min_log_scale`` and the reading of the target are as
    in `DiscretizedLogistic`.

    Choose it for photographs of bytes. State-of-the-art VAEs report bits per dimension with this likelihood.
    """

    mixtures: int = 10
    bins: int = 256
    min_log_scale: float = -7.0
    dim: int | None = None

    parameters = ("mixture",)
    target = "unit"
    # Of the mean of blue 14: c2 10, two products and sums. Of v_i 28 + 14 + 2, of m_i 6 more. Its product with a weight
    # (exp 4, sum 5, reciprocal 2, and two) 12, the sum of up to 32 components 5, and the last quotient and log1p 8. Of
    # a slope: 52 + 14 of the logistic, 44 + 18 of its share, 12 of a coefficient's slope.
    roundings = (76, 140)
    grouped = True
    term = term

    def __post_init__(self) -> None:
        if isinstance(self.mixtures, bool) or not isinstance(self.mixtures, int):
            raise TypeError(f"mixtures must be an integer, got {self.mixtures!r}")
        if not 1 <= self.mixtures <= 32:
            raise ValueError(f"mixtures must be 1 to 32, got {self.mixtures}")
        if self.min_log_scale is None:
            raise TypeError("min_log_scale must be a number, got None")
        if self.dim not in (1, -1, None):
            raise ValueError(f"dim must be 1, -1 or None, got {self.dim!r}")
        _ = self._logistic  # which checks bins and min_log_scale
        super().__post_init__()

    @property
    def _logistic(self) -> DiscretizedLogistic:
        return DiscretizedLogistic(self.bins, self.min_log_scale)

    @property
    def reads_bytes(self) -> bool:
        return self._logistic.reads_bytes

    @property
    def settings(self) -> tuple[float, ...]:
        return self._logistic.settings

    def grouping(self, parameters: torch.Size, target: torch.Size) -> Grouping:
        possible = []
        for dim in self._dims(parameters):
            shape = list(parameters)
            shape[dim] = self._colours(parameters, dim)
            if list(target) == shape:
                return Grouping(dim, dim, self.mixtures)
            possible.append(str(shape))
        raise ValueError(
            f"target must have shape {' or '.join(possible)}, which goes with a mixture of shape {list(parameters)}, "
            f"got {list(target)}"
        )

    def output_channels(self, channels: int) -> int:
        if self.dim == -1:
            raise ValueError("dim must be 1 or None where the decoder returns channels in dimension 1, got -1")
        if channels not in (1, 3):
            raise ValueError(f"images of {self} must have 3 channels or 1, got {channels}")
        return (10 if channels == 3 else 3) * self.mixtures

    def _colours(self, shape: torch.Size, dim: int) -> int:
        return {10 * self.mixtures: 3, 3 * self.mixtures: 1}.get(shape[dim], 0)

    def _dims(self, shape: torch.Size) -> list[int]:
        """The dimensions, counted from the front, in which the numbers of a pixel may lie."""
        dims = (1, len(shape) - 1) if self.dim is None else (self.dim % len(shape),)
        found = sorted({dim for dim in dims if self._colours(shape, dim)})
        if not found:
            where = "1 or -1" if self.dim is None else f"{self.dim}"
            raise ValueError(
                f"mixture must have {10 * self.mixtures} numbers for three colours, or {3 * self.mixtures} for one, "
                f"along dimension {where}, got shape {list(shape)}"
            )
        return found

    def _slots(self, mixture: Tensor, dim: int) -> list[Tensor]:
        """The tensors of each kind, with the components in the last dimension."""
        return list(torch.split(mixture.movedim(dim, -1), self.mixtures, -1))

    def formula(self, mixture: Tensor, target: Tensor, shift_factors: Tensor | None = None) -> Tensor:
        dim = self.grouping(mixture.shape, target.shape).axis
        logits, *slots = self._slots(mixture, dim)
        colours = target.unsqueeze(-1).unbind(dim)
        factors = [] if shift_factors is None else self._slots(shift_factors, dim)
        values = self._logistic.formula(slots[0], slots[1], colours[0])
        for k in range(1, len(colours)):
            shift = self._shift(slots, k, [2 * t - 1 for t in colours])
            mean = slots[3 * k] + (shift * factors[k - 1] if factors else shift)
            values = values + self._logistic.formula(mean, slots[3 * k + 1], colours[k])
        value = torch.logsumexp(logits, -1) - torch.logsumexp(logits - values, -1)
        return value.unsqueeze(dim)

    def inner_factors(self, mixture: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        """Factors of the parts that are added to the means of green and blue. For a large coefficient such a part is
        +-r for any error of the coefficient, and r = -1 for a target of 0.
        """
        grouping = self.grouping(mixture.shape, target.shape)
        if target.shape[grouping.axis] == 1:
            return ()
        return (torch.ones_like(mixture.narrow(grouping.axis, 0, 2 * self.mixtures)),)

    def _shift(self, slots: list[Tensor], k: int, colours: list[Tensor]) -> Tensor | float:
        """What the colours before add to the mean of colour k."""
        if k == 1:
            return torch.tanh(slots[2]) * colours[0]
        return torch.tanh(slots[5]) * colours[0] + torch.tanh(slots[8]) * colours[1] if k == 2 else 0.0

    def _dim_of(self, mixture: Tensor) -> int:
        dim, *others = self._dims(mixture.shape)
        if others:
            raise ValueError(
                f"dim must be given, because both dimensions of a mixture of shape {list(mixture.shape)} may hold "
                "the numbers of a pixel"
            )
        return dim

    def mean(self, mixture: Tensor) -> Tensor:
        """The mean over the components of their centres, in [0, 1]. The centre of a colour is computed from the centres
        of the colours before it.
        """
        dim = self._dim_of(mixture)
        logits, *slots = self._slots(mixture, dim)
        centres: list[Tensor] = []
        for k in range(self._colours(mixture.shape, dim)):
            centres.append((slots[3 * k] + self._shift(slots, k, centres)).clamp(-1, 1))
        weights = torch.softmax(logits, -1)
        return 0.5 * torch.stack([(weights * centre).sum(-1) for centre in centres], dim) + 0.5

    def sample(self, mixture: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pictures drawn from the distribution, k / (bins - 1) in [0, 1]. The generator must be on the mixture's
        device.
        """
        dim = self._dim_of(mixture)
        logits, *slots = self._slots(mixture, dim)
        flat = torch.softmax(logits.float(), -1).flatten(0, -2)
        component = torch.multinomial(flat, 1, generator=generator).view(*logits.shape[:-1], 1)
        slots = [slot.gather(-1, component).squeeze(-1) for slot in slots]
        drawn: list[Tensor] = []
        for k in range(self._colours(mixture.shape, dim)):
            mean, log_scale = slots[3 * k] + self._shift(slots, k, drawn), slots[3 * k + 1].clamp(self.min_log_scale)
            tiny = torch.finfo(torch.float32).eps
            u = torch.rand(mean.shape, generator=generator, device=mean.device).clamp(tiny, 1 - tiny)
            x = mean + log_scale.exp() * (torch.log(u) - torch.log1p(-u))
            bins = ((0.5 * x + 0.5) * (self.bins - 1)).round().clamp(0, self.bins - 1)
            drawn.append(2 * bins / (self.bins - 1) - 1)
        return 0.5 * torch.stack(drawn, dim) + 0.5

    def draw(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """Parameters and a target for pixels of this shape. Dimension 1 has the numbers of a pixel, or the three
        colours.
        """
        shape = (shape[0], self.mixtures, *shape[1:])
        slots = [torch.randn(shape, generator=generator)]
        colours = []
        before: list[Tensor] = []
        for _ in range(3):
            colour = DiscretizedLogistic(self.bins).draw((shape[0], *shape[2:]), generator)[2]
            spread = 1.5 * torch.randn(shape, generator=generator) + 2.5 - math.log(self.bins - 1)
            centre = 2 * colour.unsqueeze(1) - 1 + 3 * spread.exp() * torch.randn(shape, generator=generator)
            slots += [centre, spread, torch.randn(shape, generator=generator)]
            colours.append(colour)
        for k, colour in enumerate(colours):
            if k:
                slots[1 + 3 * k] = slots[1 + 3 * k] - self._shift(slots[1:], k, before)
            before.append(2 * colour.unsqueeze(1) - 1)
        dim = self.dim or 1
        return torch.cat(slots, 1).movedim(1, dim), torch.stack(colours, 1).movedim(1, dim)
