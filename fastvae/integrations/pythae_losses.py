"""What takes the place of the methods of pythae's models: `forward`, `loss_function` and VAMP's `_log_p_z`.

Each function gets `Settings` and the model, and then what pythae's method gets. A family of classes differs in what is
drawn together with z, and in the penalty that is added to the reconstruction.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from pythae.models import CIWAE, INFOVAE_MMD, IWAE, MIWAE, VAE, VAMP, BetaTCVAE, BetaVAE, DisentangledBetaVAE
from pythae.models.base.base_utils import ModelOutput
from torch import Tensor
from torch.nn.functional import binary_cross_entropy, mse_loss

import fastvae.functional as F
from fastvae.functional.checks import takes_triton
from fastvae.integrations.pythae_networks import decode, moments
from fastvae.likelihoods import Bernoulli, Gaussian, Likelihood

LOG_2PI = math.log(2 * math.pi)
SQUARED_ERROR = Gaussian(std=1.0, constant=False)  # half of it, as pythae's "mse"
BERNOULLI = Bernoulli()
# On a CPU pythae's code is quicker for fewer numbers of all pairs than these, and always where there are no pairs.
PAIRS = 1 << 20


class Settings(NamedTuple):
    """What is decided when a model is fused."""

    host: Any  # pythae's class
    loss: bool  # forward computes the fused loss; otherwise it calls the object's loss_function
    logits: bool  # the cross-entropy is that of the logits
    correct: bool  # the right numbers, where pythae's are others


def _target(x: Tensor, like: Tensor) -> Tensor:
    """Of integers the numbers, as pythae reads them, where fastvae would read a byte as t / 255."""
    return x if x.is_floating_point() else x.to(like.dtype)


def _fused_likelihood(
    model: Any, recon_x: Tensor, logits: Tensor | None, x: Tensor
) -> tuple[Tensor, Likelihood] | None:
    """The parameter of a likelihood, and the likelihood. None of probabilities, and where no kernel runs of the squared
    error, because torch has that in fewer passes.
    """
    if model.model_config.reconstruction_loss == "mse":
        return (recon_x, SQUARED_ERROR) if takes_triton(recon_x, x, inductor_fuses=True) else None
    return None if logits is None else (logits, BERNOULLI)


def _reconstruction(model: Any, recon_x: Tensor, target: Tensor) -> Tensor:
    """pythae's, of the last dimension."""
    if model.model_config.reconstruction_loss == "mse":
        return 0.5 * mse_loss(recon_x, target, reduction="none").sum(-1)
    return binary_cross_entropy(recon_x, target, reduction="none").sum(-1)


def _elbo(model: Any, recon_x: Tensor, logits: Tensor | None, x: Tensor, kl: Tensor, beta: float) -> F.ELBO:
    """mean(reconstruction + beta kl), mean(reconstruction) and mean(kl), of the kl of each sample."""
    target = _target(x, recon_x).reshape(len(x), -1)
    found = _fused_likelihood(model, recon_x, logits, x)
    if found is not None:
        parameter, likelihood = found
        return F.elbo_loss(parameter.reshape(target.shape), target, kl, likelihood=likelihood, beta=beta)
    reconstruction = _reconstruction(model, recon_x.reshape(target.shape), target)
    return F.ELBO((reconstruction + beta * kl).mean(0), reconstruction.mean(0), kl.mean(0))


def _is_pythaes_quicker(settings: Settings, model: Any, x: Tensor) -> bool:
    """Where no kernel runs, and pythae's code has the same numbers."""
    if settings.logits or takes_triton(x, inductor_fuses=True):
        return False
    return not settings.loss or FAMILIES[settings.host].pairs(model, len(x)) < PAIRS


def _forward(settings: Settings, model: Any, inputs: Any, **kwargs: Any) -> ModelOutput:
    x, family = inputs["data"], FAMILIES[settings.host]
    if _is_pythaes_quicker(settings, model, x):
        output: ModelOutput = settings.host.forward(model, inputs, **kwargs)
        return output
    mu, log_var = moments(model, x)
    z, drawn = family.draw(mu, log_var) if settings.loss else (F.gaussian_sample(mu, log_var), None)
    recon_x, logits = decode(model, z, settings.logits)
    more = family.more(model, x, kwargs)
    if settings.loss:
        loss, recon_loss, kld = _loss(settings, model, recon_x, logits, x, mu, log_var, z, drawn, *more)
    else:
        loss, recon_loss, kld = model.loss_function(recon_x, x, mu, log_var, z, *more)
    return ModelOutput(recon_loss=recon_loss, reg_loss=kld, loss=loss, recon_x=recon_x, z=z)


def _loss_function(
    settings: Settings, model: Any, recon_x: Tensor, x: Tensor, mu: Tensor, log_var: Tensor, z: Tensor, *more: Any,
    **named: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    more = (*more, *named.values())
    if _is_pythaes_quicker(settings, model, x):
        losses: tuple[Tensor, Tensor, Tensor] = settings.host.loss_function(model, recon_x, x, mu, log_var, z, *more)
        return losses
    return _loss(settings, model, recon_x, None, x, mu, log_var, z, None, *more)


def _loss(
    settings: Settings, model: Any, recon_x: Tensor, logits: Tensor | None, x: Tensor, *of_latents: Any
) -> tuple[Tensor, Tensor, Tensor]:
    penalty, beta, kld = FAMILIES[settings.host].penalty(model, *of_latents)
    elbo = _elbo(model, recon_x, logits, x, penalty, beta)
    return elbo.loss, elbo.reconstruction, elbo.kl if kld is penalty else kld.mean(0)


# --------------------------------------------------------- the penalty of each class, its weight, and what is reported

Penalty = tuple[Tensor, float, Tensor]  # of each sample; reported is the mean of the last


def _closed(mu: Tensor, log_var: Tensor, drawn: Tensor | None) -> Tensor:
    """The divergence from N(0, I) of each sample, unless it was computed with z."""
    return F.gaussian_kl(mu, log_var, reduction="none") if drawn is None else drawn


def _vae(model: Any, mu: Tensor, log_var: Tensor, z: Tensor, drawn: Tensor | None) -> Penalty:
    kl = _closed(mu, log_var, drawn)
    return kl, 1.0, kl


def _beta_vae(model: Any, mu: Tensor, log_var: Tensor, z: Tensor, drawn: Tensor | None) -> Penalty:
    kl = _closed(mu, log_var, drawn)
    return kl, model.beta, kl


def _disentangled(model: Any, mu: Tensor, log_var: Tensor, z: Tensor, drawn: Tensor | None, epoch: float) -> Penalty:
    kl = _closed(mu, log_var, drawn)
    capacity = model.C * min(epoch / (model.warmup_epoch + 1), 1)
    return (kl - capacity).abs(), model.beta, kl


def _beta_tc(model: Any, mu: Tensor, log_var: Tensor, z: Tensor, drawn: Tensor | None, dataset_size: int) -> Penalty:
    # Of one row both weightings are 1/N.
    weighting = "stratified" if model.use_mss and len(z) > 1 else "minibatch"
    parts = F.total_correlation(z, mu, log_var, dataset_size, weighting, reduction="none")
    kl = (
        model.alpha * parts.mutual_information
        + model.beta * parts.total_correlation
        + model.gamma * parts.dimension_kl
    )  # fmt: skip
    return kl, 1.0, kl


def _vamp(model: Any, mu: Tensor, log_var: Tensor, z: Tensor, drawn: Tensor | None, epoch: float) -> Penalty:
    """Both densities without their log 2 pi."""
    if drawn is None:
        log_q = -0.5 * (log_var + (z - mu) ** 2 / log_var.exp()).sum(1)
    else:
        log_q = drawn + 0.5 * LOG_2PI * z.shape[1]
    kl = log_q - model._log_p_z(z)
    steps = model.linear_scheduling
    return kl, epoch / steps if steps > 0 and epoch < steps and model.training else 1.0, kl


def vamp_log_p_z(model: Any, z: Tensor) -> Tensor:
    if not takes_triton(z) and z.numel() * model.number_components < PAIRS:
        log_p: Tensor = VAMP._log_p_z(model, z)
        return log_p
    components = model.pseudo_inputs(model.idle_input.to(z.device))
    prior = model.encoder(components.reshape((model.number_components, *model.model_config.input_dim)))
    return F.gaussian_mixture_log_prob(z, prior.embedding, prior.log_covariance) + 0.5 * LOG_2PI * z.shape[1]


# ------------------------------------------------------------------------------------ the maximum mean discrepancy


def _info_forward(settings: Settings, model: Any, inputs: Any, **kwargs: Any) -> ModelOutput:
    x = inputs["data"]
    if _is_pythaes_quicker(settings, model, x):
        output: ModelOutput = settings.host.forward(model, inputs, **kwargs)
        return output
    mu, log_var = moments(model, x)
    z, kl = F.gaussian_sample_kl(mu, log_var) if settings.loss else (F.gaussian_sample(mu, log_var), None)
    recon_x, logits = decode(model, z, settings.logits)
    z_prior = torch.randn_like(z, device=x.device)
    if kl is not None:
        losses = _info_loss(model, recon_x, logits, x, z, z_prior, kl)
    else:
        losses = model.loss_function(recon_x, x, z, z_prior, mu, log_var)
    loss, recon_loss, kld, mmd = losses
    return ModelOutput(loss=loss, recon_loss=recon_loss, reg_loss=kld, mmd_loss=mmd, recon_x=recon_x, z=z)


def _info_loss_function(
    settings: Settings, model: Any, recon_x: Tensor, x: Tensor, z: Tensor, z_prior: Tensor, mu: Tensor, log_var: Tensor
) -> tuple[Tensor, ...]:
    if _is_pythaes_quicker(settings, model, x):
        losses: tuple[Tensor, ...] = settings.host.loss_function(model, recon_x, x, z, z_prior, mu, log_var)
        return losses
    return _info_loss(model, recon_x, None, x, z, z_prior, F.gaussian_kl(mu, log_var, reduction="none"))


def _info_loss(
    model: Any, recon_x: Tensor, logits: Tensor | None, x: Tensor, z: Tensor, z_prior: Tensor, kl: Tensor
) -> tuple[Tensor, ...]:
    elbo = _elbo(model, recon_x, logits, x, kl, 1 - model.alpha)
    kernel = "rbf" if model.kernel_choice == "rbf" else "imq"
    width = model.model_config.kernel_bandwidth**2
    scales = [width * scale for scale in (model.scales if kernel == "imq" else (1.0,))]
    # Of one row pythae's is NaN, the mean over no pairs.
    mmd = F.maximum_mean_discrepancy(z, z_prior, kernel, scales) if len(z) > 1 else elbo.loss * math.nan
    return elbo.loss + (model.alpha + model.lbd - 1) * mmd, elbo.reconstruction, elbo.kl, mmd


# ------------------------------------------------------------------------------------------------ several samples


def _importance_forward(settings: Settings, model: Any, inputs: Any, **kwargs: Any) -> ModelOutput:
    """pythae's dimensions are [B, samples], those of MIWAE [B, estimates, samples]; here the batch comes last."""
    x = inputs["data"]
    estimates = (model.gradient_n_estimates,) if settings.host is MIWAE else ()
    shape = (*estimates, model.n_samples)
    mu, log_var = moments(model, x)
    z, log_q = F.gaussian_sample(mu, log_var, samples=math.prod(shape), log_prob=True)
    recon_x, logits = decode(model, z.flatten(0, 1), settings.logits)
    recon_x = recon_x.reshape(*z.shape[:2], -1)
    reconstruction = _importance_reconstruction(model, recon_x, logits, x).view(*shape, len(x))
    log_p = -0.5 * (z.square().sum(-1) + LOG_2PI * z.shape[-1]).view(reconstruction.shape)
    log_q = log_q.view(reconstruction.shape)
    kl = log_q - log_p
    loss = _importance_loss(settings, model, reconstruction, log_p, log_q, kl)
    recon_loss, kld = reconstruction.mean(-1), kl.mean(-1)
    if settings.host is IWAE:
        recon_loss, kld = recon_loss.mean(), kld.mean()
    return ModelOutput(recon_loss=recon_loss, reg_loss=kld, loss=loss, recon_x=recon_x[0].reshape_as(x), z=z[0])


def _importance_reconstruction(model: Any, recon_x: Tensor, logits: Tensor | None, x: Tensor) -> Tensor:
    """Of each sample, [samples, B], of recon_x [samples, B, D]."""
    target = _target(x, recon_x).reshape(len(x), -1).expand(recon_x.shape)
    found = _fused_likelihood(model, recon_x, logits, x)
    if found is None:
        return _reconstruction(model, recon_x, target)
    parameter, likelihood = found
    parameter = parameter.reshape(-1, target.shape[-1])
    each = F.negative_log_likelihood(parameter, target.flatten(0, 1), likelihood, reduction="none")
    return each.view(recon_x.shape[:2])


def _importance_loss(
    settings: Settings, model: Any, reconstruction: Tensor, log_p: Tensor, log_q: Tensor, kl: Tensor
) -> Tensor:
    """Of densities [samples, B], or [estimates, samples, B]."""
    if settings.correct:
        loss = -F.importance_weighted_bound(-reconstruction, log_p, log_q, dim=-2).mean()
    else:
        log_w = -(reconstruction + kl)
        loss = -(torch.softmax(log_w.detach(), 0) * log_w).sum(0).mean()
    if settings.host is CIWAE:
        loss = model.beta * (reconstruction + kl).mean() + (1 - model.beta) * loss
    return loss


class Family(NamedTuple):
    """What is particular about a class."""

    forward: Callable[..., ModelOutput]
    loss_function: Callable[..., tuple[Tensor, ...]] | None  # None: forward has it
    fused: str  # what the loss runs on
    replaced: tuple[str, ...] = ("loss_function",)  # pythae's methods whose code it stands for
    draw: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]] = F.gaussian_sample_kl  # z, and what comes with it
    penalty: Callable[..., Penalty] = _vae
    more: Callable[..., tuple[Any, ...]] = lambda model, x, kwargs: ()  # the last arguments of loss_function
    pairs: Callable[[Any, int], float] = lambda model, batch: 0  # numbers that pythae has of all pairs in a batch


_closed_family = partial(Family, _forward, _loss_function, "gaussian_sample_kl, elbo_loss")
_importance_family = partial(Family, _importance_forward, None, "gaussian_sample(samples), negative_log_likelihood")
FAMILIES: dict[type, Family] = {
    VAE: _closed_family(),
    BetaVAE: _closed_family(penalty=_beta_vae),
    DisentangledBetaVAE: _closed_family(
        penalty=_disentangled, more=lambda model, x, kwargs: (kwargs.get("epoch", model.warmup_epoch),)
    ),
    BetaTCVAE: Family(
        _forward,
        _loss_function,
        "total_correlation, elbo_loss",
        ("loss_function", "_compute_log_gauss_density", "_log_importance_weight_matrix"),
        lambda mu, log_var: (F.gaussian_sample(mu, log_var), None),
        _beta_tc,
        lambda model, x, kwargs: (kwargs.get("dataset_size", x.shape[0]),),
        lambda model, batch: math.inf if model.use_mss else batch**2 * model.latent_dim,
    ),
    VAMP: Family(
        _forward,
        _loss_function,
        "elbo_loss, with the prior of _log_p_z",
        draw=lambda mu, log_var: F.gaussian_sample(mu, log_var, log_prob=True),
        penalty=_vamp,
        more=lambda model, x, kwargs: (kwargs.get("epoch", 100),),
    ),
    INFOVAE_MMD: Family(
        _info_forward,
        _info_loss_function,
        "gaussian_sample_kl, elbo_loss, maximum_mean_discrepancy",
        ("loss_function", "imq_kernel", "rbf_kernel"),
        # Of each further scale pythae has all of them again.
        pairs=lambda model, batch: (
            math.inf if model.kernel_choice != "rbf" and len(model.scales) > 1 else batch**2 * model.latent_dim
        ),
    ),
    IWAE: _importance_family(),
    CIWAE: _importance_family(),
    MIWAE: _importance_family(),
}
