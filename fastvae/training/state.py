"""Where training is, so that it can go on from there: all but the model's weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fastvae.training.metrics import EpochMetrics
from fastvae.training.steps import Steps


class TrainingState(NamedTuple):
    """All on the CPU.

    rows: the metrics of the finished epochs. seconds: trained so far.
    order, history: of an unfinished epoch, its images and what `Steps.history` holds of the steps that are done; empty
    between epochs.
    optimizer: its state_dict. generators: the states of the default generators, the CPU's and, if the model is on
    another device, that device's.
    average: the state_dict of `MovingAverage.model`, None without one; schedule: of the scheduler.
    """

    rows: list[EpochMetrics]
    seconds: float
    order: Tensor
    history: Tensor
    optimizer: dict[str, Any]
    generators: list[Tensor]
    average: dict[str, Tensor] | None = None
    schedule: dict[str, Any] | None = None


def state_of(
    steps: Steps, scheduler: LRScheduler | None, rows: list[EpochMetrics], done: int, seconds: float
) -> TrainingState:
    """The state after `done` steps of the epoch that follows those of `rows`."""
    generators = [torch.get_rng_state()]
    if steps.device.type == "cuda":
        generators.append(torch.cuda.get_rng_state(steps.device))
    return TrainingState(
        list(rows),
        seconds,
        steps.order[: len(steps.order) if done else 0].cpu(),
        steps.history[:done].cpu(),
        _on_cpu(steps.optimizer.state_dict()),
        generators,
        None if steps.average is None else _on_cpu(dict(steps.average.model.state_dict())),
        None if scheduler is None else _on_cpu(scheduler.state_dict()),
    )


def restore(state: TrainingState, steps: Steps, scheduler: LRScheduler | None) -> int:
    """Put `steps`, the scheduler and the generators where they were; returns the steps that are done of the unfinished
    epoch.

    Raises ``ValueError`` for a state of other images, batches or devices, or of a run with or without what this one
    has not or has.
    """
    on_cuda = steps.device.type == "cuda"
    if len(state.generators) != 1 + on_cuda:
        raise ValueError("resume must be a state of the same kind of device")
    done = len(state.history)
    if done and (len(state.order) != len(steps.images) or done > steps.count):
        raise ValueError(
            f"resume must be a state of {len(steps.images)} images in batches of {steps.batch_size}, "
            f"got {len(state.order)} images and {done} steps"
        )
    for name, held, given in (("average", state.average, steps.average), ("schedule", state.schedule, scheduler)):
        if (held is None) != (given is None):
            raise ValueError(f"resume must be a state of a run {'without' if given is None else 'with'} {name}")
    _restore_optimizer(steps.optimizer, state.optimizer)
    if steps.average is not None and state.average is not None:
        steps.average.model.load_state_dict(state.average)
        steps.average.steps.fill_(len(state.rows) * steps.count + done)
    if scheduler is not None and state.schedule is not None:
        scheduler.load_state_dict(state.schedule)
    if done:
        steps.order = state.order.to(steps.images.device)
        steps.history[:done] = state.history.to(steps.device)
    torch.set_rng_state(state.generators[0])
    if on_cuda:
        torch.cuda.set_rng_state(state.generators[1], steps.device)
    return done


def _restore_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load its state_dict; a learning rate that is a tensor stays the tensor that it was, on its device."""
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(rate, Tensor):
            group["lr"] = rate.copy_(torch.as_tensor(group["lr"]))


def _on_cpu(value: Any) -> Any:
    """The tensors in nested dictionaries and lists as copies on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {name: _on_cpu(item) for name, item in value.items()}
    return [_on_cpu(item) for item in value] if isinstance(value, list) else value
