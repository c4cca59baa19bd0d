"""Which steps had a loss or a gradient that is not finite, and the words for the first of them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from fastvae.training.steps import Steps


class Means(NamedTuple):
    """Over steps: of the loss, reconstruction and kl, without the steps that were skipped, and how many these are."""

    loss: float
    reconstruction: float
    kl: float
    skipped: int


def means(steps: Steps, first: int, last: int, epoch: int) -> Means:
    """The means over the epoch's steps number first, ..., last - 1, counted from 0.

    Raises ``FloatingPointError`` if one is not finite, unless such steps are skipped; it names the first.
    """
    history = steps.history[first:last]
    if not steps.settings.skip_nonfinite:
        # Any value that is not finite makes its column's mean so: one read for all.
        averages = history.mean(0).tolist()
        if not all(map(math.isfinite, averages)):
            _explain(steps, first, last, epoch, averages[0])
        return Means(averages[0], averages[1], averages[2], 0)
    good = history.isfinite().all(1)
    total = history[:, :3].where(good[:, None], 0).sum(0)
    loss, reconstruction, kl, count = torch.cat([total / good.sum(), good.sum()[None]]).tolist()
    return Means(loss, reconstruction, kl, last - first - int(count))


def broken(steps: Steps) -> list[str]:
    """The parameters that are not finite."""
    return [name for name, value in steps.model.named_parameters() if not value.isfinite().all()]


def _explain(steps: Steps, first: int, last: int, epoch: int, mean_loss: float) -> None:
    """Raise for the first step that was not finite, or for the last one where only the mean of the losses is not."""
    history = steps.history[first:last].cpu()
    finite = [*history.isfinite().all(1).tolist(), math.isfinite(mean_loss)]
    if all(finite):
        return  # a mean of norms that are finite
    at = min(finite.index(False), len(history) - 1)
    loss, reconstruction, kl, *norms = history[at].tolist()
    step = (epoch - 1) * steps.count + first + at + 1
    by_now = ", ".join(broken(steps)) or "no weight"
    names = [name for name, parameter in steps.model.named_parameters() if parameter.grad is not None]
    found = [f"{name} (norm {norm:g})" for name, norm in zip(names, norms, strict=False) if not math.isfinite(norm)]
    if not (math.isfinite(loss) and found):
        raise FloatingPointError(
            f"training diverged: at step {step}, in epoch {epoch}, the loss is {loss:g} (reconstruction "
            f"{reconstruction:g}, kl {kl:g}); not finite by now: {by_now}"
        )
    raise FloatingPointError(
        f"training diverged: at step {step}, in epoch {epoch}, these gradients are not finite: {', '.join(found)}; the "
        f"loss is {loss:g} (reconstruction {reconstruction:g}, kl {kl:g}); not finite by now: {by_now}"
    )
