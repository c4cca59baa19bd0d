"""Modules of the diagonal Gaussian posterior. They sample in evaluation mode too, unless they are deterministic.

Settings, as `fastvae.functional` has them, are what the second tensor is (``scale``, ``scale_eps``, ``scale_clamp``),
how many ``samples`` are drawn, and whether their log-density is returned (``log_prob``). A ``prior`` is given to each
call, because it may be another one each time. ``batch_offset`` is for batches that several processes share, see
`fastvae.functional.gaussian_sample`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

import fastvae.functional as F
from fastvae.functional.posterior import check_log_prob, check_samples, check_scale

if TYPE_CHECKING:
    from fastvae.functional.posterior import LogProb, Prior, Scale


class _Gaussian(nn.Module):
    """How the second tensor is read."""

    def __init__(self, scale: str, scale_eps: float, scale_clamp: tuple[float, float] | None) -> None:
        super().__init__()
        self.scale, self.scale_eps, self.scale_clamp = check_scale(scale, scale_eps, scale_clamp)

    def _reading(self) -> dict[str, Any]:
        return {"scale": self.scale, "scale_eps": self.scale_eps, "scale_clamp": self.scale_clamp}

    def _in_short(self, **settings: Any) -> str:
        """The settings, and those of the scale that are not the defaults."""
        defaults = {"scale": "logvar", "scale_eps": 0.0, "scale_clamp": None, "samples": None, "log_prob": False}
        every = {**settings, **self._reading()}
        return ", ".join(f"{name}={value!r}" for name, value in every.items() if value != defaults.get(name, ()))


class _Sampled(_Gaussian):
    """And what is drawn."""

    def __init__(self, deterministic: bool, samples: int | None, log_prob: bool | str, *scale: Any) -> None:
        super().__init__(*scale)
        self.deterministic = deterministic
        self.samples = check_samples(samples, None)
        check_log_prob(log_prob)
        self.log_prob = log_prob
        if deterministic and (samples is not None or log_prob):
            raise ValueError("deterministic must be False with samples or log_prob, because mu is no sample, got True")

    def _sampling(self) -> dict[str, Any]:
        return {"samples": self.samples, "log_prob": self.log_prob, **self._reading()}


class GaussianSampling(_Sampled):
    """z = mu + exp(logvar / 2) * eps, see `fastvae.functional.gaussian_sample`; with ``deterministic=True``, z = mu."""

    def __init__(
        self,
        *,
        deterministic: bool = False,
        samples: int | None = None,
        log_prob: LogProb = False,
        scale: Scale = "logvar",
        scale_eps: float = 0.0,
        scale_clamp: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(deterministic, samples, log_prob, scale, scale_eps, scale_clamp)

    def forward(self, mu: Tensor, logvar: Tensor, batch_offset: int | None = None) -> Any:
        return (
            mu if self.deterministic else F.gaussian_sample(mu, logvar, batch_offset=batch_offset, **self._sampling())
        )

    def extra_repr(self) -> str:
        return self._in_short(deterministic=self.deterministic, samples=self.samples, log_prob=self.log_prob)


class GaussianSamplingKL(_Sampled):
    """(z, kl) from moments = [mu | logvar] along ``dim``, see `fastvae.functional.gaussian_sample_kl_packed`; or from
    mu and logvar, see `fastvae.functional.gaussian_sample_kl`.

    kl has the shape [B] by default; ``reduction`` changes it. With ``deterministic=True``, z = mu.
    """

    def __init__(
        self,
        *,
        dim: int = 1,
        reduction: str = "none",
        free_bits: float = 0.0,
        deterministic: bool = False,
        samples: int | None = None,
        log_prob: LogProb = False,
        scale: Scale = "logvar",
        scale_eps: float = 0.0,
        scale_clamp: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(deterministic, samples, log_prob, scale, scale_eps, scale_clamp)
        self.dim = dim
        self.reduction = reduction
        self.free_bits = free_bits

    def forward(self, *moments: Tensor, batch_offset: int | None = None, prior: Prior | None = None) -> Any:
        if len(moments) not in (1, 2) or not all(isinstance(tensor, Tensor) for tensor in moments):
            raise TypeError(
                "GaussianSamplingKL takes moments = [mu | logvar] in one tensor, or mu and logvar, got "
                + (", ".join(type(tensor).__name__ for tensor in moments) or "nothing")
            )
        options: dict[str, Any] = {"prior": prior, "reduction": self.reduction, "free_bits": self.free_bits}
        if self.deterministic:
            mu, logvar = moments if len(moments) == 2 else moments[0].chunk(2, self.dim)
            if isinstance(prior, Tensor):
                options["prior"] = prior.chunk(2, self.dim - (mu.ndim - prior.ndim) if self.dim > 0 else self.dim)
            return mu, F.gaussian_kl(mu, logvar, **options, **self._reading())
        options |= {"batch_offset": batch_offset, **self._sampling()}
        if len(moments) == 2:
            return F.gaussian_sample_kl(*moments, **options)
        return F.gaussian_sample_kl_packed(moments[0], dim=self.dim, **options)

    def extra_repr(self) -> str:
        return self._in_short(
            dim=self.dim,
            reduction=self.reduction,
            free_bits=self.free_bits,
            deterministic=self.deterministic,
            samples=self.samples,
            log_prob=self.log_prob,
        )


class GaussianKL(_Gaussian):
    """KL(N(mu, exp(logvar)) || N(0, I)) in nats, or to a prior, see `fastvae.functional.gaussian_kl`."""

    def __init__(
        self,
        *,
        reduction: str = "batchmean",
        free_bits: float = 0.0,
        scale: Scale = "logvar",
        scale_eps: float = 0.0,
        scale_clamp: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(scale, scale_eps, scale_clamp)
        self.reduction = reduction
        self.free_bits = free_bits

    def forward(self, mu: Tensor, logvar: Tensor, prior: Prior | None = None) -> Tensor:
        return F.gaussian_kl(
            mu, logvar, prior=prior, reduction=self.reduction, free_bits=self.free_bits, **self._reading()
        )

    def extra_repr(self) -> str:
        return self._in_short(reduction=self.reduction, free_bits=self.free_bits)
