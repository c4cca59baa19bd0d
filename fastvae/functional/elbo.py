"""The negative evidence lower bound: reconstruction plus weighted divergence.

Source: Kingma and Welling, "Auto-Encoding Variational Bayes", 2013, equation 10; beta: Higgins et al., "beta-VAE",
    2017, equation 4.
"""

from __future__ import annotations

from torch import Tensor

from fastvae import reference
from fastvae.functional.checks import (
    FLOATING,
    check_batch,
    check_dense,
    check_device,
    check_scalar,
    check_target,
    refuse_transforms,
    takes_triton,
)
from fastvae.reference.elbo import ELBO


def elbo_loss(
    logits: Tensor,
    target: Tensor,
    kl: Tensor,
    *,
    beta: float | Tensor = 1.0,
    reconstruction_weight: float | Tensor = 0.5,
) -> ELBO:
    """loss = mean_B(reconstruction_weight * sum_event (sigmoid(logits) - target)^2) + beta * mean_B(kl), in nats.

    The default weight of one half is the negative log-likelihood of a unit-variance Gaussian decoder without its
    constant. All three results are differentiable in logits, target and kl; on the fused path their gradients leave
    in one launch.

    Args:
        logits: [B, ...], before the sigmoid; float16, bfloat16, float32, and float64 on the reference path.
        target: of the shape and device of logits; any of those dtypes, or uint8, which is read as t / 255.
        kl: [B], the divergence of each sample, as `gaussian_sample_kl` returns it.
        beta, reconstruction_weight: a number, or a 0-dimensional tensor on the device of logits, read there without a
            synchronisation (a number is frozen into a captured CUDA graph, a tensor is not).

    Returns:
        ELBO(loss, reconstruction, kl), 0-dimensional, float32 (float64): reconstruction is weighted, kl is the batch
        mean before beta.

    Raises:
        TypeError: a dtype or type that is not listed above.
        ValueError: shapes or devices that differ, a kl that is not [B], or a weight that requires grad.
    """
    beta, reconstruction_weight = _check(logits, target, kl, beta, reconstruction_weight)
    if takes_triton(logits, target, kl, inductor_fuses=True):
        from fastvae.autograd import elbo as fused

        return ELBO(*fused.elbo_loss(logits, target, kl, beta, reconstruction_weight))
    return reference.elbo.elbo_loss(logits, target, kl, beta=beta, reconstruction_weight=reconstruction_weight)


def elbo_value_and_grad(
    logits: Tensor,
    target: Tensor,
    kl: Tensor,
    *,
    beta: float | Tensor = 1.0,
    reconstruction_weight: float | Tensor = 0.5,
    grad_scale: float | Tensor | None = None,
) -> tuple[ELBO, tuple[Tensor, Tensor]]:
    """`elbo_loss` and its gradients in one launch: the fast path of a training loop.

    ``torch.autograd.backward((logits, kl), (dlogits, dkl))`` continues from the gradients. Nothing returned is
    attached to a graph; target gets no gradient.

    Args:
        logits, target, kl, beta, reconstruction_weight: as in `elbo_loss`.
        grad_scale: multiplies both gradients before they are rounded to their dtypes, so that float16 gradients do
            not underflow: a number or 0-dimensional tensor, such as a GradScaler's scale. The values are not scaled.

    Returns:
        ELBO(loss, reconstruction, kl), and (dlogits, dkl) of the shapes and dtypes of logits and kl.

    Raises what `elbo_loss` raises.
    """
    refuse_transforms("elbo_value_and_grad")
    beta, reconstruction_weight = _check(logits, target, kl, beta, reconstruction_weight)
    if grad_scale is not None:
        grad_scale = check_scalar("grad_scale", grad_scale, "logits", logits)
    if takes_triton(logits, target, kl, inductor_fuses=True):
        from fastvae.autograd import elbo as fused

        values, gradients = fused.elbo_value_and_grad(logits, target, kl, beta, reconstruction_weight, grad_scale)
        return ELBO(*values), gradients
    return reference.elbo.elbo_value_and_grad(
        logits, target, kl, beta=beta, reconstruction_weight=reconstruction_weight, grad_scale=grad_scale
    )


def _check(
    logits: Tensor, target: Tensor, kl: Tensor, beta: float | Tensor, reconstruction_weight: float | Tensor
) -> tuple[float | Tensor, float | Tensor]:
    check_batch("logits", logits)
    check_target(target, logits)
    return check_weighted_kl(kl, beta, reconstruction_weight, "logits", logits)


def check_weighted_kl(
    kl: Tensor, beta: float | Tensor, reconstruction_weight: float | Tensor, name: str, batch: Tensor
) -> tuple[float | Tensor, float | Tensor]:
    """The divergence of each sample of `batch`, and the weights of the bound, on its device; returns the weights."""
    if not isinstance(kl, Tensor) or kl.dtype not in FLOATING:
        raise TypeError(f"kl must be a floating-point tensor, got {getattr(kl, 'dtype', type(kl).__name__)}")
    check_dense("kl", kl)
    if kl.ndim != 1 or kl.shape[0] != batch.shape[0]:
        raise ValueError(
            f"kl must be the divergence of each sample, shape [{batch.shape[0]}] (reduction='none'), "
            f"got {list(kl.shape)}"
        )
    check_device("kl", kl, name, batch)
    beta = check_scalar("beta", beta, name, batch)
    return beta, check_scalar("reconstruction_weight", reconstruction_weight, name, batch)
