"""The loss of a variational autoencoder of scvi-tools on fused operations.

    from fastvae.integrations.scvi import fuse

    model = scvi.model.SCVI(adata)
    print(fuse(model))  # before train(): what is fused, and what stays
    model.train()

Fused are the reconstruction of the gene likelihoods "nb" and "zinb", summed over the genes, with a dispersion per gene
as it is, [G]; the sample of z with its divergence from N(0, I); and the divergence of the library size. The 1e-8 that
scvi-tools adds to mean and dispersion is added. Values and gradients are therefore those of scvi-tools, but for the
rounding. What the methods return has the same attributes.

A loaded or newly made model is not fused; call `fuse` again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from scvi import REGISTRY_KEYS
from scvi.model.base import BaseModelClass
from scvi.module import SCANVAE, VAE
from scvi.module.base import LossOutput
from scvi.nn import Encoder
from torch import Tensor
from torch.distributions import Distribution, Normal
from torch.distributions.utils import lazy_property

import fastvae.functional as F
from fastvae.backend import backend_for
from fastvae.integrations.fusion import Report, class_name, exchange, restore
from fastvae.likelihoods import NegativeBinomial, ZeroInflatedNegativeBinomial

LIKELIHOODS = {"nb": NegativeBinomial(eps=1e-8), "zinb": ZeroInflatedNegativeBinomial(eps=1e-8)}

# Cells times genes below which plain PyTorch takes longer than the host's own code. It has more operations, each of a
# smaller cost.
SMALL = 2**15


def fuse(module: Any, *, correct: bool = False) -> Report:
    """Run the loss of this module on fused operations. The report says what is fused, and what stays and why.

    Args:
        module: a `scvi.module.VAE`, or the model that it belongs to, such as `scvi.model.SCVI`, `LinearSCVI` or
            `SCANVI`.
        correct: let `marginal_ll` divide by the number of samples that it draws, which is larger than n_mc_samples if
            n_mc_samples_per_pass does not divide that. Nothing else is known to be wrong.

    Raises:
        TypeError: another class.
        ValueError: other code has replaced a method on the same object already.
    """
    module = _module_of(module)
    unfuse(module)
    kind, likelihood = type(module), LIKELIHOODS.get(module.gene_likelihood)
    loss: Any = None
    if kind.generative is VAE.generative:  # then px, pz and pl are what the functions below take them for
        loss = {VAE.loss: _loss, SCANVAE.loss: _loss_of_scanvae}.get(kind.loss)
    if loss is None:
        own = f"{kind.__name__} has a loss or a generative method of its own"
        return exchange(module, Report(class_name(module), {}, {"loss": own}), {})
    fused: dict[str, str] = {}
    kept: dict[str, str] = {}
    defects: dict[str, str] = {}
    exchanged: list[tuple[Any, dict[str, Any]]] = [(module, {"loss": loss})]

    if likelihood is None:
        kept["reconstruction"] = f'gene_likelihood="{module.gene_likelihood}" is not one of "nb" and "zinb"'
    else:
        per_gene = ", its dispersion [G] not expanded" if module.dispersion == "gene" else ""
        small = f"fewer than {SMALL} numbers where no kernel runs, for which the module's own code is quicker"
        fused["reconstruction"] = f"{type(likelihood).__name__}, summed over the genes{per_gene}; not of {small}"

    encoder = module.z_encoder
    if loss is _loss_of_scanvae:
        kept["divergences and sample of z"] = f"{kind.__name__} has other divergences than VAE"
    else:
        fused["divergences"] = "gaussian_kl, summed over the latent dimensions"
        if not module.use_observed_lib_size:
            kept["sample of the library size"] = "one number of each cell; its divergence is fused"
        if type(encoder) is Encoder and encoder.var_activation is torch.exp and encoder.return_dist:
            fused["sample of z"] = "gaussian_sample_kl, with the divergence in one launch"
            exchanged.append((encoder, {"forward": _encode}))
        else:
            kept["sample of z"] = "the encoder is of another class, or its var_activation is not torch.exp"

    if module.gene_likelihood != "zinb":
        unused = module.decoder.px_dropout_decoder
        if type(unused) is torch.nn.Linear:
            fused["px_dropout_decoder"] = f'not computed, because gene_likelihood="{module.gene_likelihood}"'
            exchanged.append((unused, {"forward": _nothing}))
        else:
            kept["px_dropout_decoder"] = "it is not used, but its batch norm has running statistics"

    if kind.marginal_ll is VAE.marginal_ll:
        defects["marginal_ll"] = "too large, if n_mc_samples_per_pass does not divide n_mc_samples"
        if correct:
            exchanged[0][1]["marginal_ll"] = _marginal_ll

    report = Report(class_name(module), fused, kept, defects, corrected=correct)
    try:
        reports = [exchange(part, report, methods) for part, methods in exchanged]
    except ValueError:  # other code has changed a part
        unfuse(module)
        raise
    return reports[0]


def unfuse(module: Any) -> None:
    """Give the module, or the module of this model, its own methods back. Nothing happens if it is not fused."""
    for part in _module_of(module).modules():
        restore(part)


def _module_of(host: Any) -> VAE:
    module = host.module if isinstance(host, BaseModelClass) else host
    if not isinstance(module, VAE):
        raise TypeError(
            "module must be a scvi.module.VAE, or a model that has one, such as scvi.model.SCVI, LinearSCVI or SCANVI, "
            f"got {class_name(host)}" + ("" if module is host else f" with {class_name(module)}")
        )
    return module


class _Posterior(Normal):
    """N(loc, exp(logvar) + eps) of an encoder, with the divergence from N(0, I) of each cell, [B]. Otherwise a Normal,
    whose scale is computed when it is asked for. The class itself makes a Normal of loc and scale.
    """

    logvar: Tensor
    eps: float
    divergence: Tensor

    @classmethod
    def of_encoder(cls, loc: Tensor, logvar: Tensor, eps: float, divergence: Tensor) -> _Posterior:
        posterior = cls.__new__(cls)
        posterior.loc, posterior.logvar, posterior.eps, posterior.divergence = loc, logvar, eps, divergence
        Distribution.__init__(posterior, loc.shape, validate_args=False)
        return posterior

    @lazy_property
    def scale(self) -> Tensor:
        scale: Tensor = (torch.exp(self.logvar) + self.eps).sqrt()
        return scale


def _encode(encoder: Encoder, x: Tensor, *cat_list: Tensor) -> tuple[Distribution, Tensor]:
    """`scvi.nn.Encoder.forward`."""
    hidden = encoder.encoder(x, *cat_list)
    loc, logvar = encoder.mean_encoder(hidden), encoder.var_encoder(hidden)
    mu = loc
    if x.is_cuda and torch.is_autocast_enabled("cuda"):
        mu, logvar = mu.float(), logvar.float()  # as autocast does before an exponential, on that device only
    z, divergence = F.gaussian_sample_kl(mu, logvar, scale_eps=encoder.var_eps)
    posterior = _Posterior.of_encoder(loc, logvar, encoder.var_eps, divergence)
    return posterior, encoder.z_transformation(z)


def _loss(
    module: VAE,
    tensors: dict[str, Tensor],
    inference_outputs: dict[str, Any],
    generative_outputs: dict[str, Any],
    kl_weight: Tensor | float = 1.0,
) -> LossOutput:
    """`scvi.module.VAE.loss`."""
    if module.minified_data_type is not None:  # its posteriors are other ones, and it is not trained
        return VAE.loss(module, tensors, inference_outputs, generative_outputs, kl_weight=kl_weight)
    px, posterior, z = generative_outputs["px"], inference_outputs["qz"], inference_outputs["z"]
    reconstruction = _reconstruction(module, px, tensors[REGISTRY_KEYS.X_KEY])
    of_z = posterior.divergence if isinstance(posterior, _Posterior) else _divergence(posterior)
    of_z = of_z.expand(z.shape[:-1])  # equal for several samples of z
    if module.use_observed_lib_size:
        of_library = torch.zeros_like(of_z)
    else:
        of_library = _divergence(inference_outputs["ql"], generative_outputs["pl"])
    loss = torch.mean(reconstruction + (kl_weight * of_z + of_library))
    payload = {}
    if module.extra_payload_autotune:
        payload = {"z": z, "batch": tensors[REGISTRY_KEYS.BATCH_KEY], "labels": tensors[REGISTRY_KEYS.LABELS_KEY]}
    return LossOutput(
        loss=loss,
        reconstruction_loss=reconstruction,
        kl_local={"kl_divergence_l": of_library, "kl_divergence_z": of_z},
        extra_metrics=payload,
    )


def _loss_of_scanvae(
    module: SCANVAE,
    tensors: dict[str, Tensor],
    inference_outputs: dict[str, Any],
    generative_ouputs: dict[str, Any],  # the host's name for it
    kl_weight: float = 1.0,
    labelled_tensors: dict[str, Tensor] | None = None,
    classification_ratio: float | None = None,
) -> LossOutput:
    """`scvi.module.SCANVAE.loss`, which asks px for nothing but ``log_prob(x).sum(-1)``."""
    reconstruction = _reconstruction(module, generative_ouputs["px"], tensors[REGISTRY_KEYS.X_KEY])
    outputs = {**generative_ouputs, "px": _OfCells(-reconstruction)}
    return SCANVAE.loss(module, tensors, inference_outputs, outputs, kl_weight, labelled_tensors, classification_ratio)


class _OfCells:
    """A distribution whose log_prob is known, and summed over the genes already."""

    def __init__(self, of_cells: Tensor) -> None:
        self.of_cells = of_cells

    def log_prob(self, value: Tensor) -> Tensor:
        return self.of_cells.unsqueeze(-1)


def _reconstruction(module: VAE, px: Any, x: Tensor) -> Tensor:
    """-log p(x | z) of each cell, [B], or [S, B] for several samples of z."""
    likelihood = LIKELIHOODS.get(module.gene_likelihood)
    if likelihood is None or (px.mu.numel() < SMALL and backend_for(px.mu).name == "reference"):
        of_cells: Tensor = -px.log_prob(x).sum(-1)
        return of_cells
    # px.theta has the shape of mu. Here it is what it was before it was expanded.
    theta = torch.exp(module.px_r) if module.dispersion == "gene" else px.theta.flatten(0, -2)
    parameters = [px.mu.flatten(0, -2), theta]
    if module.gene_likelihood == "zinb":
        parameters.append(px.zi_logits.flatten(0, -2))
    target = x.expand_as(px.mu).flatten(0, -2)
    loss = F.negative_log_likelihood(tuple(parameters), target, likelihood, reduction="none")
    return loss.view(px.mu.shape[:-1])


def _divergence(posterior: Normal, prior: Normal | None = None) -> Tensor:
    """KL(posterior || prior) of each cell, [B]; of N(0, I) without a prior."""
    dtype = posterior.scale.dtype  # under autocast that of the mean may be another
    halves = None if prior is None else (prior.loc.flatten(0, -2), prior.scale.flatten(0, -2))
    return F.gaussian_kl(posterior.loc.to(dtype), posterior.scale, scale="std", prior=halves, reduction="none")


def _marginal_ll(
    module: VAE,
    tensors: dict[str, Tensor],
    n_mc_samples: int,
    return_mean: bool = False,
    n_mc_samples_per_pass: int = 1,
) -> Tensor | float:
    """`scvi.module.VAE.marginal_ll`, the mean over all samples that it draws."""
    passes = math.ceil(n_mc_samples / n_mc_samples_per_pass)
    found: Tensor | float = VAE.marginal_ll(module, tensors, n_mc_samples, return_mean, n_mc_samples_per_pass)
    return found + math.log(n_mc_samples / (passes * min(n_mc_samples, n_mc_samples_per_pass)))


def _nothing(layer: torch.nn.Linear, *inputs: Tensor) -> None:
    """In place of an output that is not used."""
