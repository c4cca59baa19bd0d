"""Likelihoods of the data given a decoder's output. Each is one file, and its operations are derived from it."""

import importlib
from typing import TYPE_CHECKING

from fastvae.likelihoods.likelihood import Likelihood, NotImported, Term, from_key
from fastvae.likelihoods.sigmoid_mse import SigmoidMSE

if TYPE_CHECKING:
    from fastvae.likelihoods.bernoulli import Bernoulli
    from fastvae.likelihoods.categorical import Categorical
    from fastvae.likelihoods.checking import check
    from fastvae.likelihoods.continuous_bernoulli import ContinuousBernoulli
    from fastvae.likelihoods.discretized_logistic import DiscretizedLogistic
    from fastvae.likelihoods.discretized_logistic_mixture import DiscretizedLogisticMixture
    from fastvae.likelihoods.gaussian import Gaussian
    from fastvae.likelihoods.laplace import Laplace
    from fastvae.likelihoods.multinomial import Multinomial
    from fastvae.likelihoods.negative_binomial import NegativeBinomial
    from fastvae.likelihoods.poisson import Poisson
    from fastvae.likelihoods.validation import validate
    from fastvae.likelihoods.zero_inflated import ZeroInflatedNegativeBinomial

# Imported when they are first asked for, because all of them together double the time that importing fastvae takes.
_LATER = {
    "Bernoulli": "bernoulli",
    "Categorical": "categorical",
    "ContinuousBernoulli": "continuous_bernoulli",
    "DiscretizedLogistic": "discretized_logistic",
    "DiscretizedLogisticMixture": "discretized_logistic_mixture",
    "Gaussian": "gaussian",
    "Laplace": "laplace",
    "Multinomial": "multinomial",
    "NegativeBinomial": "negative_binomial",
    "Poisson": "poisson",
    "ZeroInflatedNegativeBinomial": "zero_inflated",
    "check": "checking",
    "validate": "validation",
}

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

if not TYPE_CHECKING:  # else a name that does not exist would have a type

    def __getattr__(name):
        if name not in _LATER:
            raise AttributeError(f"module 'fastvae.likelihoods' has no attribute {name!r}")
        globals()[name] = getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
        return globals()[name]
