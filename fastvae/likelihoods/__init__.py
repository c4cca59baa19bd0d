"""Likelihoods of the data given a decoder's output. Each is one file, from which its operations are derived."""

from fastvae.likelihoods.bernoulli import Bernoulli
from fastvae.likelihoods.categorical import Categorical
from fastvae.likelihoods.checking import check
from fastvae.likelihoods.continuous_bernoulli import ContinuousBernoulli
from fastvae.likelihoods.discretized_logistic import DiscretizedLogistic
from fastvae.likelihoods.discretized_logistic_mixture import DiscretizedLogisticMixture
from fastvae.likelihoods.gaussian import Gaussian
from fastvae.likelihoods.laplace import Laplace
from fastvae.likelihoods.likelihood import Likelihood, NotImported, Term, from_key
from fastvae.likelihoods.multinomial import Multinomial
from fastvae.likelihoods.negative_binomial import NegativeBinomial
from fastvae.likelihoods.poisson import Poisson
from fastvae.likelihoods.sigmoid_mse import SigmoidMSE
from fastvae.likelihoods.validation import validate
from fastvae.likelihoods.zero_inflated import ZeroInflatedNegativeBinomial

__all__ = [
    "Bernoulli",
    "Categorical",
    "ContinuousBernoulli",
    "DiscretizedLogistic",
    "DiscretizedLogisticMixture",
    "Gaussian",
    "Laplace",
    "Likelihood",
    "Multinomial",
    "NegativeBinomial",
    "NotImported",
    "Poisson",
    "SigmoidMSE",
    "Term",
    "ZeroInflatedNegativeBinomial",
    "check",
    "from_key",
    "validate",
]
