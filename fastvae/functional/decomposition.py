"""The divergence from the prior in three parts, of all pairs of a minibatch's samples and posteriors."""

from __future__ import annotations

from torch import Tensor

from fastvae import reference
from fastvae.functional.checks import check_floating, check_integer, check_like, takes_triton
from fastvae.reference.total_correlation import TotalCorrelationTerms

WEIGHTINGS = ("minibatch", "stratified")


def total_correlation(
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    dataset_size: int,
    weighting: str = "minibatch",
    *,
    reduction: str = "batchmean",
) -> TotalCorrelationTerms:
    """The divergence of the posterior from the prior N(0, I) in three parts, in nats, estimated from a minibatch:

    - ``mutual_information``: log q(z_i|x_i) - log q(z_i), of the data and the latents;
    - ``total_correlation``: log q(z_i) - sum_k log q(z_ik), how much the latents depend on each other;
    - ``dimension_kl``: sum_k log q(z_ik) - log N(z_i; 0, I), how far each latent is from the prior.

    Their sum is log q(z_i|x_i) - log N(z_i; 0, I). The loss of beta-TCVAE is reconstruction + mutual_information +
    beta * total_correlation + dimension_kl. q(z) is the mixture of the posteriors of all data. It is estimated from
    those of the batch, with weights that say how many each stands for:
    log q(z_i) = log sum_j W_ij N(z_i; mu_j, exp(logvar_j)), and log q(z_ik) alike, of dimension k alone. W_ij is

    - "minibatch": 1 / (dataset_size * B). Biased: with equal posteriors the mutual information is log dataset_size, and
      the total correlation K - 1 times that.
    - "stratified": with M = B - 1, 1 / dataset_size for j = i, (dataset_size - M) / (dataset_size * M) for the
      following row (of the last row: the first), and else 1 / M. They sum to 1, and over all minibatches the mean
      of q(z_i), and of each q(z_ik), is that of the whole data set. Their logarithms are biased still.

    The parts are estimates, so each may be negative. Nothing is detached: gradients reach z, mu and logvar through
    every density.

    Args:
        z: [B, K], where row i is a sample of the posterior of row i.
        mu, logvar: [B, K], of one dtype, on the device of z.
        dataset_size: the number of examples that the batch was drawn from, a Python integer.
        weighting: "minibatch" or "stratified".
        reduction: "batchmean", the means over the batch, or "none", the numbers of each row.

    Returns:
        TotalCorrelationTerms(mutual_information, total_correlation, dimension_kl), float32 (float64 where an argument
        is), each 0-dimensional, or [B] for "none". Gradients have their inputs' dtypes; a sum is rounded once. NaN in
        a row of z makes that row's numbers NaN, and no other's.

    Raises:
        TypeError: not a floating-point tensor; mu and logvar of different dtypes; a dataset_size that is no integer.
        ValueError: shapes or devices that do not go together, no row or no dimension, a dataset_size that is not
            positive, an unknown weighting or reduction; "stratified" of one row, or of more rows than dataset_size.

    Source: Chen et al., "Isolating Sources of Disentanglement in Variational Autoencoders", 2018: equation 2, section 4
        ("minibatch") and appendix C ("stratified").
    """
    check_floating("z", z)
    if z.ndim != 2 or 0 in z.shape:
        raise ValueError(f"z must have shape [B, K] with B and K at least 1, got {list(z.shape)}")
    check_floating("mu", mu)
    check_like("mu", mu, "z", z)
    check_like("logvar", logvar, "mu", mu)
    if logvar.dtype != mu.dtype:
        raise TypeError(f"logvar must have the dtype of mu, {mu.dtype}, got {logvar.dtype}")
    dataset_size = check_integer("dataset_size", dataset_size)
    if dataset_size < 1:
        raise ValueError(f"dataset_size must be at least 1, got {dataset_size}")
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
    if reduction not in ("batchmean", "none"):
        raise ValueError(f"reduction must be one of batchmean, none, got {reduction!r}")
    if weighting == "stratified" and not 2 <= z.shape[0] <= dataset_size:
        raise ValueError(
            f'the weighting "stratified" takes a batch of at least 2 rows and at most dataset_size, {dataset_size}, '
            f"got {z.shape[0]}"
        )
    if takes_triton(z, mu, logvar):
        from fastvae.autograd import total_correlation as fused

        reduced = reduction == "batchmean"
        return TotalCorrelationTerms(*fused.total_correlation(z, mu, logvar, dataset_size, weighting, reduced))
    return reference.total_correlation.total_correlation(z, mu, logvar, dataset_size, weighting, reduction=reduction)
