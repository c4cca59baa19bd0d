"""The log-density of a mixture of diagonal Gaussians, in plain PyTorch: its formula, and the same in blocks, with
memory for the inputs only.

Tomczak and Welling, "VAE with a VampPrior", 2017, equation 9: the prior is such a mixture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastvae.reference.precision import in_float32

LOG_2PI = math.log(2 * math.pi)

# Of so many elements, torch's differences, products and sums run on the calling thread; of one more, on several.
_ON_ONE_THREAD = 32767
# Terms that are held at a time, 4 MB in float32. Exponentials are taken of all of them at once, because torch divides
# those of 2048 already, and threads that wait for each other after each operation on a small block are slow on busy
# cores.
_PAIRS = 1 << 20


def gaussian_mixture_log_prob(z: Tensor, mu: Tensor, logvar: Tensor, log_weights: Tensor | None = None) -> Tensor:
    """log sum_n exp(log_weights_n + log N(z_b; mu_n, exp(logvar_n))) of z [B, K], mu and logvar [N, K]; log_weights [N]
    (None: -log N).
    """
    if runs_in_blocks(z, mu, logvar, log_weights):
        value: Tensor = _OfBlocks.apply(z, mu, logvar, log_weights)  # type: ignore[no-untyped-call]
        return value
    return formula(z, mu, logvar, log_weights)


def formula(z: Tensor, mu: Tensor, logvar: Tensor, log_weights: Tensor | None = None) -> Tensor:
    """The definition, on all pairs at once. A component that has no part in a row, because its term is -infinity, gets
    a gradient of 0 from it, and not 0 times infinity.
    """
    z, mu, logvar, log_weights = together(z, mu, logvar, log_weights)
    r = (z[:, None] - mu) * torch.exp(-0.5 * logvar)
    weights = -math.log(len(mu)) if log_weights is None else log_weights
    terms = weights - 0.5 * (r.square() + logvar + LOG_2PI).sum(2)
    absent = terms.detach() == -math.inf
    r = torch.where(absent[:, :, None], 0.0, r)
    terms = weights - 0.5 * (r.square() + logvar + LOG_2PI).sum(2)
    nothing = absent.all(1)
    terms = torch.where(nothing[:, None], 0.0, torch.where(absent, -math.inf, terms))
    return torch.where(nothing, -math.inf, torch.logsumexp(terms, 1))


def runs_in_blocks(*tensors: Tensor | None) -> bool:
    """Not where the call is traced or transformed, because torch must see the formula."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or any(type(tensor) not in (Tensor, torch.nn.Parameter, type(None)) for tensor in tensors)
    )


def together(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in float32, or all of them in float64 if one is."""
    wide = any(tensor is not None and tensor.dtype is torch.float64 for tensor in tensors)
    return tuple(None if t is None else t.double() if wide else in_float32(t) for t in tensors)


def block_size() -> int:
    """Elements of a block. With up to four threads it stays in the cache, and no other thread takes part. With more,
    each has a part.
    """
    threads = torch.get_num_threads()
    return _ON_ONE_THREAD if threads <= 4 else min(4 * _ON_ONE_THREAD * threads, _PAIRS)


def block_of(rows: int, components: int, dims: int) -> tuple[int, int, int]:
    """The rows whose terms are held at a time, those of a block [dimensions, rows, components] among them, and its
    dimensions.
    """
    size = block_size()
    held, in_block = (min(max(1, most // components), max(1, rows)) for most in (max(size, _PAIRS), size))
    return held, in_block, min(max(1, size // (components * in_block)), dims)


def parts(count: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


class Pairs:
    """The components, with dimensions first, and the scaled differences r = (z - mu) e^(-logvar / 2) from them."""

    def __init__(self, mu: Tensor, logvar: Tensor) -> None:
        self.mu, self.scale = mu.t().contiguous(), torch.exp(-0.5 * logvar).t().contiguous()

    def differences(self, z: Tensor, dims: slice) -> Tensor:
        """[dims, rows, components] of z [K, rows]."""
        return (z[dims, :, None] - self.mu[dims, None, :]).mul_(self.scale[dims, None, :])

    def terms(self, z: Tensor, constants: Tensor, rows: int, step: int) -> Tensor:
        """constants - sum_k r^2 / 2, [rows, components], by blocks."""
        terms = z.new_zeros(z.shape[1], self.mu.shape[1])
        for part in parts(len(terms), rows):
            squares = terms[part]
            for dims in parts(len(z), step):
                r = self.differences(z[:, part], dims)
                if len(r) == 1:
                    squares.addcmul_(r[0], r[0])
                else:
                    squares.add_(r.square_().sum(0))
            torch.add(constants, squares, alpha=-0.5, out=squares)
        return terms


def constants_of(logvar: Tensor, log_weights: Tensor | None) -> Tensor:
    """What of each component's term does not depend on z, [N]."""
    weights = -math.log(len(logvar)) if log_weights is None else log_weights
    constants: Tensor = weights - 0.5 * (logvar + LOG_2PI).sum(1)
    return constants


class _OfBlocks(torch.autograd.Function):
    """The value, block by block. Kept for backward: the inputs and the value, from which each block's terms are
    computed again.
    """

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor | None) -> Tensor:
        z, mu, logvar, log_weights = together(*tensors)
        pairs, constants, z = Pairs(mu, logvar), constants_of(logvar, log_weights), z.t().contiguous()
        held, *block = block_of(z.shape[1], len(mu), len(z))
        value: Tensor = z.new_empty(z.shape[1])
        for part in parts(len(value), held):
            value[part] = torch.logsumexp(pairs.terms(z[:, part], constants, *block), 1)
        ctx.save_for_backward(*tensors, value)
        return value

    @staticmethod
    def backward(ctx: Any, value_grad: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, value = ctx.saved_tensors
        if torch.is_grad_enabled() or not runs_in_blocks(*tensors, value_grad):
            return tuple(differentiable_gradients(tensors, ctx.needs_input_grad, value_grad))
        return tuple(_gradients(tensors, value, ctx.needs_input_grad, value_grad))


def _gradients(
    tensors: Sequence[Tensor | None], value: Tensor, needed: Sequence[bool], value_grad: Tensor
) -> Iterator[Tensor | None]:
    """Sums of w, w (r^2 - 1) / 2 and w r e^(-logvar / 2) over pairs, with w = value_grad * exp(term - value)."""
    z, mu, logvar, log_weights = together(*tensors)
    pairs, constants, z = Pairs(mu, logvar), constants_of(logvar, log_weights), z.t().contiguous()
    held, rows, step = block_of(z.shape[1], len(mu), len(z))
    of_z, of_components = needed[0], needed[1] or needed[2]
    z_grad = torch.empty_like(z)
    mu_grad, logvar_grad = torch.zeros_like(pairs.mu), torch.zeros_like(pairs.mu)
    weights_grad = z.new_zeros(len(mu))
    # Where all terms are -infinity, their weights are 0: -infinity less 0.
    finite = torch.where(value == -math.inf, 0.0, value)
    for part in parts(len(value), held):
        w = pairs.terms(z[:, part], constants, rows, step).sub_(finite[part, None]).exp_().mul_(value_grad[part, None])
        weights_grad += w.sum(0)
        for own in parts(len(w), rows):
            for dims in parts(len(z), step) if of_z or of_components else ():
                # A weight of 0 times the greatest number is 0, times infinity it would be NaN.
                greatest = torch.finfo(z.dtype).max
                r = pairs.differences(z[:, part][:, own], dims).clamp_(-greatest, greatest)
                weighted = w[own] * r
                if of_components:
                    mu_grad[dims] += weighted.sum(1)
                    logvar_grad[dims] += r.mul_(weighted).sum(1)
                if of_z:
                    z_grad[dims, part][:, own] = weighted.mul_(pairs.scale[dims, None, :]).sum(2)
    found = (
        -z_grad.t(),
        (mu_grad * pairs.scale).t(),
        0.5 * (logvar_grad - weights_grad).t(),
        weights_grad,
    )
    for tensor, gradient, need in zip(tensors, found, needed, strict=True):
        yield gradient.to(tensor.dtype).contiguous() if need and tensor is not None else None


def differentiable_gradients(
    tensors: Sequence[Tensor | None], needed: Sequence[bool], value_grad: Tensor
) -> Iterator[Tensor | None]:
    """The gradients by torch's own differentiation of the formula, where a backward pass is itself differentiated."""

    def of_needed(*wanted: Tensor) -> Tensor:
        each = iter(wanted)
        return formula(*[next(each) if need else x for x, need in zip(tensors, needed, strict=True)])  # type: ignore[arg-type]

    transformed: Any = torch.func.vjp(of_needed, *[x for x, need in zip(tensors, needed, strict=True) if need])
    gradients = iter(transformed[1](value_grad.to(transformed[0].dtype)))
    return iter([next(gradients) if need else None for need in needed])
