"""One step of training: the loss of a batch, its gradients, and the update."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from fastvae.evaluation import Batch
from fastvae.functional import ELBO
from fastvae.kinds import NON_NEGATIVE_NUMBER
from fastvae.models import VAE
from fastvae.training.gradients import limit_gradients
from fastvae.training.objectives import OBJECTIVES, Options
from fastvae.training.settings import DEFAULT_SAMPLES


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
    objective: str = "elbo",
    samples: int = DEFAULT_SAMPLES,
    dataset_size: int = 0,
) -> ELBO:
    """One update of the model on a batch of images, or of other data [B, ...]; returns the loss before it, on the
    device.

    The loss is the negative evidence lower bound with the model's likelihood and prior, of the ``target``, the images
    unless there is another; or one of the other objectives of `Training`, with ``samples`` for "iwae" and "dreg", which
    leave beta out, and ``dataset_size``, of all training samples, for "beta-tc". A ``condition`` goes to the model by
    that name.
    With ``autocast_dtype`` the model runs under autocast to it; the loss is float32 all the same. ``clip_norm``,
    ``skip_nonfinite`` and ``gradient_norms`` are those of `fastvae.training.gradients.limit_gradients`. Where the
    images are a part of a batch that several processes share, the model is one of torch's DistributedDataParallel, and
    ``batch_offset`` the number of images before these. ``free_bits`` is that of `fastvae.models.VAE.forward`.

    Raises ``ValueError`` for a beta, if it is no tensor, that is negative or not finite, and for another objective.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
    if not isinstance(beta, Tensor):
        beta = NON_NEGATIVE_NUMBER.checked("beta", beta)
    options = Options(beta, samples, dataset_size, batch_offset, free_bits, autocast_dtype)
    values, roots, gradients = OBJECTIVES[objective](
        model, Batch(images, images if target is None else target, condition), options
    )
    optimizer.zero_grad()
    torch.autograd.backward(roots, gradients)
    limit_gradients(optimizer, clip_norm=clip_norm, skip_nonfinite=skip_nonfinite, norms=gradient_norms)
    optimizer.step()
    return values
