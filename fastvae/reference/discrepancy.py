"""The maximum mean discrepancy of two sets of vectors, in plain PyTorch: its formula, and the same in blocks of pairs,
with memory for the sets only.

Gretton et al., "A Kernel Two-Sample Test", 2012, equations 3 (unbiased=False) and 5; Tolstikhin et al., "Wasserstein
Auto-Encoders", 2018, algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvae.reference.mixture import parts, runs_in_blocks, together

# The scales of each kernel where none are given: those of the Wasserstein autoencoder's code, and one.
SCALES = {"imq": (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0), "rbf": (1.0,)}

# Rows of either set in a block: its pairs take 256 KB in float32, which stay in the cache.
_SIDE = 256


def maximum_mean_discrepancy(
    z: Tensor, prior_z: Tensor, kernel: str = "imq", scales: Sequence[float] | None = None, unbiased: bool = True
) -> Tensor:
    """mean k(z, z') + mean k(p, p') - 2 mean k(z, p) of z [n, K] and prior_z [m, K], k a sum over scales; unbiased: a
    row and itself are no pair.
    """
    rates = rates_of(z.shape[1], SCALES[kernel] if scales is None else scales)
    if runs_in_blocks(z, prior_z):
        value: Tensor = _OfBlocks.apply(z, prior_z, kernel, rates, unbiased)  # type: ignore[no-untyped-call]
        return value
    return formula(z, prior_z, kernel, rates, unbiased)


def rates_of(dims: int, scales: Sequence[float]) -> tuple[float, ...]:
    """1 / C of each scale, C = 2 K scale."""
    return tuple(1.0 / (2.0 * dims * scale) for scale in scales)


class Weights(NamedTuple):
    """What the sums over ordered pairs within z, within prior_z and between them are multiplied by, and what is added
    for each row with itself, whose kernel is 1 for each scale.
    """

    own: float
    prior: float
    between: float
    constant: float


def weights_of(rows: int, prior_rows: int, scales: int, unbiased: bool) -> Weights:
    if unbiased:
        own, prior = (1.0 / (count * (count - 1)) for count in (rows, prior_rows))
    else:
        own, prior = (1.0 / count**2 for count in (rows, prior_rows))
    return Weights(own, prior, -2.0 / (rows * prior_rows), 0.0 if unbiased else scales / rows + scales / prior_rows)


def formula(z: Tensor, prior_z: Tensor, kernel: str, rates: Sequence[float], unbiased: bool) -> Tensor:
    """The definition, on all pairs at once. A pair whose squared distance is infinite gets a gradient of 0, and not 0
    times infinity.
    """
    z, prior_z = together(z, prior_z)

    def of_pairs(first: Tensor, second: Tensor) -> Tensor:
        differences = first[:, None] - second
        far = differences.detach().square().sum(2) == math.inf
        squares = torch.where(far[:, :, None], 0.0, differences).square().sum(2)
        x = [squares * rate for rate in rates]
        each = [1.0 / (1.0 + y) if kernel == "imq" else torch.exp(-y) for y in x]
        return torch.where(far, 0.0, torch.stack(each).sum(0))

    def of_others(rows: Tensor) -> Tensor:
        itself = torch.eye(len(rows), dtype=torch.bool, device=rows.device)
        return torch.where(itself, 0.0, of_pairs(rows, rows)).sum()

    weights = weights_of(len(z), len(prior_z), len(rates), unbiased)
    own, prior = weights.own * of_others(z), weights.prior * of_others(prior_z)
    return own + prior + weights.between * of_pairs(z, prior_z).sum() + weights.constant


def _blocks(rows: Tensor, others: Tensor | None) -> Iterator[tuple[slice, slice, bool]]:
    """All pairs of two sets; without `others` those of one, of which each is met once, or in both orders where the
    third says so: there a block is of some rows and themselves.
    """
    for own in parts(len(rows), _SIDE):
        for other in parts(len(rows if others is None else others), _SIDE):
            if others is not None or own.start <= other.start:
                yield own, other, others is None and own == other


def _distances(rows: Tensor, others: Tensor) -> Tensor:
    """From differences, never from |a|^2 - 2 a b + |b|^2."""
    return torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist")


def _kernels(distances: Tensor, kernel: str, rates: Sequence[float]) -> Tensor:
    squares = distances.square()
    total = torch.zeros_like(squares)
    for rate in rates:
        total += (squares * rate).add_(1.0).reciprocal_() if kernel == "imq" else (squares * -rate).exp_()
    return total


def _slopes(distances: Tensor, kernel: str, rates: Sequence[float]) -> Tensor:
    """The derivatives of the kernels by the distances: 0 where the squared distance is infinite."""
    squares = distances.square()
    total = torch.zeros_like(squares)
    for rate in rates:
        if kernel == "imq":
            x = (squares * rate).add_(1.0).reciprocal_()
            total.addcmul_(x, x, value=-2.0 * rate)
        else:
            total.add_((squares * -rate).exp_(), alpha=-2.0 * rate)
    return total.mul_(distances.clamp(max=torch.finfo(distances.dtype).max))


def _sum_over_pairs(rows: Tensor, others: Tensor | None, kernel: str, rates: Sequence[float]) -> Tensor:
    """The sum of the kernels of ordered pairs, float64; without `others` of different rows of one set."""
    total = rows.new_zeros((), dtype=torch.float64)
    for own, other, itself in _blocks(rows, others):
        kernels = _kernels(_distances(rows[own], (rows if others is None else others)[other]), kernel, rates)
        if itself:
            kernels.fill_diagonal_(0.0)
        total += kernels.sum().double() * (1.0 if itself or others is not None else 2.0)
    return total


class _OfBlocks(torch.autograd.Function):
    """The value, block by block. Kept for backward: the two sets, from which each block is computed again."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, prior_z: Tensor, kernel: str, rates: tuple[float, ...], unbiased: bool) -> Tensor:
        ctx.save_for_backward(z, prior_z)
        ctx.settings = kernel, rates, unbiased
        z, prior_z = together(z, prior_z)
        weights = weights_of(len(z), len(prior_z), len(rates), unbiased)
        # The value may be a small difference of these sums, which are float64 therefore.
        value = weights.own * _sum_over_pairs(z, None, kernel, rates)
        value += weights.prior * _sum_over_pairs(prior_z, None, kernel, rates)
        value += weights.between * _sum_over_pairs(z, prior_z, kernel, rates)
        return (value + weights.constant).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, value_grad: Tensor) -> tuple[Tensor | None, ...]:
        z, prior_z = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled() or not runs_in_blocks(z, prior_z, value_grad):
            found = differentiable_gradients((z, prior_z), needed, value_grad, *ctx.settings)
        else:
            found = _gradients((z, prior_z), needed, value_grad, *ctx.settings)
        return (*found, None, None, None)


def _gradients(
    tensors: tuple[Tensor, Tensor],
    needed: Sequence[bool],
    value_grad: Tensor,
    kernel: str,
    rates: tuple[float, ...],
    unbiased: bool,
) -> list[Tensor | None]:
    """Sums over pairs of weight * slope * (z - z') / |z - z'|."""
    weights = weights_of(len(tensors[0]), len(tensors[1]), len(rates), unbiased)
    # Differences of what is clamped are finite. Where that changes them, the squared distance is infinite or 0, and the
    # slope is 0.
    half = torch.finfo(together(*tensors)[0].dtype).max / 2
    z, prior_z = (tensor.detach().clamp(-half, half) for tensor in together(*tensors))
    z_grad, prior_grad = torch.zeros_like(z), torch.zeros_like(prior_z)

    def add(rows: Tensor, others: Tensor | None, grads: Sequence[Tensor], wanted: Sequence[bool], w: float) -> None:
        for own, other, itself in _blocks(rows, others):
            # A block of rows and themselves has each pair in both orders, of which one moves each row.
            wants_others = wanted[1] and not itself
            with torch.enable_grad():
                first = rows[own].requires_grad_(wanted[0])
                second = (rows if others is None else others)[other].requires_grad_(wants_others)
                distances = _distances(first, second)
            slopes = _slopes(distances.detach(), kernel, rates).mul_(w * value_grad)
            found = iter(torch.autograd.grad(distances, [x for x in (first, second) if x.requires_grad], slopes))
            if wanted[0]:
                grads[0][own] += next(found)
            if wants_others:
                grads[1][other] += next(found)

    if needed[0]:
        add(z, None, (z_grad, z_grad), (True, True), 2.0 * weights.own)
    if needed[1]:
        add(prior_z, None, (prior_grad, prior_grad), (True, True), 2.0 * weights.prior)
    add(z, prior_z, (z_grad, prior_grad), needed, weights.between)
    return [
        gradient.to(tensor.dtype) if need else None
        for gradient, tensor, need in zip((z_grad, prior_grad), tensors, needed, strict=True)
    ]


def differentiable_gradients(
    tensors: tuple[Tensor, Tensor], needed: Sequence[bool], value_grad: Tensor, *settings: Any
) -> list[Tensor | None]:
    """The gradients by torch's own differentiation of the formula, where a backward pass is itself differentiated."""

    def of_needed(*wanted: Tensor) -> Tensor:
        each = iter(wanted)
        given = [next(each) if need else x for x, need in zip(tensors, needed, strict=True)]
        return formula(given[0], given[1], *settings)

    transformed: Any = torch.func.vjp(of_needed, *[x for x, need in zip(tensors, needed, strict=True) if need])
    gradients = iter(transformed[1](value_grad.to(transformed[0].dtype)))
    return [next(gradients) if need else None for need in needed]
