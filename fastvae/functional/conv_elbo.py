"""The negative evidence lower bound together with the decoder's last layer, a convolution to the image's few channels.

Source: as `fastvae.functional.elbo`; the layer is `torch.nn.ConvTranspose2d` of stride 1.
"""

from __future__ import annotations

from torch import Tensor

from fastvae import reference
from fastvae.functional.checks import (
    FLOATING,
    check_batch,
    check_dense,
    check_device,
    check_pixels,
    check_scalar,
    refuse_transforms,
    takes_triton,
)
from fastvae.functional.elbo import check_weighted_kl
from fastvae.reference.elbo import ELBO

# What one program of the kernels holds in registers; a wider layer is a convolution like any other.
MAX_OUTPUTS, MAX_KERNEL, MAX_INPUTS = 4, 5, 256


def conv_elbo_value_and_grad(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    kl: Tensor,
    *,
    relu: bool = False,
    beta: float | Tensor = 1.0,
    reconstruction_weight: float | Tensor = 0.5,
    grad_scale: float | Tensor | None = None,
) -> tuple[ELBO, tuple[Tensor, Tensor, Tensor | None, Tensor]]:
    """`elbo_value_and_grad` of logits = conv_transpose2d(features, weight, bias, padding=k // 2), with the gradients of
    what the logits are made of.

    The decoder's last layer, a ReLU before it, the loss and all their gradients in two launches and a sum: neither the
    logits nor the rectified features reach memory. Continue by ``torch.autograd.backward((features, weight, bias, kl),
    gradients)``. Nothing returned is attached to a graph; target gets no gradient.

    Args:
        features: [B, C, H, W], C at most 256; float16, bfloat16, float32, and float64 on the reference path. Fastest in
            the channels_last memory format.
        weight: [C, O, k, k], O at most 4, k 1, 3 or 5; bias: [O] or None; of any of those dtypes.
        target: [B, O, H, W], of any of those dtypes, or uint8, which is read as t / 255.
        relu: take the maximum of features and 0 first.
        kl, beta, reconstruction_weight, grad_scale: as in `elbo_value_and_grad`.

    Returns:
        ELBO(loss, reconstruction, kl), and (dfeatures, dweight, dbias, dkl) of the shapes and dtypes of the arguments,
        dbias None without a bias. Products and sums are float32 (float64) in every dtype.

    Raises:
        TypeError: a dtype or type that is not listed above.
        ValueError: shapes or devices that differ or are out of these ranges, or a weight of the bound that requires
            grad.
    """
    refuse_transforms("conv_elbo_value_and_grad")
    _check(features, weight, bias, target)
    beta, reconstruction_weight = check_weighted_kl(kl, beta, reconstruction_weight, "features", features)
    if grad_scale is not None:
        grad_scale = check_scalar("grad_scale", grad_scale, "features", features)
    if takes_triton(features, weight, bias, target, kl):
        from fastvae.autograd import conv_elbo as fused

        values, gradients = fused.conv_elbo_value_and_grad(
            features, weight, bias, target, kl, relu, beta, reconstruction_weight, grad_scale
        )
        return ELBO(*values), gradients
    return reference.conv_elbo.conv_elbo_value_and_grad(
        features,
        weight,
        bias,
        target,
        kl,
        relu=relu,
        beta=beta,
        reconstruction_weight=reconstruction_weight,
        grad_scale=grad_scale,
    )


def _check(features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> None:
    check_batch("features", features)
    if features.ndim != 4 or not 1 <= features.shape[1] <= MAX_INPUTS or 0 in features.shape[2:]:
        raise ValueError(
            f"features must have shape [B, C, H, W] with C from 1 to {MAX_INPUTS} and H and W at least 1, "
            f"got {list(features.shape)}"
        )
    batch, inputs, *size = features.shape
    _check_parameter("weight", weight, features)
    kernels = [[k, k] for k in range(1, MAX_KERNEL + 1, 2)]
    if (
        weight.ndim != 4
        or weight.shape[0] != inputs
        or not 1 <= weight.shape[1] <= MAX_OUTPUTS
        or list(weight.shape[2:]) not in kernels
    ):
        raise ValueError(
            f"weight must have shape [{inputs}, O, k, k] with O from 1 to {MAX_OUTPUTS} and k odd, at most "
            f"{MAX_KERNEL}, got {list(weight.shape)}"
        )
    outputs = weight.shape[1]
    if bias is not None:
        _check_parameter("bias", bias, features)
        if list(bias.shape) != [outputs]:
            raise ValueError(f"bias must have shape [{outputs}], got {list(bias.shape)}")
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a torch.Tensor, got {type(target).__name__}")
    check_dense("target", target)
    if list(target.shape) != [batch, outputs, *size]:
        raise ValueError(f"target must have shape {[batch, outputs, *size]}, got {list(target.shape)}")
    check_device("target", target, "features", features)
    check_pixels(target)


def _check_parameter(name: str, tensor: Tensor, features: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATING:
        raise TypeError(
            f"{name} must be a floating-point tensor, got {getattr(tensor, 'dtype', type(tensor).__name__)}"
        )
    check_dense(name, tensor)
    check_device(name, tensor, "features", features)
