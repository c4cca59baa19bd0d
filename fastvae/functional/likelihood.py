"""The negative log-likelihood of the data given a decoder's output."""

from __future__ import annotations

from torch import Tensor

from fastvae import reference
from fastvae.functional.checks import check_likelihood, check_reduction, has_kernels, takes_triton
from fastvae.likelihoods import Likelihood, SigmoidMSE

SIGMOID_MSE = SigmoidMSE()


def negative_log_likelihood(
    parameters: Tensor | tuple[Tensor, ...], target: Tensor, likelihood: Likelihood, *, reduction: str = "batchmean"
) -> Tensor:
    """-log p(target | parameters) in nats, summed over each sample's event, differentiable in parameters and target.

    Args:
        parameters: the output of the decoder, [B, ...]: a tensor, or a tuple of tensors in the order of
            ``likelihood.parameters``. All but the first may have any shape that can be broadcast to the shape of the
            first, such as [G] for each column, [C, 1, 1] for each channel, [] for all, or [B, 1, 1, 1] for each sample.
            The dtypes are float16, bfloat16, float32, and float64 on the reference path. They may differ.
        target: has the shape and device of the first parameter, and one of those dtypes or uint8. uint8 is read as t /
            255 if ``likelihood.target`` is "unit", and as the number itself if it is "number". The values are not
            checked. Values that the likelihood does not allow, such as negative counts, give NaN or a meaningless
            number; `fastvae.likelihoods.validate` finds them.
        likelihood: one of `fastvae.likelihoods`, or one of your own.
        reduction: "none" per sample, shape [B]; "batchmean" their mean; "sum" over everything; "mean" over every
            element.

    Returns:
        The loss, float32 (float64 if an input is), shape [B] or []. Gradients have the shapes and dtypes of their
        inputs. The gradient of a smaller parameter is a sum.

    Raises:
        TypeError: a dtype or type that is not listed above, or a uint8 target for a likelihood that reads no bytes.
        ValueError: the target has another shape than the first parameter, another parameter cannot be broadcast to it,
            devices differ, there are fewer than 2 dimensions, the number of parameters is wrong, or the reduction is
            unknown.
    """
    tensors = check_likelihood(parameters, target, likelihood)
    check_reduction(reduction)
    if has_kernels(likelihood, target) and takes_triton(*tensors, inductor_fuses=True):
        from fastvae.autograd import likelihood as fused

        return fused.negative_log_likelihood(likelihood, tensors, reduction)
    return reference.likelihood.negative_log_likelihood(tensors[:-1], target, likelihood, reduction=reduction)


def sigmoid_mse_loss(logits: Tensor, target: Tensor, *, reduction: str = "batchmean") -> Tensor:
    """(sigmoid(logits) - target)^2 summed over each sample's event, differentiable in logits and target.

    It is `negative_log_likelihood` with `fastvae.likelihoods.SigmoidMSE`: arguments, result and errors are the same.
    With reduction="mean" it is exactly ``torch.nn.functional.mse_loss(torch.sigmoid(logits), target)``.
    """
    return negative_log_likelihood(logits, target, SIGMOID_MSE, reduction=reduction)
