"""Measure how a model uses its latent dimensions, over a set of images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import fastvae.functional as F
from fastvae.evaluation.batches import batches, device_of, measuring
from fastvae.models import VAE


class Posteriors(NamedTuple):
    """The posteriors q(z|x) of N images.

    mu: their means, [N, K] ([N, K, h, w] for latents that are images).
    kl: each dimension's divergence from N(0, 1) in nats, averaged over the images, float64 [K] ([K, h, w]).
    """

    mu: Tensor
    kl: Tensor


@measuring
def posteriors(model: VAE, images: Tensor, *, condition: Tensor | None = None) -> Posteriors:
    """The posteriors of images as in `evaluate`.

    Raises ``ValueError`` if there are no images.
    """
    means = []
    kl = torch.zeros((), dtype=torch.float64, device=device_of(model))
    for batch in batches(model, images, condition=condition):
        mu, logvar = model.posterior(batch.input, **batch.given)
        means.append(mu)
        kl = kl + F.gaussian_kl(mu, logvar, reduction="per_dimension").double() * (len(mu) / len(images))
    return Posteriors(torch.cat(means), kl)


def active_units(mu: Tensor, *, threshold: float = 0.01) -> Tensor:
    """Whether each latent dimension is active: whether the variance of the posterior's mean over the images is above
    the threshold. mu is [N, ...], with one row for each image. The result is bool [...].

    Source: Burda, Grosse and Salakhutdinov, "Importance Weighted Autoencoders", 2016, section 5.2.
    """
    return mu.double().var(0, correction=0) > threshold


def principal_components(mu: Tensor, count: int = 2) -> tuple[Tensor, float]:
    """The first principal components of mu [N, ...]. Returns the coordinates, float64 [N, count], and the share of the
    variance that they explain, 0 to 1.

    The largest entry of each axis is positive, so that the same mu gives the same picture. Raises ``ValueError`` if
    there are fewer dimensions than components.
    """
    centred = mu.flatten(1).double()
    centred = centred - centred.mean(0)
    if not 1 <= count <= centred.shape[1]:
        raise ValueError(f"count must be from 1 to the number of latent dimensions, {centred.shape[1]}, got {count}")
    # Of the covariance, [K, K]: N is the larger by far.
    variances, axes = torch.linalg.eigh(centred.T @ centred)
    axes = axes.flip(1)[:, :count]  # eigh's order is ascending
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
    total = variances.sum().item()
    share = variances[-count:].sum().item() / total if total > 0 else 0.0
    return centred @ (axes * largest.sign()), share
