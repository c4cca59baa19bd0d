"""The divergence of the posterior from the prior N(0, I) in three parts, estimated from a minibatch, in plain PyTorch:
its formula, the same of few pairs at once, and of many in blocks, with memory for the inputs only.

Chen et al., "Isolating Sources of Disentanglement in Variational Autoencoders", 2018: equation 2, section 4
("minibatch") and appendix C ("stratified").
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvae.reference import mixture
from fastvae.reference.mixture import LOG_2PI, runs_in_blocks, together

# Terms that are held at a time, 4 MB in float32, as `mixture` has them of pairs.
_TERMS = 1 << 20
# Up to so many terms are computed at once, and two tensors of them kept for backward, 16 MB each in float32. Forward
# and backward of [128, 10] take 1.9 ms, in blocks 6.3, and in plain PyTorch 4.1; of [256, 64], 72, 100 and 96 (one
# thread of an AMD EPYC, torch 2.13).
_AT_ONCE = 1 << 22


class TotalCorrelationTerms(NamedTuple):
    """mutual_information + total_correlation + dimension_kl is an estimate of the divergence from N(0, I), in nats."""

    mutual_information: Tensor
    total_correlation: Tensor
    dimension_kl: Tensor


class LogWeights(NamedTuple):
    """The logarithms of row i's weights of the posteriors of rows i, i + 1 (of the last row: 0) and all others."""

    own: float
    following: float
    other: float


def log_weights(batch: int, dataset_size: int, weighting: str) -> LogWeights:
    if weighting == "minibatch":
        return LogWeights(*[-math.log(dataset_size) - math.log(batch)] * 3)
    # A sample's own posterior is 1 of the data set's, the B - 1 others stand for the rest of it. One of these, the
    # following row's, has so much less that all weights together are 1.
    others = batch - 1
    following = math.log(dataset_size - others) - math.log(dataset_size) - math.log(others)
    return LogWeights(-math.log(dataset_size), following, -math.log(others))


def total_correlation(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    dataset_size: int,
    weighting: str = "minibatch",
    *,
    reduction: str = "batchmean",
) -> TotalCorrelationTerms:
    """(log q(z|x) - log q(z), log q(z) - sum_k log q(z_k), sum_k log q(z_k) - log N(z; 0, I)), where q(z) and each
    q(z_k) are sums over the batch's posteriors with weights W: of z, mu and logvar [B, K].
    """
    weights = log_weights(len(z), dataset_size, weighting)
    if runs_in_blocks(z, mu, logvar):
        function = _AtOnce if len(z) * z.numel() <= _AT_ONCE else _OfBlocks
        values = function.apply(z, mu, logvar, weights)  # type: ignore[no-untyped-call]
    else:
        values = formula(z, mu, logvar, weights)
    return TotalCorrelationTerms(*values if reduction == "none" else (value.mean() for value in values))


def formula(z: Tensor, mu: Tensor, logvar: Tensor, weights: LogWeights) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, on all pairs at once: three [B]. A term of -infinity has a gradient of 0, and not 0 times
    infinity.
    """
    z, mu, logvar = together(z, mu, logvar)
    scale = torch.exp(-0.5 * logvar)
    difference = z[:, None] - mu
    absent = (difference.detach() * scale.detach()).square() == math.inf
    r = torch.where(absent, 0.0, difference) * scale
    each = torch.where(absent, -math.inf, -0.5 * (r.square() + logvar + LOG_2PI))
    pairs = each.sum(2)
    own = pairs.diagonal()
    own = torch.where(own.detach() == -math.inf, -math.inf, own)
    log_w = _weight_matrix(z, weights)
    joint = _log_sum_exp(log_w + pairs)
    marginals = _log_sum_exp(log_w[:, :, None] + each).sum(1)
    prior = -0.5 * (z.square() + LOG_2PI).sum(1)
    return own - joint, joint - marginals, marginals - prior


def _weight_matrix(z: Tensor, weights: LogWeights) -> Tensor:
    """log W [B, B]: row i has the weights for z_i."""
    row = torch.arange(len(z), device=z.device)
    ahead = (row - row[:, None]) % len(z)
    own, following, other = (z.new_full((), weight) for weight in weights)
    return torch.where(ahead == 0, own, torch.where(ahead == 1, following, other))


def _log_sum_exp(terms: Tensor) -> Tensor:
    """Over dimension 1. Where all terms are -infinity, so is the sum, and its gradient is 0."""
    nothing = (terms.detach() == -math.inf).all(1, keepdim=True)
    return torch.where(nothing.squeeze(1), -math.inf, torch.logsumexp(torch.where(nothing, 0.0, terms), 1))


class _AtOnce(torch.autograd.Function):
    """The values of `formula`, of all pairs at once, in tensors [dimensions, rows, posteriors]. Kept for backward: the
    inputs, the scaled differences, and the exponentials of the terms.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, ctx.weights = arguments
        z, mu, logvar = together(*tensors)
        pairs = mixture.Pairs(mu, logvar)
        r = pairs.differences(z.t().contiguous(), slice(None))
        squares = r.square()
        each = -0.5 * (logvar + LOG_2PI)
        other = ctx.weights.other
        of_pairs = torch.sub(other + each.sum(1), squares.sum(0), alpha=0.5)
        own = of_pairs.diagonal() - other
        joint, of_joint, shares = _exponentials(_weighted(of_pairs, ctx.weights))
        terms = torch.sub((other + each).t()[:, None, :], squares, alpha=0.5, out=squares)
        marginals, of_marginals, exponentials = _exponentials(_weighted(terms, ctx.weights))
        present = own != -math.inf
        # A weight of 0 times the greatest number is 0, times infinity it would be NaN.
        greatest = torch.finfo(z.dtype).max
        kept = r.clamp_(-greatest, greatest), exponentials, of_marginals, shares, of_joint, present
        ctx.save_for_backward(*tensors, pairs.scale, *kept)
        all_marginals = marginals.sum(0)
        prior = -0.5 * (z.square() + LOG_2PI).sum(1)
        return own - joint, joint - all_marginals, all_marginals - prior

    @staticmethod
    def backward(ctx: Any, *value_grads: Tensor) -> tuple[Tensor | None, ...]:
        z, mu, logvar, scale, r, exponentials, of_marginals, shares, of_joint, present = ctx.saved_tensors
        tensors, needed = (z, mu, logvar), ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() or not runs_in_blocks(*tensors, *value_grads):
            return *differentiable_gradients(tensors, ctx.weights, needed, value_grads), None
        of_information, of_correlation, of_dimensions = value_grads
        of_pairs = shares * ((of_correlation - of_information) / of_joint)[:, None]
        of_pairs.diagonal().add_(torch.where(present, of_information, 0.0))
        through = (of_dimensions - of_correlation) / of_marginals
        w = torch.addcmul(of_pairs, exponentials, through[:, :, None])
        weighted = w * r
        mu_grad = weighted.sum(1) * scale
        logvar_grad = -0.5 * torch.addcmul(w, weighted, r, value=-1, out=w).sum(1)
        z_grad = of_dimensions[:, None] * z - weighted.mul_(scale[:, None, :]).sum(2).t()
        found = z_grad, mu_grad.t(), logvar_grad.t()
        return *_of_inputs(found, tensors, needed), None


def _exponentials(terms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The logarithm of the sum of exponentials over the last dimension; that sum less a factor, 1 if it is 0; and the
    exponentials less the factor, written over the terms.
    """
    most = terms.amax(-1)
    exponentials = terms.sub_(torch.where(most.isinf(), 0.0, most)[..., None]).exp_()
    total = exponentials.sum(-1)
    return most + total.log(), torch.where(total == 0, 1.0, total), exponentials


def _weighted(terms: Tensor, weights: LogWeights, first: int = 0) -> Tensor:
    """Terms [..., rows, posteriors] of rows from number `first` on, which have the weight of most posteriors, with the
    weights of the others.
    """
    own, following, other = weights
    if own != other:
        terms.diagonal(first, -2, -1).add_(own - other)
        terms.diagonal(first + 1, -2, -1).add_(following - other)
        if first + terms.shape[-2] == terms.shape[-1]:
            terms[..., -1, 0] += following - other
    return terms


class _OfBlocks(torch.autograd.Function):
    """The values of `formula`, block by block. Kept for backward: the inputs, and log q(z) and each log q(z_k), 1 + K
    numbers a row, from which each block's terms are computed again.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *tensors, ctx.weights = arguments
        z, mu, logvar = together(*tensors)
        joint, marginals = _Blocks(z, mu, logvar, ctx.weights).log_sums()
        ctx.save_for_backward(*tensors, joint, marginals)
        own = -0.5 * (((z - mu) * torch.exp(-0.5 * logvar)).square() + logvar + LOG_2PI).sum(1)
        all_marginals = marginals.sum(0)
        prior = -0.5 * (z.square() + LOG_2PI).sum(1)
        return own - joint, joint - all_marginals, all_marginals - prior

    @staticmethod
    def backward(ctx: Any, *value_grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, joint, marginals = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() or not runs_in_blocks(*tensors, *value_grads):
            return *differentiable_gradients(tensors, ctx.weights, needed, value_grads), None
        return *_gradients(tensors, ctx.weights, joint, marginals, needed, value_grads), None


class _Blocks:
    """The terms of pairs, [dimensions, rows, posteriors]: so many are held at a time that exponentials, which torch
    divides among threads, are taken of many at once, and what is made of them in smaller blocks, as in `mixture`.
    """

    def __init__(self, z: Tensor, mu: Tensor, logvar: Tensor, weights: LogWeights) -> None:
        self.z, self.pairs, self.weights = z.t().contiguous(), mixture.Pairs(mu, logvar), weights
        each = -0.5 * (logvar + LOG_2PI)
        self.constants, self.constants_of_pairs = (weights.other + each).t().contiguous(), weights.other + each.sum(1)
        batch, dims = z.shape
        self.rows, self.block_rows, self.block_dims = mixture.block_of(batch, batch, dims)
        self.dims = max(1, min(dims, _TERMS // (self.rows * batch)))

    def held(self) -> Iterator[slice]:
        """The rows of which terms are held at a time."""
        return mixture.parts(self.z.shape[1], self.rows)

    def held_dims(self) -> Iterator[slice]:
        return mixture.parts(len(self.z), self.dims)

    def empty(self, rows: slice, dims: slice) -> Tensor:
        return self.z.new_empty(*self.z[dims, rows].shape, self.z.shape[1])

    def within(self, rows: slice, dims: slice) -> Iterator[tuple[tuple[slice, slice], slice, slice]]:
        """Of each block: its place in what is held, its rows and its dimensions."""
        for part in mixture.parts(rows.stop - rows.start, self.block_rows):
            for step in mixture.parts(dims.stop - dims.start, self.block_dims):
                yield (
                    (step, part),
                    slice(rows.start + part.start, rows.start + part.stop),
                    slice(dims.start + step.start, dims.start + step.stop),
                )

    def of_pairs(self, rows: slice) -> Tensor:
        """log W + log N(z; mu, exp(logvar)), [rows, posteriors]."""
        terms = self.pairs.terms(self.z[:, rows], self.constants_of_pairs, self.block_rows, self.block_dims)
        return _weighted(terms, self.weights, rows.start)

    def of_dims(self, r: Tensor, rows: slice, dims: slice, terms: Tensor) -> Tensor:
        """log W + log N(z_k; mu_k, exp(logvar_k)), written to terms."""
        torch.addcmul(self.constants[dims, None, :], r, r, value=-0.5, out=terms)
        return _weighted(terms, self.weights, rows.start)

    def log_sums(self) -> tuple[Tensor, Tensor]:
        """log q(z) [rows], and log q(z_k) [dimensions, rows]."""
        joint, marginals = self.z.new_empty(self.z.shape[1]), torch.empty_like(self.z)
        for rows in self.held():
            joint[rows] = torch.logsumexp(self.of_pairs(rows), 1)
            for dims in self.held_dims():
                held = self.empty(rows, dims)
                for place, part, step in self.within(rows, dims):
                    terms = self.of_dims(self.pairs.differences(self.z[:, part], step), part, step, held[place])
                    most = terms.amax(2)
                    marginals[step, part] = most
                    terms.sub_(torch.where(most.isinf(), 0.0, most)[:, :, None])
                held.exp_()
                for place, part, step in self.within(rows, dims):
                    marginals[step, part] += held[place].sum(2).log_()
        return joint, marginals


def _gradients(
    tensors: Sequence[Tensor],
    weights: LogWeights,
    joint: Tensor,
    marginals: Tensor,
    needed: Sequence[bool],
    value_grads: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """Sums over pairs of w r e^(-logvar / 2) and w (r^2 - 1) / 2, where w is what reaches a term of a dimension."""
    z, mu, logvar = together(*tensors)
    blocks = _Blocks(z, mu, logvar, weights)
    of_information, of_correlation, of_dimensions = value_grads
    of_joint, of_marginals = of_correlation - of_information, of_dimensions - of_correlation
    joint, marginals = (torch.where(value == -math.inf, 0.0, value) for value in (joint, marginals))
    z_grad = torch.zeros_like(blocks.z)
    mu_grad, logvar_grad = torch.zeros_like(z_grad), torch.zeros_like(z_grad)
    greatest = torch.finfo(z.dtype).max
    for rows in blocks.held():
        of_pairs = blocks.of_pairs(rows)
        own = torch.where(of_pairs.diagonal(rows.start) == -math.inf, 0.0, of_information[rows])
        of_pairs.sub_(joint[rows, None]).exp_().mul_(of_joint[rows, None]).diagonal(rows.start).add_(own)
        for dims in blocks.held_dims():
            differences, weights_of_dims = blocks.empty(rows, dims), blocks.empty(rows, dims)
            for place, part, step in blocks.within(rows, dims):
                differences[place] = r = blocks.pairs.differences(blocks.z[:, part], step)
                terms = blocks.of_dims(r, part, step, weights_of_dims[place])
                terms.sub_(marginals[step, part, None])
            weights_of_dims.exp_()
            for place, part, step in blocks.within(rows, dims):
                w = torch.addcmul(of_pairs[place[1]], weights_of_dims[place], of_marginals[part, None])
                # A weight of 0 times the greatest number is 0, times infinity it would be NaN.
                r = differences[place].clamp_(-greatest, greatest)
                weighted = w * r
                mu_grad[step] += weighted.sum(1)
                logvar_grad[step] += torch.addcmul(w, weighted, r, value=-1).sum(1)
                z_grad[step, part] = weighted.mul_(blocks.pairs.scale[step, None, :]).sum(2)
    found = of_dimensions[:, None] * z - z_grad.t(), (mu_grad * blocks.pairs.scale).t(), -0.5 * logvar_grad.t()
    return _of_inputs(found, tensors, needed)


def _of_inputs(found: Sequence[Tensor], tensors: Sequence[Tensor], needed: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """The gradients that are needed, in the dtypes of the tensors."""
    return tuple(
        gradient.to(tensor.dtype).contiguous() if need else None
        for gradient, tensor, need in zip(found, tensors, needed, strict=True)
    )


def differentiable_gradients(
    tensors: Sequence[Tensor], weights: LogWeights, needed: Sequence[bool], value_grads: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """The gradients by torch's own differentiation of the formula, where a backward pass is itself differentiated."""

    def of_needed(*wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        each = iter(wanted)
        z, mu, logvar = (next(each) if need else x for x, need in zip(tensors, needed, strict=True))
        return formula(z, mu, logvar, weights)

    transformed: Any = torch.func.vjp(of_needed, *[x for x, need in zip(tensors, needed, strict=True) if need])
    values, pulled_back = transformed
    gradients = iter(pulled_back(tuple(grad.to(values[0].dtype) for grad in value_grads)))
    return tuple(next(gradients) if need else None for need in needed)
