"""The posteriors that `fastvae.integrations.diffusers.fuse` lets an autoencoder make."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from diffusers.models.autoencoders.autoencoder_oobleck import OobleckDiagonalGaussianDistribution
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

import fastvae.functional as F
from fastvae.backend import backend_for
from fastvae.functional.posterior import general
from fastvae.likelihoods import Gaussian

_GAUSSIAN = Gaussian()


def _promoted(dtype: torch.dtype) -> torch.dtype:
    """float32; of float64, float64."""
    return torch.promote_types(dtype, torch.float32)


def _autocasts(parameters: Tensor) -> bool:
    """Whether autocast runs exp and sum in float32 now, as it does on every device but the CPU."""
    device = parameters.device.type
    return device != "cpu" and torch.is_autocast_enabled(device)


class _Fused:
    """What both posteriors share: N(mean, std^2), whose parameters are [mean | second] along dimension 1.

    The library computes logvar, std and var when it makes a posterior, for `mode` too. Here the library's posterior is
    made when one of these is first read, or where no kernels run, which is on the CPU and in float64. There its methods
    are faster than the plain PyTorch of `fastvae.functional`.
    """

    library: ClassVar[Any]  # the library's class
    reading: ClassVar[dict[str, Any]]  # how the second half is read: options of `fastvae.functional`
    reduction: ClassVar[str]  # of the divergence
    correct: ClassVar[bool] = False

    def __init__(self, parameters: Tensor, deterministic: bool = False) -> None:
        self.parameters = parameters
        self.deterministic = deterministic
        self._mean, self._second = torch.chunk(parameters, 2, dim=1)
        # The library takes an odd number of channels too, if the halves broadcast.
        self._is_gaussian = not deterministic and self._mean.shape == self._second.shape
        self._has_grad, self._promotes = torch.is_grad_enabled(), _autocasts(parameters)
        self._dtype = _promoted(parameters.dtype) if self._promotes else parameters.dtype  # of the library's results
        self._kl: Tensor | None = None
        self._of_the_library: Any = None

    # Properties cannot be assigned: the fused operations read the parameters, so they would not see the assignment.

    @property
    def mean(self) -> Tensor:
        return self._mean

    @property
    def logvar(self) -> Tensor:
        logvar: Tensor = self._original().logvar
        return logvar

    @property
    def std(self) -> Tensor:
        std: Tensor = self._original().std
        return std

    @property
    def var(self) -> Tensor:
        var: Tensor = self._original().var
        return var

    def mode(self) -> Tensor:
        return self._mean

    def sample(self, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
        """z = mean + std * noise, in one launch.

        The noise of a generator, or of a list with one for each image, is the library's. Without a generator the
        kernels make noise of their own from the state of torch's default generator, and store none of it. If the
        parameters need a gradient, the launch computes the divergence too, because it reads nothing more for it, and
        one backward pass serves both. The next `kl` returns it.
        """
        if not self._has_kernels():
            z: Tensor = self._original().sample(generator)
            return z
        parameters, half = self.parameters, self._mean.shape
        eps = None
        if generator is not None:
            eps = randn_tensor(half, generator=generator, device=parameters.device, dtype=parameters.dtype)
        options: dict[str, Any] = {"half": half, "eps": eps, **self.reading}
        if self._is_whole() and parameters.requires_grad and torch.is_grad_enabled():
            z, self._kl = general(self._moments(), None, True, True, reduction=self.reduction, **options)
        else:
            z = general(self._moments(), None, True, False, **options)
        return z

    def _original(self) -> Any:
        """The library's posterior, as it would have been made in the place of this one: its attributes have the
        gradient and the dtype of that time, whatever the modes are now.
        """
        if self._of_the_library is None:
            if torch.is_grad_enabled() == self._has_grad and _autocasts(self.parameters) == self._promotes:
                self._of_the_library = self.library(self.parameters, self.deterministic)
            else:
                device = self.parameters.device.type
                with torch.set_grad_enabled(self._has_grad), torch.autocast(device, enabled=self._promotes):
                    self._of_the_library = self.library(self.parameters, self.deterministic)
        return self._of_the_library

    def _is_whole(self) -> bool:
        """Whether `kl` sums all dimensions but the batch."""
        return True

    def _has_kernels(self) -> bool:
        return self._is_gaussian and backend_for(self.parameters).name == "triton"

    def _moments(self) -> Tensor:
        return self.parameters.to(self._dtype)

    def _divergence(self) -> Tensor:
        """From N(0, I): that of the last sample, once, or one of its own."""
        kl, self._kl = self._kl, None
        if kl is not None:
            return kl if torch.is_grad_enabled() else kl.detach()
        divergence: Tensor = general(
            self._moments(), None, False, True, half=self._mean.shape, reduction=self.reduction, **self.reading
        )
        return divergence

    def _takes_prior(self, other: Any) -> bool:
        return (
            type(other) in (self.library, *FUSED[self.library])
            and not other.deterministic
            and other.parameters.shape == self.parameters.shape
            and other.parameters.device == self.parameters.device
        )

    def _as_image(self, posterior: Any) -> Any:
        """What the library's kl reads of a posterior, in 4 dimensions and float32: of these it sums the right ones."""
        dtype = _promoted(posterior.parameters.dtype)
        if posterior.parameters.dtype is not dtype:
            posterior = self.library(posterior.parameters.to(dtype))
        batch, channels, *others = posterior.mean.shape
        read = {name: getattr(posterior, name) for name in ("mean", "var", "logvar")}
        read = {name: value.reshape(batch, channels, math.prod(others), 1) for name, value in read.items()}
        return SimpleNamespace(deterministic=False, **read)

    def _rounded(self, value: Tensor, *dtypes: torch.dtype) -> Tensor:
        """In the dtype of the library's result. A corrected one stays float32, because float16 ends at 65504."""
        return value if self.correct else value.to(functools.reduce(torch.promote_types, dtypes, self._dtype))


class Posterior(_Fused, DiagonalGaussianDistribution):
    """The library's DiagonalGaussianDistribution: second is logvar, clamped to [-30, 20]."""

    library = DiagonalGaussianDistribution
    reading: ClassVar[dict[str, Any]] = {"scale_clamp": (-30.0, 20.0)}
    reduction = "none"

    def kl(self, other: Any = None) -> Tensor:
        """KL(self || N(0, I)), or KL(self || other), in nats.

        The library sums dimensions 1 to 3: [B] for images, [B, W] for videos [B, C, T, H, W], and an error for audio
        [B, C, T]. `CorrectPosterior` sums all dimensions but the batch.
        """
        is_known = self._is_gaussian and (other is None or self._takes_prior(other))
        if is_known and self._has_kernels() and (self.correct or self._mean.ndim >= 4):
            return self._fused_kl(other)
        if is_known and self.correct:
            prior = None if other is None else self._as_image(other)
            kl: Tensor = self.library.kl(self._as_image(self), prior)
        else:
            kl = self._original().kl(other)
        return kl

    def _fused_kl(self, other: Any) -> Tensor:
        if other is None and self._is_whole():
            return self._rounded(self._divergence())
        moments = self._rows(self._moments())
        half = moments.chunk(2, 1)[0].shape
        prior, dtypes = None, []
        if other is not None:
            prior = self._rows(other.parameters)
            dtypes.append(getattr(other, "_dtype", other.parameters.dtype))
        kl: Tensor = general(moments, None, False, True, half=half, prior=prior, **self.reading)
        if not self._is_whole():
            kl = kl.view(self._mean.shape[0], *self._mean.shape[4:])
        return self._rounded(kl, *dtypes)

    def nll(self, sample: Tensor, dims: tuple[int, ...] | list[int] | None = None) -> Tensor:
        """-log N(sample; mean, var) in nats, summed over dims: 1 to 3, for `CorrectPosterior` all but the batch."""
        every = list(range(1, self._mean.ndim))
        if dims is None:
            dims = every if self.correct else [1, 2, 3]
        if self._has_kernels() and list(dims) == every and sample.shape == self._mean.shape:
            logvar = torch.clamp(self._second, -30.0, 20.0)
            nll = F.negative_log_likelihood((self._mean, logvar), sample, _GAUSSIAN, reduction="none")
            return self._rounded(nll, sample.dtype)
        posterior = self._original()
        if self.correct and self.parameters.dtype is not _promoted(self.parameters.dtype):
            posterior = self.library(self.parameters.float(), self.deterministic)
        found: Tensor = posterior.nll(sample, dims)
        return found

    def _is_whole(self) -> bool:
        return self.correct or self._mean.ndim == 4

    def _rows(self, parameters: Tensor) -> Tensor:
        """[B, 2 C, T, H, W] as [B W, 2 C, T, H], a copy, so that dimensions 1 to 3 are an event."""
        if self._is_whole():
            return parameters
        others = range(4, parameters.ndim)
        return parameters.permute(0, *others, 1, 2, 3).reshape(-1, *parameters.shape[1:4])


class CorrectPosterior(Posterior):
    """What `fuse(vae, correct=True)` makes: kl and nll sum all dimensions but the batch, and are float32."""

    correct = True


class OobleckPosterior(_Fused, OobleckDiagonalGaussianDistribution):
    """The library's OobleckDiagonalGaussianDistribution: std = softplus(second) + 1e-4."""

    library = OobleckDiagonalGaussianDistribution
    reading: ClassVar[dict[str, Any]] = {"scale": "softplus", "scale_eps": 1e-4}
    reduction = "mean"

    @property
    def scale(self) -> Tensor:
        return self._second

    def kl(self, other: Any = None) -> Tensor:
        """The mean over batch and time of the sum over channels of twice KL(self || N(0, I)), which is the library's
        number, and of the divergence itself for `CorrectOobleckPosterior`; or with `other` in the place of N(0, I).
        """
        channels = self._mean.shape[1]
        if other is None and self._has_kernels():
            return self._rounded(self._divergence() * (channels if self.correct else 2 * channels))
        if not self.correct or not self._is_gaussian or (other is not None and not self._takes_prior(other)):
            kl: Tensor = self._original().kl(other)
        elif other is None:
            kl = 0.5 * self.library.kl(self._as_image(self))
        else:
            options = {"half": self._mean.shape, "prior": other.parameters, "reduction": "mean", **self.reading}
            kl = channels * general(self._moments(), None, False, True, **options)
        return kl


class CorrectOobleckPosterior(OobleckPosterior):
    """What `fuse(vae, correct=True)` makes: kl has the factor 1/2, kl(other) the right sign, and both are float32."""

    correct = True


# The posterior that stands for the library's, and the corrected one.
FUSED: dict[Any, tuple[type[_Fused], type[_Fused]]] = {
    DiagonalGaussianDistribution: (Posterior, CorrectPosterior),
    OobleckDiagonalGaussianDistribution: (OobleckPosterior, CorrectOobleckPosterior),
}
