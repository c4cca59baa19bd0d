"""Where training is, so that it can go on from there: all but the model's weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvae.training.metrics import EpochMetrics
from fastvae.training.steps import Steps


class TrainingState(NamedTuple):
    """All on the CPU.

    rows: the metrics of the finished epochs. seconds: trained so far.
    order, history: of an unfinished epoch, its images and what `Steps.history` holds of the steps that are done; empty
    between epochs.
    optimizer: its state_dict. generators: the states of the default generators, the CPU's and, if the model is on
    another device, that device's.
    """

    rows: list[EpochMetrics]
    seconds: float
    order: Tensor
    history: Tensor
    optimizer: dict[str, Any]
    generators: list[Tensor]


def state_of(steps: Steps, rows: list[EpochMetrics], done: int, seconds: float) -> TrainingState:
    """The state after `done` steps of the epoch that follows those of `rows`."""
    generators = [torch.get_rng_state()]
    if steps.images.device.type == "cuda":
        generators.append(torch.cuda.get_rng_state(steps.images.device))
    return TrainingState(
        list(rows),
        seconds,
        steps.order[: len(steps.order) if done else 0].cpu(),
        steps.history[:done].cpu(),
        _on_cpu(steps.optimizer.state_dict()),
        generators,
    )


def restore(state: TrainingState, steps: Steps) -> int:
    """Put `steps` and the generators where they were; returns the steps that are done of the unfinished epoch.

    Raises ``ValueError`` for a state of other images, batches or devices.
    """
    on_cuda = steps.images.device.type == "cuda"
    if len(state.generators) != 1 + on_cuda:
        raise ValueError("resume must be a state of the same kind of device")
    done = len(state.history)
    if done and (len(state.order) != len(steps.images) or done > steps.count):
        raise ValueError(
            f"resume must be a state of {len(steps.images)} images in batches of {steps.batch_size}, "
            f"got {len(state.order)} images and {done} steps"
        )
    steps.optimizer.load_state_dict(state.optimizer)
    if done:
        steps.order = state.order.to(steps.images.device)
        steps.history[:done] = state.history.to(steps.images.device)
    torch.set_rng_state(state.generators[0])
    if on_cuda:
        torch.cuda.set_rng_state(state.generators[1], steps.images.device)
    return done


def _on_cpu(value: Any) -> Any:
    """The tensors in nested dictionaries and lists as copies on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {name: _on_cpu(item) for name, item in value.items()}
    return [_on_cpu(item) for item in value] if isinstance(value, list) else value
