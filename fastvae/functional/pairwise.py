"""Objectives beyond the bound with a standard normal prior: of all pairs of two sets of vectors, in memory for the sets
alone, and of several samples.
"""

from __future__ import annotations

from torch import Tensor

from fastvae import reference
from fastvae.functional.checks import check_device, check_floating, check_integer, check_like, takes_triton
from fastvae.reference.importance import log_weights, normalised_weights

ESTIMATORS = ("iwae", "stl", "dreg")


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
    check_floating("z", z)
    if z.ndim < 1 or z.shape[-1] < 1:
        raise ValueError(f"z must have shape [..., K] with K at least 1, got {list(z.shape)}")
    check_floating("mu", mu)
    if mu.ndim != 2 or mu.shape[0] < 1 or mu.shape[1] != z.shape[-1]:
        raise ValueError(
            f"mu must have shape [N, {z.shape[-1]}], N at least 1 and K of z {list(z.shape)}, got {list(mu.shape)}"
        )
    check_device("mu", mu, "z", z)
    check_like("logvar", logvar, "mu", mu)
    if logvar.dtype != mu.dtype:
        raise TypeError(f"logvar must have the dtype of mu, {mu.dtype}, got {logvar.dtype}")
    if log_weights is not None:
        check_floating("log_weights", log_weights)
        if log_weights.shape != mu.shape[:1]:
            raise ValueError(f"log_weights must have shape [{mu.shape[0]}], got {list(log_weights.shape)}")
        check_device("log_weights", log_weights, "z", z)
    rows = z.reshape(-1, z.shape[-1])
    if takes_triton(z, mu, logvar, log_weights):
        from fastvae.autograd import mixture as fused

        return fused.gaussian_mixture_log_prob(rows, mu, logvar, log_weights).view(z.shape[:-1])
    return reference.mixture.gaussian_mixture_log_prob(rows, mu, logvar, log_weights).view(z.shape[:-1])


def importance_weighted_bound(
    log_p_x_given_z: Tensor,
    log_p_z: Tensor,
    log_q_z: Tensor,
    dim: int = 0,
    estimator: str = "iwae",
    *,
    z: Tensor | None = None,
) -> Tensor:
    """log (1 / S) sum_s exp(log w_s) with log w = log_p_x_given_z + log_p_z - log_q_z, in nats: a lower bound of
    log p(x), to be maximised (a loss is ``-bound.mean()``). With S = 1 it is the sample of the ELBO.

    The value is the same for every estimator, and so are the gradients of the three log-densities: g w, g w and -g w,
    with the normalised weights w. The estimators differ in how log_q_z was made, and "dreg" in what arrives at z:

    - "iwae": log_q_z from the posterior's parameters as they are.
    - "stl": from parameters that are detached, and z that is not::

          z = F.gaussian_sample(mu, logvar)
          posterior = torch.distributions.Normal(mu.detach(), torch.exp(logvar.detach() / 2))
          log_q_z = posterior.log_prob(z).sum(-1)

      The score is left out. Without bias for S = 1, where the gradient is 0 when the posterior is exact; with a bias
      for S > 1 (Tucker et al., 2018).
    - "dreg": log_q_z as for "stl", and z, the tensor that the densities were made from. A hook multiplies the
      gradient that arrives at z by w once more, so that the encoder's has no bias and less variance; the gradients of
      the decoder and of a learned prior stay as they are. All that z feeds is scaled, so other losses need a z of their
      own.

    Args:
        log_p_x_given_z, log_p_z, log_q_z: of one shape and device, such as [S, B].
        dim: the dimension of the S samples.
        estimator: "iwae", "stl" or "dreg".
        z: for "dreg", [S, B, ...]: its first dimensions are those of the log-densities. One that needs no gradient gets
            no hook.

    Returns:
        The bound, float32 (float64 where an argument is), without ``dim``. Where all samples are -infinity, so is the
        bound, and the gradient is 0.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: shapes or devices that differ, no sample, a dim that is out of range, an unknown estimator, "dreg"
            without z, another estimator with it, or a z of another shape.

    Source: Burda et al., "Importance Weighted Autoencoders", 2015, equation 8; "stl": Roeder et al., "Sticking the
        Landing", 2017; "dreg": Tucker et al., "Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives",
        2018.
    """
    names = ("log_p_x_given_z", "log_p_z", "log_q_z")
    given = (log_p_x_given_z, log_p_z, log_q_z)
    for name, tensor in zip(names, given, strict=True):
        check_floating(name, tensor)
        check_like(name, tensor, names[0], given[0])
    shape = given[0].shape
    dim = check_integer("dim", dim)
    if not -len(shape) <= dim < len(shape):
        raise ValueError(f"dim must name a dimension of log_p_x_given_z {list(shape)}, got {dim}")
    if shape[dim] == 0:
        raise ValueError(f"log_p_x_given_z must have at least one sample along dim {dim}, got {list(shape)}")
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    if (z is not None) != (estimator == "dreg"):
        raise ValueError(f'z must be given for the estimator "dreg", and for no other, got {estimator!r}')
    if z is not None:
        check_floating("z", z)
        if z.shape[: len(shape)] != shape:
            raise ValueError(f"z must have the log-densities' dimensions first, {list(shape)}, got {list(z.shape)}")
    rows = [tensor.movedim(dim, 0).reshape(shape[dim], -1) for tensor in given]
    if takes_triton(*rows):
        from fastvae.autograd import importance as fused

        bound = fused.importance_weighted_bound(*rows)
    else:
        bound = reference.importance.importance_weighted_bound(*rows)
    if z is not None:
        _scale_gradient_of(z, given, dim)
    return bound.view(shape[: dim % len(shape)] + shape[dim % len(shape) + 1 :])


def _scale_gradient_of(z: Tensor, given: tuple[Tensor, Tensor, Tensor], dim: int) -> None:
    """Multiply the gradient that arrives at z by the normalised weights."""
    shape = given[0].shape
    if not z.requires_grad:
        return
    detached = [tensor.detach() for tensor in given]

    def scaled(gradient: Tensor) -> Tensor:
        weights = normalised_weights(log_weights(*detached), dim)
        return (gradient * weights.view(*shape, *[1] * (gradient.ndim - len(shape)))).to(gradient.dtype)

    z.register_hook(scaled)  # type: ignore[no-untyped-call]
