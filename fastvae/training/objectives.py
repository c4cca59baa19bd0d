"""What training minimises: one function for each objective, of a model and a batch.

Losses are means over the batch, in nats. Beside the loss, each function gives the two terms of the evidence lower bound
of the same samples, the reconstruction and the divergence from the model's prior, so that histories of different
objectives can be compared: their sum is the negative ELBO.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import fastvae.functional as F
from fastvae.evaluation import Batch
from fastvae.functional import ELBO
from fastvae.models import VAE
from fastvae.models.vae import as_tuple, halves
from fastvae.reference.precision import Parameters
from fastvae.training.settings import DEFAULT_SAMPLES, Training

# Of the discrepancy for beta = 1. With 10 the bundled digits train well at the default settings (the reconstruction is
# 3.3 nats after 15 epochs, the discrepancy 0.06), and so does MNIST. With 30 the digits stay for 15 epochs at a decoder
# that makes one picture of every z, because posteriors that say nothing have no discrepancy at all.
MMD_WEIGHT = 10.0

Model = VAE | DistributedDataParallel


class Options(NamedTuple):
    """What an objective is told besides the batch.

    beta: the weight of the divergence, of the total correlation for "beta-tc", of the discrepancy for "mmd". samples:
    S, for "iwae" and "dreg". dataset_size: the number of training samples, for "beta-tc". batch_offset, free_bits: as
    in `fastvae.models.VAE.forward`. autocast_dtype: the model runs under autocast to it. generator: of the noise, the
    default one if None.
    """

    beta: float | Tensor = 1.0
    samples: int = DEFAULT_SAMPLES
    dataset_size: int = 0
    batch_offset: int | None = None
    free_bits: float = 0.0
    autocast_dtype: torch.dtype | None = None
    generator: torch.Generator | None = None

    def autocast(self, data: Tensor) -> torch.autocast:
        """What the model runs in. No cache: it would keep casts of the weights of one captured step for the next."""
        enabled = self.autocast_dtype is not None
        return torch.autocast(data.device.type, self.autocast_dtype, enabled, cache_enabled=False)


class Loss(NamedTuple):
    """values: the loss, the reconstruction and the divergence, on the device. roots, gradients: the tensors that
    backward begins at, and what arrives there, None for 1.
    """

    values: ELBO
    roots: Sequence[Tensor]
    gradients: Sequence[Tensor | None]


def elbo(model: Model, batch: Batch, options: Options) -> Loss:
    """reconstruction + beta KL(q(z|x) || p(z)): value and gradients in one launch."""
    with options.autocast(batch.input):
        # Only what is asked for: a model's own forward may take images alone.
        asked = {
            "batch_offset": options.batch_offset,
            "free_bits": options.free_bits or None,
            "condition": batch.condition,
        }
        parameters, _, kl = model(batch.input, **{name: value for name, value in asked.items() if value is not None})
    values, (slopes, kl_grad) = F.elbo_value_and_grad(
        parameters, batch.target, kl, likelihood=vae_of(model).likelihood, beta=options.beta
    )
    roots, gradients = (*as_tuple(parameters), kl), (*as_tuple(slopes), kl_grad)
    # What is frozen takes no gradient.
    going = [(root, it) for root, it in zip(roots, gradients, strict=True) if root.requires_grad]
    return Loss(values, [root for root, _ in going], [gradient for _, gradient in going])


def beta_tc(model: Model, batch: Batch, options: Options) -> Loss:
    """reconstruction + I(x; z) + beta TC(z) + sum_k KL(q(z_k) || p(z_k)): the divergence in three parts, of which the
    total correlation has the weight (Chen et al., "Isolating Sources of Disentanglement in Variational Autoencoders",
    2018).

    q(z) is estimated from the batch, with the paper's stratified weights, which have no bias; its minibatch weights add
    (K - 1) log N to the correlation.
    """
    vae = vae_of(model)
    with options.autocast(batch.input):
        mu, logvar = halves(vae.encode(batch.input, **batch.given))
        z = F.gaussian_sample(mu, logvar, generator=options.generator)
        parameters = vae.decode(z, **batch.given)
    reconstruction = _nll(vae, parameters, batch, "batchmean")
    information, correlation, dimensions = F.total_correlation(
        z.flatten(1), mu.flatten(1), logvar.flatten(1), max(options.dataset_size, len(z)), "stratified"
    )
    loss = reconstruction + information + options.beta * correlation + dimensions
    return _of(loss, reconstruction, information + correlation + dimensions)


def mmd(model: Model, batch: Batch, options: Options) -> Loss:
    """reconstruction + beta MMD_WEIGHT MMD(z, samples of N(0, I)): the batch's latents together are to be like samples
    of the prior, and no posterior alone (Zhao et al., "InfoVAE", 2017, with alpha = 1; Tolstikhin et al., "Wasserstein
    Auto-Encoders", 2018, algorithm 2, whose kernel it has).
    """
    vae = vae_of(model)
    with options.autocast(batch.input):
        z, kl = vae.sample_kl(vae.encode(batch.input, **batch.given), options.generator)
        parameters = vae.decode(z, **batch.given)
    reconstruction = _nll(vae, parameters, batch, "batchmean")
    rows = z.flatten(1)
    prior_rows = torch.randn(rows.shape, generator=options.generator, device=rows.device, dtype=rows.dtype)
    discrepancy = F.maximum_mean_discrepancy(rows, prior_rows)
    return _of(reconstruction + options.beta * MMD_WEIGHT * discrepancy, reconstruction, kl.mean())


def iwae(model: Model, batch: Batch, options: Options) -> Loss:
    """-log 1/S sum_s p(x|z_s) p(z_s) / q(z_s|x), z_s ~ q(z|x), differentiated as it stands."""
    return _bound(model, batch, options, "iwae")


def dreg(model: Model, batch: Batch, options: Options) -> Loss:
    """The loss of `iwae`; the encoder's gradient is the doubly reparameterised one, which has less variance."""
    return _bound(model, batch, options, "dreg")


def _bound(model: Model, batch: Batch, options: Options, estimator: str) -> Loss:
    """All S B latents are decoded at once. Their densities are S calls on the one target, which is not repeated: S
    launches, and backward one copy more of the parameters' gradient, which puts its S parts together.
    """
    vae, samples = vae_of(model), options.samples
    doubly = estimator == "dreg"
    log_prob: Literal[True, "detached"] = "detached" if doubly else True
    with options.autocast(batch.input):
        mu, logvar = halves(vae.encode(batch.input, **batch.given))
        z, log_q_z = F.gaussian_sample(mu, logvar, samples=samples, log_prob=log_prob, generator=options.generator)
        condition = {} if batch.condition is None else {"condition": _repeated(batch.condition, samples)}
        parameters = vae.decode(z.flatten(0, 1), **condition)
        log_p_z = vae.log_prior(z)
    log_p_x_given_z = torch.stack([-_nll(vae, part, batch) for part in _parts(parameters, samples)])
    bound = F.importance_weighted_bound(log_p_x_given_z, log_p_z, log_q_z, estimator=estimator, z=z if doubly else None)
    return _of(-bound.mean(), -log_p_x_given_z.mean(), (log_q_z - log_p_z).mean())


def evaluated_loss(settings: Training, dataset_size: int) -> Callable[[VAE, Batch, torch.Generator], Tensor] | None:
    """The loss that `fastvae.evaluation.evaluate_batches` is given; None for "elbo", which it has itself."""
    if settings.objective == "elbo":
        return None
    objective = OBJECTIVES[settings.objective]
    options = Options(settings.beta, settings.samples or DEFAULT_SAMPLES, dataset_size)

    def loss(model: VAE, batch: Batch, generator: torch.Generator) -> Tensor:
        return objective(model, batch, options._replace(generator=generator)).values.loss

    return loss


def _of(loss: Tensor, reconstruction: Tensor, kl: Tensor) -> Loss:
    return Loss(ELBO(loss.detach(), reconstruction.detach(), kl.detach()), [loss], [None])


def _nll(vae: VAE, parameters: Parameters, batch: Batch, reduction: str = "none") -> Tensor:
    """-log p(x|z) as the evidence lower bound has it, without the constants that the likelihood omits."""
    likelihood = vae.likelihood
    value = F.negative_log_likelihood(parameters, batch.target, likelihood, reduction=reduction)
    return likelihood.reconstruction_weight * value


def _parts(parameters: Parameters, samples: int) -> list[Parameters]:
    """The parameters of S B latents, [S B, ...], as those of each S, which are views. What all latents share, such as a
    variance [C, 1, 1], stays as it is.
    """
    given = as_tuple(parameters)
    rows, rank = len(given[0]), given[0].ndim
    shared = [it.ndim < rank or len(it) != rows for it in given]
    # chunk, because its backward puts the parts together at once: that of an index makes zeros for each of them.
    cut = [(it,) * samples if same else it.chunk(samples) for it, same in zip(given, shared, strict=True)]
    each = zip(*cut, strict=True)
    return [part if isinstance(parameters, tuple) else part[0] for part in each]


def _repeated(rows: Tensor, samples: int) -> Tensor:
    """Rows [B, ...] as [S B, ...], in the order of z.flatten(0, 1)."""
    return rows.repeat(samples, *[1] * (rows.ndim - 1))


def vae_of(model: Model) -> VAE:
    """The VAE within, whatever torch.compile and DistributedDataParallel put around it."""
    given = getattr(model, "_orig_mod", model)
    vae: VAE = given.module if isinstance(given, DistributedDataParallel) else given
    return vae


OBJECTIVES: dict[str, Callable[[Model, Batch, Options], Loss]] = {
    "elbo": elbo,
    "beta-tc": beta_tc,
    "mmd": mmd,
    "iwae": iwae,
    "dreg": dreg,
}
