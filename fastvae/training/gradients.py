"""What is done with gradients between backward and the update, without reading from the device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer


def limit_gradients(
    optimizer: Optimizer,
    *,
    clip_norm: float | None = None,
    skip_nonfinite: bool = False,
    norms: Tensor | None = None,
) -> None:
    """Clip the gradients of an optimizer's parameters, and let it skip an update that is not finite.

    Args:
        clip_norm: the largest norm, sqrt(sum g^2), of all gradients together; larger ones are scaled to it.
        skip_nonfinite: the optimizer's next step changes nothing, its own state included, if a gradient is infinite or
            NaN. It must be a fused one, which reads that on the device, as for `torch.amp.GradScaler`.
        norms: [>= number of parameters], where the norm of each gradient before it is clipped is written, in the order
            of the parameters that have one.
    """
    if not skip_nonfinite:
        optimizer.__dict__.pop("found_inf", None)  # of an earlier step that could be skipped
    if clip_norm is None and not skip_nonfinite and norms is None:
        return
    parameters = [it for group in optimizer.param_groups for it in group["params"] if it.grad is not None]
    found = torch.stack(
        torch._foreach_norm([it.grad for it in parameters]), out=None if norms is None else norms[: len(parameters)]
    )
    if skip_nonfinite:
        optimizer.found_inf = found.isfinite().all().logical_not().float()  # type: ignore[attr-defined]
    if clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, torch.linalg.vector_norm(found))
