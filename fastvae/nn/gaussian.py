"""Modules of the diagonal Gaussian posterior. They sample in evaluation mode too, unless they are deterministic.

``batch_offset`` is for batches that several processes share, see `fastvae.functional.gaussian_sample`.
"""

from __future__ import annotations

from torch import Tensor, nn

import fastvae.functional as F


class GaussianSampling(nn.Module):
    """z = mu + exp(logvar / 2) * eps, see `fastvae.functional.gaussian_sample`; with ``deterministic=True``, z = mu."""

    def __init__(self, *, deterministic: bool = False) -> None:
        super().__init__()
        self.deterministic = deterministic

    def forward(self, mu: Tensor, logvar: Tensor, batch_offset: int | None = None) -> Tensor:
        return mu if self.deterministic else F.gaussian_sample(mu, logvar, batch_offset=batch_offset)

    def extra_repr(self) -> str:
        return f"deterministic={self.deterministic}"


class GaussianSamplingKL(nn.Module):
    """(z, kl) from moments = [mu | logvar] along ``dim``, see `fastvae.functional.gaussian_sample_kl_packed`.

    kl has the shape [B] by default; ``reduction`` changes it. With ``deterministic=True``, z = mu.
    """

    def __init__(
        self, *, dim: int = 1, reduction: str = "none", free_bits: float = 0.0, deterministic: bool = False
    ) -> None:
        super().__init__()
        self.dim = dim
        self.reduction = reduction
        self.free_bits = free_bits
        self.deterministic = deterministic

    def forward(self, moments: Tensor, batch_offset: int | None = None) -> tuple[Tensor, Tensor]:
        if isinstance(batch_offset, Tensor):
            raise TypeError(
                "GaussianSamplingKL takes moments = [mu | logvar] in one tensor, got two tensors; of two, it is "
                "fastvae.functional.gaussian_sample_kl(mu, logvar)"
            )
        if self.deterministic:
            mu, logvar = moments.chunk(2, self.dim)
            return mu, F.gaussian_kl(mu, logvar, reduction=self.reduction, free_bits=self.free_bits)
        return F.gaussian_sample_kl_packed(
            moments, dim=self.dim, batch_offset=batch_offset, reduction=self.reduction, free_bits=self.free_bits
        )

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, reduction={self.reduction!r}, free_bits={self.free_bits}, "
            f"deterministic={self.deterministic}"
        )


class GaussianKL(nn.Module):
    """KL(N(mu, exp(logvar)) || N(0, I)) in nats, see `fastvae.functional.gaussian_kl`."""

    def __init__(self, *, reduction: str = "batchmean", free_bits: float = 0.0) -> None:
        super().__init__()
        self.reduction = reduction
        self.free_bits = free_bits

    def forward(self, mu: Tensor, logvar: Tensor) -> Tensor:
        return F.gaussian_kl(mu, logvar, reduction=self.reduction, free_bits=self.free_bits)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, free_bits={self.free_bits}"
