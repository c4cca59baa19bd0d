"""One function per operation: checks its input, asks `fastvae.backend`, and applies the fused operation or its
specification.
"""

from fastvae.functional.conv_elbo import conv_elbo_value_and_grad
from fastvae.functional.elbo import elbo_loss, elbo_value_and_grad
from fastvae.functional.gaussian import gaussian_kl, gaussian_sample, gaussian_sample_kl, gaussian_sample_kl_packed
from fastvae.functional.reconstruction import sigmoid_mse_loss
from fastvae.reference.elbo import ELBO

__all__ = [
    "ELBO",
    "conv_elbo_value_and_grad",
    "elbo_loss",
    "elbo_value_and_grad",
    "gaussian_kl",
    "gaussian_sample",
    "gaussian_sample_kl",
    "gaussian_sample_kl_packed",
    "sigmoid_mse_loss",
]
