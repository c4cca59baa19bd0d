"""One function per operation. It checks its input, asks `fastvae.backend` for the path, and calls the fused operation
or its specification.
"""

from fastvae.functional.decomposition import total_correlation
from fastvae.functional.discrepancy import maximum_mean_discrepancy
from fastvae.functional.elbo import elbo_loss, elbo_value_and_grad
from fastvae.functional.gaussian import gaussian_kl, gaussian_sample, gaussian_sample_kl, gaussian_sample_kl_packed
from fastvae.functional.likelihood import negative_log_likelihood, sigmoid_mse_loss
from fastvae.functional.pairwise import gaussian_mixture_log_prob, importance_weighted_bound
from fastvae.reference.elbo import ELBO
from fastvae.reference.total_correlation import TotalCorrelationTerms

__all__ = [
    "ELBO",
    "TotalCorrelationTerms",
    "elbo_loss",
    "elbo_value_and_grad",
    "gaussian_kl",
    "gaussian_mixture_log_prob",
    "gaussian_sample",
    "gaussian_sample_kl",
    "gaussian_sample_kl_packed",
    "importance_weighted_bound",
    "maximum_mean_discrepancy",
    "negative_log_likelihood",
    "sigmoid_mse_loss",
    "total_correlation",
]
