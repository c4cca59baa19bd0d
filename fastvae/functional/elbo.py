"""The negative evidence lower bound: reconstruction plus weighted divergence.

Source: Kingma and Welling, "Auto-Encoding Variational Bayes", 2013, equation 10; beta: Higgins et al., "beta-VAE",
    2017, equation 4.
"""

from __future__ import annotations

from torch import Tensor

from fastvae import reference
from fastvae.functional.checks import (
    check_kl,
    check_likelihood,
    check_scalar,
    has_kernels,
    refuse_transforms,
    takes_triton,
)
from fastvae.likelihoods import Likelihood, SigmoidMSE
from fastvae.reference.elbo import ELBO


def elbo_loss(
    parameters: Tensor | tuple[Tensor, ...],
    target: Tensor,
    kl: Tensor,
    *,
    likelihood: Likelihood = SigmoidMSE(),
    beta: float | Tensor = 1.0,
    reconstruction_weight: float | Tensor | None = None,
) -> ELBO:
    """loss = mean_B(reconstruction_weight * -log p(target | parameters)) + beta * mean_B(kl), in nats.

    By default -log p is sum_event (sigmoid(logits) - target)^2 with the weight one half. This is a Gaussian decoder of
    unit variance, without its constant. All three results are differentiable in the parameters, target and kl. On the
    fused path one launch computes all gradients.

    Args:
        parameters, target, likelihood: as in `negative_log_likelihood`.
        kl: [B], the divergence of each sample, as `gaussian_sample_kl` returns it.
        beta, reconstruction_weight: a number, or a 0-dimensional tensor on the device of the parameters, which is read
            there without a synchronisation. A captured CUDA graph keeps the value of a number, and reads a tensor at
            each replay. With None the reconstruction has the likelihood's own weight: one half for `SigmoidMSE`, 1 for
            the others.

    Returns:
        ELBO(loss, reconstruction, kl), each 0-dimensional and float32 (float64 if an input is). reconstruction includes
        its weight. kl is the batch mean, without beta.

    Raises:
        TypeError: a dtype or type that is not listed above.
        ValueError: shapes that do not match, different devices, a kl that is not [B], or a weight that requires grad.
    """
    tensors, beta, weight = _checked(parameters, target, kl, likelihood, beta, reconstruction_weight)
    if has_kernels(likelihood, target) and takes_triton(*tensors, kl, inductor_fuses=True):
        from fastvae.autograd import elbo as fused

        return ELBO(*fused.elbo_loss(likelihood, tensors, kl, beta, weight))
    return reference.elbo.elbo_loss(
        tensors[:-1], target, kl, likelihood=likelihood, beta=beta, reconstruction_weight=weight
    )


def elbo_value_and_grad(
    parameters: Tensor | tuple[Tensor, ...],
    target: Tensor,
    kl: Tensor,
    *,
    likelihood: Likelihood = SigmoidMSE(),
    beta: float | Tensor = 1.0,
    reconstruction_weight: float | Tensor | None = None,
    grad_scale: float | Tensor | None = None,
) -> tuple[ELBO, tuple[Tensor | tuple[Tensor, ...], Tensor]]:
    """`elbo_loss` and its gradients in one launch: the fast path of a training loop.

    ``torch.autograd.backward((logits, kl), (dlogits, dkl))`` starts backward from these gradients. The results are not
    attached to a graph, and target gets no gradient.

    Args:
        parameters, target, kl, likelihood, beta, reconstruction_weight: as in `elbo_loss`.
        grad_scale: multiplies all gradients before they are rounded to their dtypes, so that float16 gradients do
            not underflow: a number or 0-dimensional tensor, such as a GradScaler's scale. The values are not scaled.

    Returns:
        ELBO(loss, reconstruction, kl), and (dparameters, dkl) with the shapes and dtypes of the parameters and kl.
        dparameters is a tensor if parameters is a tensor, and a tuple if it is a tuple. The gradient of a parameter
        that is smaller than the target is a sum.

    Raises what `elbo_loss` raises.
    """
    refuse_transforms("elbo_value_and_grad")
    tensors, beta, weight = _checked(parameters, target, kl, likelihood, beta, reconstruction_weight)
    if grad_scale is not None:
        grad_scale = check_scalar("grad_scale", grad_scale, likelihood.parameters[0], tensors[0])
    if likelihood.term is not None and takes_triton(*tensors, kl, inductor_fuses=True):
        from fastvae.autograd import elbo as fused

        values, gradients, kl_grad = fused.elbo_value_and_grad(likelihood, tensors, kl, beta, weight, grad_scale)
        return ELBO(*values), (gradients[0] if isinstance(parameters, Tensor) else gradients, kl_grad)
    return reference.elbo.elbo_value_and_grad(
        parameters,
        target,
        kl,
        likelihood=likelihood,
        beta=beta,
        reconstruction_weight=weight,
        grad_scale=grad_scale,
    )


def _checked(
    parameters: Tensor | tuple[Tensor, ...],
    target: Tensor,
    kl: Tensor,
    likelihood: Likelihood,
    beta: float | Tensor,
    reconstruction_weight: float | Tensor | None,
) -> tuple[tuple[Tensor, ...], float | Tensor, float | Tensor]:
    """The parameters and the target in one tuple, beta, and the weight of the reconstruction."""
    tensors = check_likelihood(parameters, target, likelihood)
    name, first = likelihood.parameters[0], tensors[0]
    check_kl(kl, name, first)
    beta = check_scalar("beta", beta, name, first)
    if reconstruction_weight is None:
        return tensors, beta, likelihood.reconstruction_weight
    return tensors, beta, check_scalar("reconstruction_weight", reconstruction_weight, name, first)
