"""A VAE of fully connected layers, for the rows of a table."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from torch import nn

from fastvae.functional.checks import check_is_likelihood
from fastvae.likelihoods import Gaussian, Likelihood, from_key
from fastvae.models.conv_vae import Split
from fastvae.models.vae import VAE, made_prior, positive_integers
from fastvae.priors import Prior

_SQUARED_ERROR = Gaussian(std=1.0)


class TabularVAE(VAE):
    """Variational autoencoder of rows [B, F] with a diagonal Gaussian posterior: fully connected layers with ReLU
    between them, and in the decoder the same in reverse order.

    Args:
        columns: F.
        latent_dim: K, the size of z.
        hidden: the sizes of the encoder's layers between, first to last.
        likelihood: of the rows, or its ``key``, as `settings` hold it. The default is the squared error of a linear
            decoder, for standardised numbers.
        prior: one of `fastvae.priors`, or its settings, as `settings` hold them; None: N(0, I).

    Raises:
        TypeError: a likelihood that is none.
        ValueError: a size that is not a positive integer, or a key that names no likelihood.
    """

    def __init__(
        self,
        columns: int,
        latent_dim: int = 8,
        hidden: tuple[int, ...] = (128, 64),
        likelihood: Likelihood | str = _SQUARED_ERROR,
        prior: Prior | Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(likelihood, str):
            likelihood = from_key(likelihood)
        check_is_likelihood(likelihood)
        for name, sizes in (("columns", (columns,)), ("latent_dim", (latent_dim,)), ("hidden", tuple(hidden))):
            if not positive_integers(*sizes):
                raise ValueError(f"{name} must be made of positive integers, got {sizes}")
        encoder: OrderedDict[str, nn.Module] = OrderedDict()
        for level, (inputs, outputs) in enumerate(pairwise((columns, *hidden)), start=1):
            encoder[f"linear{level}"], encoder[f"relu{level}"] = nn.Linear(inputs, outputs), nn.ReLU()
        encoder["moments"] = nn.Linear((columns, *hidden)[-1], 2 * latent_dim)
        decoder: OrderedDict[str, nn.Module] = OrderedDict()
        backwards = (latent_dim, *reversed(tuple(hidden)))
        for level, (inputs, outputs) in enumerate(pairwise(backwards), start=1):
            decoder[f"linear{level}"], decoder[f"relu{level}"] = nn.Linear(inputs, outputs), nn.ReLU()
        count = len(likelihood.parameters)
        decoder["logits"] = nn.Linear(backwards[-1], count * columns)
        if count > 1:
            decoder["split"] = Split(count)
        prior = made_prior(prior, latent_dim, (columns,))
        super().__init__(nn.Sequential(encoder), nn.Sequential(decoder), latent_dim, likelihood, prior)
        self.columns, self.latent_dim, self.hidden = columns, latent_dim, tuple(hidden)

    @property
    def data_shape(self) -> tuple[int, ...]:
        """The shape of one sample: (F,)."""
        return (self.columns,)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments this model was made with, by name; of the likelihood its key and of a prior, if there is one,
        its settings, because files hold no objects.
        """
        settings: dict[str, Any] = {
            "columns": self.columns,
            "latent_dim": self.latent_dim,
            "hidden": self.hidden,
            "likelihood": self.likelihood.key,
        }
        if self.prior is not None:
            settings["prior"] = self.prior.settings
        return settings
