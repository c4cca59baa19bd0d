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
        parameters: what the decoder returns, [B, ...]: a tensor, or a tuple of tensors in the order of
            ``likelihood.parameters``. Those after the first may be smaller: of a shape that is broadcast to the first
            one's, such as [G] for each column, [C, 1, 1] for each channel, [] for all, or [B, 1, 1, 1] for each sample.
            float16, bfloat16, float32, and float64 on the reference path; they may differ.
        target: of the shape and device of the first parameter; any of those dtypes, or uint8, which is read as t / 255
            where ``likelihood.target`` is "unit", as the number itself where it is "number". Its values are not
            checked: those that the likelihood does not have, such as negative counts, give NaN or a number that means
            nothing; `fastvae.likelihoods.validate` finds them.
        likelihood: one of `fastvae.likelihoods`, or one of your own.
        reduction: "none" per sample, shape [B]; "batchmean" their mean; "sum" over everything; "mean" over every
            element.

    Returns:
        The loss, float32 (float64), shape [B] or []. Gradients have their inputs' shapes and dtypes: that of a smaller
        parameter is a sum.

    Raises:
        TypeError: a dtype or type that is not listed above; a uint8 target of a likelihood that reads no bytes.
        ValueError: a target of another shape than the first parameter's, another parameter that is not broadcast to it,
            devices that differ, fewer than 2 dimensions, another number of parameters, or an unknown reduction.
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
