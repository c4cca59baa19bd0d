"""The negative evidence lower bound together with the decoder's last layer, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae.reference.elbo import ELBO, elbo_value_and_grad
from fastvae.reference.precision import in_float32


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
    """elbo_value_and_grad of logits = conv_transpose2d(features, weight, bias, padding=k // 2), with the features first
    rectified if `relu`; the gradients of features, weight, bias and kl.
    """
    padding = [weight.shape[2] // 2] * 2
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        hidden = in_float32(features).relu() if relu else in_float32(features)
        wide_weight = in_float32(weight).to(hidden.dtype)
        wide_bias = None if bias is None else in_float32(bias).to(hidden.dtype)
        logits = torch.nn.functional.conv_transpose2d(hidden, wide_weight, wide_bias, padding=padding)
        values, (logits_grad, kl_grad) = elbo_value_and_grad(
            logits, target, kl, beta=beta, reconstruction_weight=reconstruction_weight, grad_scale=grad_scale
        )
        hidden_grad, weight_grad, _ = torch.ops.aten.convolution_backward(
            logits_grad, hidden, wide_weight, None, [1, 1], padding, [1, 1], True, [0, 0], 1, [True, True, False]
        )
        features_grad = hidden_grad.masked_fill(features <= 0, 0.0) if relu else hidden_grad
        bias_grad = None if bias is None else logits_grad.sum((0, 2, 3)).to(bias.dtype)
        return values, (features_grad.to(features.dtype), weight_grad.to(weight.dtype), bias_grad, kl_grad)
