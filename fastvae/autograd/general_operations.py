"""The registered operations of posteriors with another prior, another scale, several samples or log-densities, and the
noise of a call, which one of them makes again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fastvae.autograd.registration import operations, register
from fastvae.kernels import general_gradients as gradients
from fastvae.kernels import general_posterior as kernels
from fastvae.kernels.layout import empty_gradients
from fastvae.kernels.moments import read_moments
from fastvae.reference.gaussian import General
from fastvae.reference.precision import in_float32

# A registered operation takes the fields of a General one by one.
_POSTERIOR = (
    "bool draws, bool diverges, int dim, str reduction, float free_bits, str scale, float scale_eps, float low, "
    "float high, str prior_scale, int samples, bool log_prob"
)
_MOMENTS = "Tensor mu, Tensor? second"
_PRIOR = "Tensor? prior_mu, Tensor? prior_second"
_NOISE = "Tensor? eps, Tensor? seed_tensor, Tensor? offset_tensor, int seed, int offset, SymInt batch_offset"
_FIELDS = len(General._fields)


def _with_fields(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a General and others, as one of the fields and others."""
    return lambda *arguments: function(General(*arguments[:_FIELDS]), *arguments[_FIELDS:])


def _fake(posterior: General, mu: Tensor, second: Tensor | None, *others: Any) -> list[Tensor]:
    moments = read_moments(mu, second, posterior.dim)
    return kernels.allocate(posterior, moments.mu, moments.layout)


def _fake_backward(
    posterior: General,
    mu: Tensor,
    second: Tensor | None,
    prior_mu: Tensor | None,
    prior_second: Tensor | None,
    strides: Sequence[int],
    needed: Sequence[bool],
    *_: Any,
) -> list[Tensor]:
    return empty_gradients(*gradients.needed_of(mu, second, prior_mu, prior_second, needed))


def _fake_score(posterior: General, mu: Tensor, second: Tensor | None, *others: Any) -> Tensor:
    layout = read_moments(mu, second, posterior.dim).layout
    return mu.new_empty_strided(*kernels.strides_of_z(posterior, layout))


register(
    f"general({_POSTERIOR}, {_MOMENTS}, {_PRIOR}, {_NOISE}) -> Tensor[]",
    _with_fields(kernels.general),
    _with_fields(_fake),
)
register(
    f"general_backward({_POSTERIOR}, {_MOMENTS}, {_PRIOR}, SymInt[] strides, bool[] needed, Tensor? z_grad, "
    f"Tensor? kl_grad, Tensor? log_q_grad, Tensor? kl, {_NOISE}) -> Tensor[]",
    _with_fields(gradients.general_backward),
    _with_fields(_fake_backward),
)
register(
    f"general_score({_POSTERIOR}, {_MOMENTS}, SymInt[] strides, Tensor log_q_grad, {_NOISE}) -> Tensor",
    _with_fields(gradients.score),
    _with_fields(_fake_score),
)


def noise_of(posterior: General, mu: Tensor, second: Tensor | None, eps: Tensor | None, rng: Sequence[Any]) -> Tensor:
    """The noise of a call whose mu had in forward the order of memory that it has here."""
    if eps is not None:
        return in_float32(eps)
    layout = read_moments(mu, second, posterior.dim).layout
    # mu = logvar = 0 makes z the noise itself. Through the registered operation, because the tensors may be those of a
    # torch.func transform, also of one that has ended.
    zero = in_float32(mu).new_empty_strided(layout.shape, layout.strides).zero_()
    plain = posterior._replace(
        diverges=False, reduction="none", free_bits=0.0, scale="logvar", scale_eps=0.0,
        low=-float("inf"), high=float("inf"), log_prob=False,
    )  # fmt: skip
    (noise,) = operations.general(*plain, zero, zero, None, None, None, *rng)
    return noise
