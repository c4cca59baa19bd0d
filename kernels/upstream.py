"""Weights and upstream gradients in kernels that compute values or gradients."""

import triton
import triton.language as tl

from .numerics import load_scalar

# Samples whose kl gradient a program writes at a time: one for each thread of 4 warps.
KL_AT_ONCE = tl.constexpr(128)


@triton.jit
def store_everywhere(values_ptr, number, count):
    """values[:count] = number, by all programs together."""
    start = tl.program_id(0).to(tl.int64) * KL_AT_ONCE
    while start < count:
        index = start + tl.arange(0, KL_AT_ONCE)
        tl.store(values_ptr + index, number.to(values_ptr.dtype.element_ty), mask=index < count)
        start += tl.num_programs(0).to(tl.int64) * KL_AT_ONCE


@triton.jit
def store_kl_gradient(
    kl_grad_ptr, loss_ptr, loss_grad_ptr, mean_kl_grad_ptr, beta, grad_scale, scale, batch,
):  # fmt: skip
    """The gradient of kl, one number for all samples: of grad_scale * loss where the loss is computed, else of the
    upstream gradients.
    """
    if loss_ptr is not None:
        factor = load_scalar(beta) * load_scalar(grad_scale)
    else:
        factor = 0.0
        if mean_kl_grad_ptr is not None:
            factor += tl.load(mean_kl_grad_ptr)
        if loss_grad_ptr is not None:
            factor += load_scalar(beta) * tl.load(loss_grad_ptr)
    store_everywhere(kl_grad_ptr, factor * scale, batch)


@triton.jit
def factor_of_slopes(loss_ptr, loss_grad_ptr, reconstruction_grad_ptr, weight, grad_scale, scale):
    """The factor of the slopes if all samples share it: for the gradient of grad_scale * loss, or from the upstream
    gradients.
    """
    if loss_ptr is not None:
        value_grad = load_scalar(grad_scale)
    else:
        value_grad = 0.0
        if reconstruction_grad_ptr is not None:
            value_grad += tl.load(reconstruction_grad_ptr)
        if loss_grad_ptr is not None:
            value_grad += tl.load(loss_grad_ptr).to(tl.float32)
    return scale * value_grad * load_scalar(weight)


@triton.jit
def in_elements(units, ALIGNMENT: tl.constexpr):
    """A distance in elements, from units of ALIGNMENT, so that the compiler knows that ALIGNMENT divides it."""
    return tl.cast(units, tl.int64) * ALIGNMENT
