"""Find anomalies: images that a model explains worse than those that it was trained on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastvae.evaluation.likelihood import elbo
from fastvae.evaluation.reconstruction import reconstruction_errors
from fastvae.models import VAE

SCORES = ("reconstruction", "elbo")


def anomaly_scores(
    model: VAE,
    images: Tensor,
    *,
    score: str = "reconstruction",
    seed: int = 0,
    condition: Tensor | None = None,
) -> Tensor:
    """A score of each image, [N]. A larger score is more anomalous. Images and condition are as in `evaluate`.

    "reconstruction": the mean squared error of the reconstruction's pixels with z = mu. "elbo": minus the evidence
    lower bound, in nats (see `elbo`), with a sampled z. It includes the divergence of the posterior from the prior.

    Raises ``ValueError`` for another score, or if there are no images.
    """
    if score == "reconstruction":
        return reconstruction_errors(model, images, deterministic=True, condition=condition)
    if score == "elbo":
        return -elbo(model, images, seed=seed, condition=condition)
    raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")


class ROC(NamedTuple):
    """A receiver operating characteristic: the rates at each threshold, and the area under the curve, which is the
    probability that an anomaly has a higher score than a normal image.
    """

    false_positive_rate: NDArray[np.float64]
    true_positive_rate: NDArray[np.float64]
    auc: float


def roc(scores: Tensor, anomalous: Tensor) -> ROC:
    """The receiver operating characteristic of scores [N] as a test for anomalies. anomalous: bool [N], True for
    anomalies.

    Raises ``ValueError`` if all images are anomalies, or none, and ``ImportError`` if scikit-learn is missing.
    """
    try:
        from sklearn import metrics
    except ImportError as error:
        raise ImportError('roc needs scikit-learn: pip install "fastvae[examples]"') from error
    found = int(anomalous.sum())
    if found in (0, len(anomalous)):
        raise ValueError(f"anomalous must mark some of the {len(anomalous)} images and not all, got {found}")
    false_positive, true_positive, _ = metrics.roc_curve(anomalous.cpu().numpy(), scores.cpu().numpy())
    return ROC(false_positive, true_positive, float(metrics.auc(false_positive, true_positive)))
