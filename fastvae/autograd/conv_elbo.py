"""Registration of the negative evidence lower bound together with the decoder's last layer. It has the gradients
already, so there is no autograd.Function.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvae.autograd.elbo import Scalar, as_tensors
from fastvae.autograd.registration import is_traced, register
from fastvae.kernels import conv_elbo as kernels
from fastvae.kernels.layout import empty_gradients


def _fake(features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, kl: Tensor, *others: Any) -> Any:
    gradients = [*empty_gradients(features), weight.new_empty(weight.shape), kl.new_empty(kl.shape)]
    bias_grad = [] if bias is None else [bias.new_empty(bias.shape)]
    return [*kernels.allocate_values(features), *gradients, *bias_grad]


def _registered(features: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> list[Tensor]:
    """The launcher's results, none of which shares memory with another, as a registered operation's must not."""
    results = kernels.conv_elbo_value_and_grad(features, weight, bias, *others)
    if bias is not None:
        results[-1] = results[-1].clone()  # the end of the buffer that holds the weight's gradient
    return results


register(
    "conv_elbo_value_and_grad(Tensor features, Tensor weight, Tensor? bias, Tensor target, Tensor kl, bool relu, "
    "Tensor beta, Tensor reconstruction_weight, Tensor? grad_scale) -> Tensor[]",
    _registered,
    _fake,
)


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
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None, Tensor]]:
    launcher: Any = kernels.conv_elbo_value_and_grad
    scalars: Any = (beta, reconstruction_weight, grad_scale)
    if is_traced(features, weight, bias, target, kl, *scalars):
        launcher, scalars = torch.ops.fastvae.conv_elbo_value_and_grad, as_tensors(features, *scalars)
    tensors = (t if t is None else t.detach() for t in (features, weight, bias, target, kl))
    loss, reconstruction, mean_kl, features_grad, weight_grad, kl_grad, *bias_grad = launcher(*tensors, relu, *scalars)
    gradients = (features_grad, weight_grad, bias_grad[0] if bias_grad else None, kl_grad)
    return (loss, reconstruction, mean_kl), gradients
