"""Kernels of the negative evidence lower bound together with the decoder's last layer, a transposed convolution of
stride 1 to a few channels: its logits never reach memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elbo import KL_PER_PROGRAM, Scalar, allocate_values, as_argument, store_share, store_values
from .launch import Plan, launch, make_plan, ticket
from .layout import dense_strides, gradient_strides, has_dense_rows, remembered, with_strides
from .numerics import load_scalar, to_float32
from .reconstruction import load_target, sigmoid_mse
from .tiles import UNSPECIALIZED, drew_last_ticket, power_of_2, program_tile, sum_in_order


@triton.jit
def rectified(x, RELU: tl.constexpr):
    if RELU:
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return x


@triton.jit
def image_tile(
    chunks, channel_stride, INPUTS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    PIXEL_STRIDE: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """What a program has: (image, pixels [PIXELS], channels [CHANNELS], which of each there are, offsets of their
    features [PIXELS, CHANNELS] in the image).
    """
    row, first = program_tile(chunks, False, 1, PIXELS)
    pixel = first.to(tl.int32) + tl.arange(0, PIXELS)
    channel = tl.arange(0, CHANNELS)
    offsets = pixel.to(tl.int64)[:, None] * PIXEL_STRIDE + channel.to(tl.int64)[None, :] * channel_stride
    return row, pixel, channel, pixel < HEIGHT * WIDTH, channel < INPUTS, offsets


@triton.jit
def has_neighbour(pixel, down: tl.constexpr, right: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Which pixels have one in their image that is so far away."""
    y, x = pixel // WIDTH + down, pixel % WIDTH + right
    return (pixel < HEIGHT * WIDTH) & (y >= 0) & (y < HEIGHT) & (x >= 0) & (x < WIDTH)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def conv_elbo_forward_kernel(
    features_ptr, weight_ptr, bias_ptr, target_ptr, kl_ptr, loss_ptr, reconstruction_ptr, mean_kl_ptr,
    logits_grad_ptr, kl_grad_ptr, partial_ptr, ticket_ptr, beta, reconstruction_weight, grad_scale,
    chunks, row_stride, channel_stride, target_row_stride, target_pixel_stride, target_channel_stride,
    kl_stride, batch, inverse_batch,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, KERNEL: tl.constexpr,
    PIXEL_STRIDE: tl.constexpr, RELU: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """logits = conv_transpose2d(features, weight, bias, padding=KERNEL // 2), with the features first rectified if
    RELU; of them the values of `elbo_forward_kernel` and the gradients of loss times grad_scale: logits_grad and
    kl_grad.

    Shapes: features [batch, INPUTS, HEIGHT, WIDTH], target [batch, OUTPUTS, HEIGHT, WIDTH], both of the given strides;
    weight [INPUTS, OUTPUTS, KERNEL, KERNEL] and logits_grad float32 [batch, OUTPUTS, HEIGHT, WIDTH], contiguous;
    bias [OUTPUTS] or None; kl [batch] at distance kl_stride; kl_grad [batch], dense; everything else []. A program
    has PIXELS of an image. beta, reconstruction_weight and grad_scale are numbers or pointers to one. partial is
    float32 [programs] and ticket int32 [1], zero.
    Bytes per float32 feature: reads 4, and per pixel and output 4 more for the target (1 of uint8), writes 4; 8 more
    per program. (Each feature is read KERNEL^2 times, but the first from the cache.)
    Launches: 1. Roundings: a logit KERNEL^2 + log2(CHANNELS) + 2, and then those of `elbo_forward_kernel`.
    Deterministic: no floating-point atomics, partial sums are added in order.
    What is beyond an image's border counts as 0, so that an infinite weight gives NaN there.
    """
    row, pixel, channel, inside, is_channel, offsets = image_tile(
        chunks, channel_stride, INPUTS, HEIGHT, WIDTH, PIXEL_STRIDE, PIXELS, CHANNELS
    )
    features_ptr += row * row_stride + offsets

    products = tl.tuple([tl.zeros([PIXELS, CHANNELS], tl.float32)] * OUTPUTS)
    for tap in tl.static_range(KERNEL * KERNEL):
        down, right = KERNEL // 2 - tap // KERNEL, KERNEL // 2 - tap % KERNEL
        exists = has_neighbour(pixel, down, right, HEIGHT, WIDTH)
        is_feature = exists[:, None] & is_channel[None, :]
        feature = tl.load(features_ptr + (down * WIDTH + right) * PIXEL_STRIDE, mask=is_feature, other=0.0)
        feature = rectified(to_float32(feature, FAST), RELU)
        added = ()
        for output in tl.static_range(OUTPUTS):
            weight = tl.load(
                weight_ptr + (channel * OUTPUTS + output) * (KERNEL * KERNEL) + tap, mask=is_channel, other=0.0
            ).to(tl.float32)
            added = added + (tl.fma(feature, weight[None, :], products[output]),)  # noqa: RUF005 - Triton knows no *
        products = added

    error_weight = load_scalar(reconstruction_weight) * inverse_batch
    squares = tl.zeros([PIXELS], tl.float32)
    for output in tl.static_range(OUTPUTS):
        logits = tl.sum(products[output], axis=1)
        if bias_ptr is not None:
            logits += tl.load(bias_ptr + output).to(tl.float32)
        at = target_ptr + row * target_row_stride + tl.cast(target_channel_stride, tl.int64) * output
        target = load_target(at + pixel.to(tl.int64) * target_pixel_stride, inside)
        error, slope = sigmoid_mse(logits, target, FAST)
        squares += tl.where(inside, error * error, 0.0)
        grad = (2.0 * error_weight * load_scalar(grad_scale)) * (error * slope)
        tl.store(logits_grad_ptr + (row * OUTPUTS + output) * (HEIGHT * WIDTH) + pixel, grad, mask=inside)

    # There is a program for each sample, at least.
    store_share(kl_grad_ptr, load_scalar(beta) * inverse_batch * load_scalar(grad_scale), batch, KL_PER_PROGRAM)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(squares))
    if drew_last_ticket(ticket_ptr):
        total = sum_in_order(partial_ptr, tl.num_programs(0), 1, BLOCK)
        store_values(
            total, kl_ptr, loss_ptr, reconstruction_ptr, mean_kl_ptr, beta, error_weight, kl_stride, batch,
            inverse_batch, BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALIZED)
def conv_elbo_backward_kernel(
    features_ptr, weight_ptr, logits_grad_ptr, features_grad_ptr, partial_ptr,
    chunks, row_stride, grad_row_stride, channel_stride,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, KERNEL: tl.constexpr,
    PIXEL_STRIDE: tl.constexpr, RELU: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gradients of the features, and each program's part of those of weight and bias, from logits_grad.

    Shapes: as in the forward kernel; features_grad of the features' strides but for the distance of its rows; partial
    float32 [programs, INPUTS * OUTPUTS * KERNEL^2 + OUTPUTS], a program's sums over its pixels.
    Bytes per float32 feature: reads 4, writes 4, and 4 per pixel and output read for logits_grad; and the partial sums.
    Launches: 1. Roundings: features_grad OUTPUTS * KERNEL^2; a sum log2(PIXELS) + 1. Deterministic.
    """
    row, pixel, channel, inside, is_channel, offsets = image_tile(
        chunks, channel_stride, INPUTS, HEIGHT, WIDTH, PIXEL_STRIDE, PIXELS, CHANNELS
    )
    is_feature = inside[:, None] & is_channel[None, :]
    feature = tl.load(features_ptr + row * row_stride + offsets, mask=is_feature, other=0.0).to(tl.float32)
    hidden = rectified(feature, RELU)

    taps: tl.constexpr = KERNEL * KERNEL
    partial_ptr += tl.program_id(0).to(tl.int64) * (INPUTS * OUTPUTS * taps + OUTPUTS)
    grad = tl.zeros([PIXELS, CHANNELS], tl.float32)
    for output in tl.static_range(OUTPUTS):
        logits_grads = logits_grad_ptr + (row * OUTPUTS + output) * (HEIGHT * WIDTH) + pixel
        for tap in tl.static_range(taps):
            # The pixel whose logit this tap carries these features to.
            down, right = tap // KERNEL - KERNEL // 2, tap % KERNEL - KERNEL // 2
            exists = has_neighbour(pixel, down, right, HEIGHT, WIDTH)
            logits_grad = tl.load(logits_grads + (down * WIDTH + right), mask=exists, other=0.0)
            at = (channel * OUTPUTS + output) * taps + tap
            weight = tl.load(weight_ptr + at, mask=is_channel, other=0.0).to(tl.float32)
            grad = tl.fma(logits_grad[:, None], weight[None, :], grad)
            weight_grad = tl.sum(hidden * logits_grad[:, None], axis=0)
            tl.store(partial_ptr + at, weight_grad, mask=is_channel)
        own = tl.load(logits_grads, mask=inside, other=0.0)
        tl.store(partial_ptr + INPUTS * OUTPUTS * taps + output, tl.sum(own))
    if RELU:
        grad = tl.where(feature <= 0.0, 0.0, grad)
    at = features_grad_ptr + row * grad_row_stride + offsets
    tl.store(at, grad.to(features_grad_ptr.dtype.element_ty), mask=is_feature)


def as_pixels(images: Tensor) -> Tensor:
    """`images` [B, C, H, W] if their pixels lie at one distance from each other, as in contiguous and channels_last
    images, else a channels_last copy.
    """
    if images.is_neg() or (images.shape[2] > 1 and images.stride(2) != images.shape[3] * images.stride(3)):
        return images.resolve_neg().contiguous(memory_format=torch.channels_last)
    return images


def pixels_of_program(channels: int, products: int, most: int) -> int:
    """So many that a program of 4 warps holds 32 numbers per thread for all its products of features and weights, and
    at least the 16 that one load of 16 bytes per thread covers with 32 channels of float32.
    """
    return max(16, min(most, 4096 // (channels * power_of_2(products))))


class Layer(NamedTuple):
    """What both kernels are planned by."""

    batch: int
    inputs: int
    height: int
    width: int
    outputs: int
    kernel: int
    relu: bool
    strides: tuple[int, int, int]  # of the features, see `pixel_strides`

    @property
    def channels(self) -> int:
        return max(4, power_of_2(self.inputs))

    def chunks(self, pixels: int) -> int:
        """Programs per image."""
        return -(-self.height * self.width // pixels)

    def constants(self, pixels: int) -> dict[str, int]:
        return {
            "INPUTS": self.inputs, "OUTPUTS": self.outputs, "HEIGHT": self.height, "WIDTH": self.width,
            "KERNEL": self.kernel, "RELU": self.relu, "PIXEL_STRIDE": self.strides[1], "CHANNELS": self.channels,
            "PIXELS": pixels,
        }  # fmt: skip


@remembered
def plan_forward(layer: Layer, target_strides: tuple[int, int, int], kl_stride: int) -> Plan:
    row_stride, _, channel_stride = layer.strides
    # With 128, triton 3.6 loads the features of all taps first, and spills.
    pixels = pixels_of_program(layer.channels, layer.outputs, most=64)
    chunks = layer.chunks(pixels)
    return make_plan(
        layer.batch * chunks,
        4,
        chunks,
        row_stride,
        channel_stride,
        *target_strides,
        kl_stride,
        layer.batch,
        1.0 / layer.batch,
        **layer.constants(pixels),
        BLOCK=1024,
    )


@remembered
def plan_backward(layer: Layer, grad_row_stride: int) -> Plan:
    row_stride, _, channel_stride = layer.strides
    pixels = pixels_of_program(layer.channels, 1, most=128)
    chunks = layer.chunks(pixels)
    constants = layer.constants(pixels)
    return make_plan(layer.batch * chunks, 4, chunks, row_stride, grad_row_stride, channel_stride, **constants)


def conv_elbo_value_and_grad(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    kl: Tensor,
    relu: bool,
    beta: Scalar,
    reconstruction_weight: Scalar,
    grad_scale: Scalar | None,
) -> list[Tensor]:
    """loss, reconstruction, mean_kl, and the gradients of features, weight, kl, and bias if there is one."""
    batch, _, height, width = features.shape
    outputs, kernel = weight.shape[1], weight.shape[2]
    values = allocate_values(features)
    kl_grad = kl.new_empty(kl.shape)
    read_features, target = as_pixels(features), as_pixels(target)
    if not has_dense_rows(read_features):  # their gradient is written at the same strides
        read_features = read_features.contiguous(memory_format=torch.channels_last)
    features_grad = features.new_empty_strided(features.shape, dense_strides(read_features))
    terms = weight.numel() + outputs
    if batch == 0:
        for value in values:
            value.fill_(float("nan"))
        sums = values[0].new_zeros(terms)
    else:
        weight_in_order = weight.resolve_neg().contiguous()
        kl = kl.resolve_neg()
        logits_grad = values[0].new_empty(batch, outputs, height, width)
        layer = Layer(*features.shape, outputs, kernel, relu, pixel_strides(read_features))
        plan = plan_forward(layer, pixel_strides(target), kl.stride(0))
        launch(
            conv_elbo_forward_kernel,
            plan,
            features.device,
            read_features,
            weight_in_order,
            None if bias is None else bias.resolve_neg().contiguous(),
            target,
            kl,
            *values,
            logits_grad,
            kl_grad,
            values[0].new_empty(plan.programs),
            ticket(features.device),
            as_argument(beta),
            as_argument(reconstruction_weight),
            as_argument(1.0 if grad_scale is None else grad_scale),
        )
        plan = plan_backward(layer, features_grad.stride(0))
        parts = values[0].new_empty(plan.programs, terms)
        launch(
            conv_elbo_backward_kernel,
            plan,
            features.device,
            read_features,
            weight_in_order,
            logits_grad,
            features_grad,
            parts,
        )
        sums = parts.sum(0)
    weight_grad = sums[: weight.numel()].view(weight.shape).to(weight.dtype)
    gradients = [with_strides(features_grad, gradient_strides(features)), weight_grad, kl_grad]
    return [*values, *gradients, *([] if bias is None else [sums[weight.numel() :].to(bias.dtype)])]


def pixel_strides(images: Tensor) -> tuple[int, int, int]:
    """(row, pixel, channel) of what `as_pixels` returns."""
    row, channel, line, pixel = images.stride()
    return row, line if images.shape[3] == 1 else pixel, channel
