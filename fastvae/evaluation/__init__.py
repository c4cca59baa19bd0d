"""Measurements after training, or between epochs, on images that the model has not seen."""

from fastvae.evaluation.anomaly import ROC, SCORES, anomaly_scores, roc
from fastvae.evaluation.batches import Batch
from fastvae.evaluation.latents import Posteriors, active_units, posteriors, principal_components
from fastvae.evaluation.likelihood import bits_per_dimension, elbo, log_likelihood
from fastvae.evaluation.reconstruction import Evaluation, evaluate, evaluate_batches, reconstruction_errors

__all__ = [
    "ROC",
    "SCORES",
    "Batch",
    "Evaluation",
    "Posteriors",
    "active_units",
    "anomaly_scores",
    "bits_per_dimension",
    "elbo",
    "evaluate",
    "evaluate_batches",
    "log_likelihood",
    "posteriors",
    "principal_components",
    "reconstruction_errors",
    "roc",
]
