"""One function per operation: checks its input, asks `fastvae.backend`, and applies the fused operation or its
specification.
"""

from fastvae.functional.elbo import elbo_loss, elbo_value_and_grad
from fastvae.functional.gaussian import gaussian_kl, gaussian_sample, gaussian_sample_kl, gaussian_sample_kl_packed
from fastvae.functional.reconstruction import sigmoid_mse_loss
from fastvae.reference.elbo import ELBO

__all__ = [
    "ELBO",
    "elbo_loss",
    "elbo_value_and_grad",
    "gaussian_kl",
    "gaussian_sample",
    "gaussian_sample_kl",
    "gaussian_sample_kl_packed",
    "sigmoid_mse_loss",
]
