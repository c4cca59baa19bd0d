"""One step of training: the loss of a batch, its gradients, and the update."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import fastvae.functional as F
from fastvae.functional import ELBO
from fastvae.kinds import NON_NEGATIVE_NUMBER
from fastvae.likelihoods import Likelihood
from fastvae.models import VAE
from fastvae.models.vae import as_tuple
from fastvae.training.gradients import limit_gradients


def training_step(
    model: VAE | DistributedDataParallel,
    optimizer: Optimizer,
    images: Tensor,
    *,
    beta: float | Tensor = 1.0,
    autocast_dtype: torch.dtype | None = None,
    clip_norm: float | None = None,
    skip_nonfinite: bool = False,
    gradient_norms: Tensor | None = None,
    batch_offset: int | None = None,
    free_bits: float = 0.0,
    target: Tensor | None = None,
    condition: Tensor | None = None,
) -> ELBO:
    """One update of the model on a batch of images, or of other data [B, ...]; returns the loss before it, on the
    device.

    The loss is the negative evidence lower bound with the model's likelihood, of the ``target``, the images unless
    there is another. A ``condition`` goes to the model by that name.
    With ``autocast_dtype`` the model runs under autocast to it; the loss is float32 all the same. ``clip_norm``,
    ``skip_nonfinite`` and ``gradient_norms`` are those of `fastvae.training.gradients.limit_gradients`. Where the
    images are a part of a batch that several processes share, the model is one of torch's DistributedDataParallel, and
    ``batch_offset`` the number of images before these. ``free_bits`` is that of `fastvae.models.VAE.forward`.

    Raises ``ValueError`` for a beta, if it is no tensor, that is negative or not finite.
    """
    if not isinstance(beta, Tensor):
        beta = NON_NEGATIVE_NUMBER.checked("beta", beta)
    # No cache: it would keep casts of the weights of one captured step for the next.
    with torch.autocast(images.device.type, autocast_dtype, autocast_dtype is not None, cache_enabled=False):
        # Only what is asked for: a model's own forward may take images alone.
        options = {"batch_offset": batch_offset, "free_bits": free_bits or None, "condition": condition}
        parameters, _, kl = model(images, **{name: value for name, value in options.items() if value is not None})
    values, (slopes, kl_grad) = F.elbo_value_and_grad(
        parameters, images if target is None else target, kl, likelihood=_likelihood(model), beta=beta
    )
    optimizer.zero_grad()
    roots, gradients = (*as_tuple(parameters), kl), (*as_tuple(slopes), kl_grad)
    # What is frozen takes no gradient.
    going = [(root, it) for root, it in zip(roots, gradients, strict=True) if root.requires_grad]
    torch.autograd.backward([root for root, _ in going], [gradient for _, gradient in going])
    limit_gradients(optimizer, clip_norm=clip_norm, skip_nonfinite=skip_nonfinite, norms=gradient_norms)
    optimizer.step()
    return values


def _likelihood(model: VAE | DistributedDataParallel) -> Likelihood:
    """That of the VAE within, whatever torch.compile and DistributedDataParallel put around it."""
    given = getattr(model, "_orig_mod", model)
    vae: VAE = given.module if isinstance(given, DistributedDataParallel) else given
    return vae.likelihood
