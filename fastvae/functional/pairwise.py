"""Objectives of all pairs of two sets of vectors, in memory for the sets alone."""

from __future__ import annotations

from torch import Tensor

from fastvae import reference
from fastvae.functional.checks import FLOATING, check_dense, check_device, check_like, takes_triton


def gaussian_mixture_log_prob(z: Tensor, mu: Tensor, logvar: Tensor, log_weights: Tensor | None = None) -> Tensor:
    """log sum_n w_n N(z; mu_n, exp(logvar_n)), w = exp(log_weights), in nats: the log-density of a mixture of diagonal
    Gaussians, log 2 pi included. Differentiable in all four arguments.

    It is the log-density of a VampPrior or of another mixture as prior, and of the aggregated posterior.

    Args:
        z: [..., K], such as [B, K] or [S, B, K].
        mu, logvar: [N, K], of one dtype, on the device of z.
        log_weights: [N], taken as given: not normalised, and -infinity leaves a component out. ``log_softmax`` makes
            weights that are learned. None: -log N for each.

    Returns:
        The log-density, float32 (float64 where an argument is), of z's shape without its last dimension. Gradients have
        their inputs' dtypes; a sum is rounded once. Where all terms of a row are -infinity, so is its value, and its
        gradient is 0. NaN in a row of z makes that row's value NaN, and no other.

    Raises:
        TypeError: not a floating-point tensor; mu and logvar of different dtypes.
        ValueError: shapes or devices that do not go together, no component, or no dimension.

    Source: Tomczak and Welling, "VAE with a VampPrior", 2017, equation 9.
    """
    _check_floating("z", z)
    if z.ndim < 1 or z.shape[-1] < 1:
        raise ValueError(f"z must have shape [..., K] with K at least 1, got {list(z.shape)}")
    _check_floating("mu", mu)
    if mu.ndim != 2 or mu.shape[0] < 1 or mu.shape[1] != z.shape[-1]:
        raise ValueError(
            f"mu must have shape [N, {z.shape[-1]}], N at least 1 and K of z {list(z.shape)}, got {list(mu.shape)}"
        )
    check_device("mu", mu, "z", z)
    check_like("logvar", logvar, "mu", mu)
    if logvar.dtype != mu.dtype:
        raise TypeError(f"logvar must have the dtype of mu, {mu.dtype}, got {logvar.dtype}")
    if log_weights is not None:
        _check_floating("log_weights", log_weights)
        if log_weights.shape != mu.shape[:1]:
            raise ValueError(f"log_weights must have shape [{mu.shape[0]}], got {list(log_weights.shape)}")
        check_device("log_weights", log_weights, "z", z)
    rows = z.reshape(-1, z.shape[-1])
    if takes_triton(z, mu, logvar, log_weights):
        from fastvae.autograd import mixture as fused

        return fused.gaussian_mixture_log_prob(rows, mu, logvar, log_weights).view(z.shape[:-1])
    return reference.mixture.gaussian_mixture_log_prob(rows, mu, logvar, log_weights).view(z.shape[:-1])


def _check_floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
    check_dense(name, tensor)
