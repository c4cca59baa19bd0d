"""The encoder's posterior as a `torch.distributions.Distribution`.

    q = DiagonalGaussian(encoder(x))  # moments = [mu | logvar] along dimension 1
    z, kl = q.rsample_with_kl()  # one launch forward, one backward

In code around torch.distributions the line that makes the posterior changes; what follows stays:

    q = Independent(Normal(mu, torch.exp(0.5 * logvar)), 1)  # before
    q = DiagonalGaussian.from_mu_logvar(mu, logvar)
    z, kl = q.rsample(), kl_divergence(q, prior)  # or q.kl(), which is fused

In code around diffusers' DiagonalGaussianDistribution the line that samples it changes:

    z, kl = posterior.sample(generator), posterior.kl()  # before
    z, kl = DiagonalGaussian(posterior.parameters).rsample_with_kl(generator=generator)

There ``sample`` is differentiable and ``mode()`` a method. Here they are what they are in torch.distributions:
``sample`` has no gradient, ``rsample`` has one, and ``mode`` is a property. Nor is logvar clamped to [-30, 20].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal, constraints, kl_divergence, register_kl

import fastvae.functional as F
from fastvae.functional.checks import check_halves, check_packed
from fastvae.functional.posterior import general
from fastvae.reference.gaussian import kl_terms, log_variance, squared_distance
from fastvae.reference.precision import in_float32


class DiagonalGaussian(Distribution):
    """N(mu, diag(exp(logvar))) over events of any rank: batch_shape [B], event_shape the other dimensions of mu.

    It keeps the tensors that it is given. Nothing is computed before it is asked for, and nothing is kept of what was:
    `stddev` twice is two exponentials.

    Sampling and the divergence from N(0, I) are the operations of `fastvae.functional`, with their noise, backends,
    gradients and dtypes: z, `mean`, `stddev` and `variance` have the dtype of mu, all else is float32 (float64).

    Args:
        moments: [B, ...] = [mu | logvar] along ``dim``, whose size is even; float16, bfloat16, float32 or float64.
        dim: the dimension that is split; not the batch.
        validate_args: check as torch.distributions does that parameters and values are numbers. That waits for the
            device at each construction, so it is off whatever `Distribution.set_default_validate_args` says.

    Raises:
        TypeError, ValueError: as `fastvae.functional.gaussian_sample_kl_packed`; ValueError also for a NaN under
            validate_args.
    """

    arg_constraints: ClassVar = {"mu": constraints.real, "logvar": constraints.real}
    has_rsample = True

    def __init__(self, moments: Tensor, dim: int = 1, *, validate_args: bool = False) -> None:
        if isinstance(dim, Tensor):
            raise TypeError(
                "DiagonalGaussian takes moments = [mu | logvar] in one tensor, got two tensors; of two, it is "
                "DiagonalGaussian.from_mu_logvar(mu, logvar)"
            )
        dim, half = check_packed(moments, dim)
        self._set((moments,), dim, half[:1], half[1:], validate_args)

    @classmethod
    def from_mu_logvar(cls, mu: Tensor, logvar: Tensor, *, validate_args: bool = False) -> DiagonalGaussian:
        """Of two tensors [B, ...] of one shape, dtype and device: an encoder with two heads.

        Raises ``TypeError`` and ``ValueError`` as `fastvae.functional.gaussian_sample_kl`.
        """
        check_halves(mu, logvar)
        distribution = cls.__new__(cls)
        distribution._set((mu, logvar), 1, mu.shape[:1], mu.shape[1:], validate_args)
        return distribution

    def _set(
        self, given: tuple[Tensor, ...], dim: int, batch: torch.Size, event: torch.Size, validate_args: bool
    ) -> None:
        self._given = given  # (moments,) or (mu, logvar), as they came, also after `expand`
        self._dim = dim
        super().__init__(batch, event, validate_args=validate_args)

    def _halves(self) -> tuple[Tensor, Tensor]:
        """(mu, logvar) as they were given. Views made at once: their gradients are joined in one operation."""
        mu, logvar = self._given if len(self._given) == 2 else self._given[0].chunk(2, self._dim)
        return mu, logvar

    def _is_expanded(self) -> bool:
        return len(self._batch_shape) != 1 or self._batch_shape[0] != self._given[0].shape[0]

    def expand(self, batch_shape: Sequence[int], _instance: DiagonalGaussian | None = None) -> DiagonalGaussian:
        """The same posteriors for a batch_shape to which [B] broadcasts; no memory is taken. Raises ``ValueError``."""
        shape, own = list(batch_shape), list(self._batch_shape)
        if len(shape) < len(own) or any(n not in (1, m) for n, m in zip(own[::-1], shape[::-1], strict=False)):
            raise ValueError(f"batch_shape must be one to which {own} broadcasts, got {shape}")
        expanded = cast("DiagonalGaussian", self._get_checked_instance(DiagonalGaussian, _instance))
        expanded._set(self._given, self._dim, torch.Size(batch_shape), self._event_shape, validate_args=False)
        expanded._validate_args = self._validate_args
        return expanded

    # --- parameters and moments -----------------------------------------------------------------------------------

    @property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self._event_shape))

    @property
    def mu(self) -> Tensor:
        return self._halves()[0].expand(self._extended_shape())

    @property
    def logvar(self) -> Tensor:
        return self._halves()[1].expand(self._extended_shape())

    @property
    def mean(self) -> Tensor:
        return self.mu

    @property
    def mode(self) -> Tensor:
        return self.mu

    @property
    def stddev(self) -> Tensor:
        return torch.exp(0.5 * self.logvar)

    @property
    def variance(self) -> Tensor:
        return torch.exp(self.logvar)

    # --- samples --------------------------------------------------------------------------------------------------

    def rsample(
        self,
        sample_shape: Sequence[int] = torch.Size(),
        *,
        eps: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """z = mu + exp(logvar / 2) * eps, of shape sample_shape + batch_shape + event_shape.

        One launch, with a sample_shape and after `expand` too: mu and logvar are read once, where they lie.

        Args:
            eps: the noise, of z's shape; drawn if None.
            generator: a torch.Generator of the device of mu; the default generator if None.

        Raises:
            TypeError, ValueError: as `fastvae.functional.gaussian_sample`.
        """
        shape = self._shape_of_samples(sample_shape)
        mu, logvar = self._halves()
        if shape == mu.shape:
            return F.gaussian_sample(mu, logvar, eps=eps, generator=generator)
        if eps is not None and eps.shape != shape:
            raise ValueError(f"eps must have the shape of z, {list(shape)}, got {list(eps.shape)}")
        # How often each row of mu is drawn from.
        samples = math.prod(shape[: len(shape) - len(self._event_shape)]) // max(1, mu.shape[0])
        if samples == 0 or mu.shape[0] == 0:
            return mu.expand(shape) + logvar.expand(shape)  # nothing, with their gradient
        eps = None if eps is None else eps.reshape(samples, *mu.shape)
        return F.gaussian_sample(mu, logvar, eps=eps, generator=generator, samples=samples).reshape(shape)

    def sample(self, sample_shape: Sequence[int] = torch.Size(), *, generator: torch.Generator | None = None) -> Tensor:
        """`rsample` without a gradient."""
        with torch.no_grad():
            return self.rsample(sample_shape, generator=generator)

    def rsample_with_kl(
        self, *, eps: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """(z, kl) as `rsample` and `kl` give them, in one launch forward and one backward; more after `expand`."""
        if self._is_expanded():
            return self.rsample(eps=eps, generator=generator), self.kl()
        if len(self._given) == 2:
            return F.gaussian_sample_kl(*self._given, eps=eps, generator=generator)
        return F.gaussian_sample_kl_packed(self._given[0], dim=self._dim, eps=eps, generator=generator)

    def _shape_of_samples(self, sample_shape: Sequence[int]) -> torch.Size:
        if not isinstance(sample_shape, Sequence):
            raise TypeError(
                f"sample_shape must be a tuple of integers, got {type(sample_shape).__name__}"
                + (" (pass generator=...)" if isinstance(sample_shape, torch.Generator) else "")
            )
        return self._extended_shape(torch.Size(sample_shape))

    # --- densities and divergences --------------------------------------------------------------------------------

    def kl(self, other: Distribution | None = None) -> Tensor:
        """KL(self || other) in nats, summed over the event, of shape batch_shape; of N(0, I) without ``other``.

        KL(self || N(0, I)) = sum (mu^2 + exp(logvar) - 1 - logvar) / 2, one launch. With ``other`` it is
        `torch.distributions.kl_divergence`, for a DiagonalGaussian or an Independent Normal of the same event_shape:

            sum ((mu - mu')^2 / exp(logvar') + exp(logvar - logvar') - 1 - (logvar - logvar')) / 2

        One launch where ``other`` has one distribution for each of these, or one for all of them; plain PyTorch where
        the two have to be broadcast in another way.

        Raises:
            ValueError: another event_shape.
            NotImplementedError: another distribution.
        """
        if other is not None:
            return kl_divergence(self, other)
        return _broadcast(F.gaussian_kl(*self._halves(), reduction="none"), self._batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """log N(value; mu, exp(logvar)) = -sum (log 2 pi + logvar + (value - mu)^2 / exp(logvar)) / 2, in nats.

        value has event_shape last, and what is before it broadcasts with batch_shape. Raises ``ValueError``.
        """
        if value.shape[value.ndim - len(self._event_shape) :] != self._event_shape:
            raise ValueError(f"value must end in event_shape, {list(self._event_shape)}, got {list(value.shape)}")
        if self._validate_args:
            self._validate_sample(value)
        mu, logvar = map(in_float32, self._halves())
        terms = squared_distance(in_float32(value), mu, logvar) + logvar + math.log(2 * math.pi)
        log_prob = -0.5 * self._sum_event(terms)
        return _broadcast(log_prob, torch.broadcast_shapes(log_prob.shape, self._batch_shape))

    def entropy(self) -> Tensor:
        """sum (1 + log 2 pi + logvar) / 2 in nats, of shape batch_shape."""
        logvar = in_float32(self._halves()[1])
        return _broadcast(0.5 * self._sum_event(logvar + (1 + math.log(2 * math.pi))), self._batch_shape)

    def _sum_event(self, terms: Tensor) -> Tensor:
        return terms.sum(tuple(range(-len(self._event_shape), 0)))

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(batch_shape={list(self._batch_shape)}, event_shape={list(self._event_shape)}, "
            f"dtype={self._given[0].dtype}, device={self._given[0].device})"
        )


def _broadcast(values: Tensor, shape: torch.Size) -> Tensor:
    """The values in a shape to which theirs broadcasts, each in memory of its own, so that one can be written."""
    return values if values.shape == shape else values.expand(shape).contiguous()


@register_kl(DiagonalGaussian, DiagonalGaussian)
def _kl_between(p: DiagonalGaussian, q: DiagonalGaussian) -> Tensor:
    return _kl_of_halves(p, p._halves(), "logvar", q, q._halves(), "logvar")


@register_kl(DiagonalGaussian, Independent)
def _kl_to_independent(p: DiagonalGaussian, q: Independent[Normal]) -> Tensor:
    return _kl_of_halves(p, p._halves(), "logvar", q, _halves_of_normal(q), "std")


@register_kl(Independent, DiagonalGaussian)
def _kl_from_independent(p: Independent[Normal], q: DiagonalGaussian) -> Tensor:
    return _kl_of_halves(p, _halves_of_normal(p), "std", q, q._halves(), "logvar")


@register_kl(DiagonalGaussian, Normal)
def _kl_to_normal(p: DiagonalGaussian, q: Normal) -> Tensor:
    # Code around Normal sums each element's divergence itself, code around Independent does not: neither reading of
    # this pair is safe, because the other differs by the size of the event or of the batch and fails nowhere. torch
    # itself has no divergence between an Independent Normal and a Normal either.
    raise NotImplementedError(
        "KL(DiagonalGaussian || Normal): a Normal has no event, so it is open whether the divergences of its elements "
        "are summed; use q.kl() for N(0, I), or Independent(Normal(...), k) with k dimensions"
    )


def _halves_of_normal(distribution: Independent[Normal]) -> tuple[Tensor, Tensor]:
    normal = distribution.base_dist
    if not isinstance(normal, Normal):
        raise NotImplementedError(
            f"a DiagonalGaussian has a divergence to and from an Independent Normal, got Independent "
            f"{type(normal).__name__}"
        )
    return in_float32(normal.loc), in_float32(normal.scale)


def _kl_of_halves(
    p: Distribution,
    p_halves: tuple[Tensor, Tensor],
    p_scale: str,
    q: Distribution,
    q_halves: tuple[Tensor, Tensor],
    q_scale: str,
) -> Tensor:
    """The scales say what each second half is."""
    if p.event_shape != q.event_shape:
        raise ValueError(
            f"both distributions must have one event_shape, got {list(p.event_shape)} and {list(q.event_shape)}"
        )
    (p_mu, p_second), (q_mu, q_second) = p_halves, q_halves
    event, batch = len(p.event_shape), p_mu.shape[: p_mu.ndim - len(p.event_shape)]
    of_each_or_of_all = len(batch) == 1 and q_mu.shape[: q_mu.ndim - event] in (batch, (1,), ())
    if of_each_or_of_all and p_mu.dtype is p_second.dtype:
        kl: Tensor = general(p_mu, p_second, False, True, prior=q_halves, scale=p_scale, prior_scale=q_scale)
    else:
        p_logvar, q_logvar = log_variance(p_second, p_scale), log_variance(q_second, q_scale)
        terms = kl_terms(in_float32(p_mu), p_logvar, in_float32(q_mu), q_logvar)
        kl = terms.sum(tuple(range(-event, 0)))
    return _broadcast(kl, torch.broadcast_shapes(kl.shape, p.batch_shape, q.batch_shape))
