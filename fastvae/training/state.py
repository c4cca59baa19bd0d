"""Where training is, so that it can go on from there: all but the model's weights."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from fastvae.training.metrics import EpochMetrics
from fastvae.training.optimizer_state import check_optimizer, check_tensor, restore_optimizer
from fastvae.training.steps import Steps


class TrainingState(NamedTuple):
    """All on the CPU.

    rows: the metrics of the finished epochs. seconds: trained so far.
    order, history: of an unfinished epoch, its images and what `Steps.history` holds of the steps that are done; empty
    between epochs.
    optimizer: its state_dict. generators: the states of the default generators, the CPU's and, if the model is on
    another device, that device's.
    average: the state_dict of `MovingAverage.model`, None without one; schedule: of the scheduler.
    images, batch_size: the samples of the training set, and of a step, None where a loader does not say; threads: those
    of a CPU's steps. None in files of before they were kept.
    """

    rows: list[EpochMetrics]
    seconds: float
    order: Tensor
    history: Tensor
    optimizer: dict[str, Any]
    generators: list[Tensor]
    average: dict[str, Tensor] | None = None
    schedule: dict[str, Any] | None = None
    images: int | None = None
    batch_size: int | None = None
    threads: int | None = None

    @property
    def epoch(self) -> int:
        """How many epochs were trained, an unfinished one included."""
        return len(self.rows) + (len(self.history) > 0)


def state_of(
    steps: Steps, scheduler: LRScheduler | None, rows: list[EpochMetrics], done: int, seconds: float
) -> TrainingState:
    """The state after `done` steps of the epoch that follows those of `rows`."""
    return TrainingState(
        list(rows),
        seconds,
        steps.order[: len(steps.order) if done else 0].cpu(),
        steps.history[:done].cpu(),
        _on_cpu(steps.optimizer.state_dict()),
        _generators(steps.device),
        None if steps.average is None else _on_cpu(dict(steps.average.model.state_dict())),
        None if scheduler is None else _on_cpu(scheduler.state_dict()),
        steps.data.size,
        steps.data.batch_size,
        None if steps.device.type == "cuda" else torch.get_num_threads(),
    )


def restore(state: TrainingState, steps: Steps, scheduler: LRScheduler | None) -> int:
    """Put `steps`, the scheduler and the generators where they were; returns the steps that are done of the unfinished
    epoch.

    Raises ``ValueError``, before anything is changed, if the images, batches, device or parameters are others, or if
    only one of the two runs has an average or a schedule.
    """
    on_cuda = steps.device.type == "cuda"
    if len(state.generators) != 1 + on_cuda:
        raise ValueError("resume must be a state of the same kind of device")
    done = len(state.history)
    _check_progress(state, steps)
    for name, held, given in (("average", state.average, steps.average), ("schedule", state.schedule, scheduler)):
        if (held is None) != (given is None):
            raise ValueError(f"resume must be a state of a run {'without' if given is None else 'with'} {name}")
    names = {parameter: name for name, parameter in steps.model.named_parameters()}
    check_optimizer(steps.optimizer, state.optimizer, names)
    if steps.average is not None and state.average is not None:
        held = steps.average.model.state_dict()
        if held.keys() != state.average.keys():
            raise ValueError(f"resume must have an average of {', '.join(held)}, got {', '.join(state.average)}")
        for name, value in held.items():
            check_tensor(f"the average of {name}", state.average[name], value.dtype, value.shape)
    if scheduler is not None and state.schedule is not None:
        _check_schedule(scheduler, state.schedule)

    # Copies: the optimizer and the scheduler would go on in the tensors and lists of the state.
    restore_optimizer(steps.optimizer, copy.deepcopy(state.optimizer))
    if steps.average is not None and state.average is not None:
        steps.average.model.load_state_dict(state.average)
        steps.average.steps.fill_(len(state.rows) * steps.count + done)
    if scheduler is not None and state.schedule is not None:
        scheduler.load_state_dict(copy.deepcopy(state.schedule))
    if done:
        steps.order = state.order.to(steps.data_device)
        steps.history[:done] = state.history.to(steps.device)
    torch.set_rng_state(state.generators[0])
    if on_cuda:
        torch.cuda.set_rng_state(state.generators[1], steps.device)
    return done


def _generators(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _check_progress(state: TrainingState, steps: Steps) -> None:
    images, batch_size, done = steps.data.size, steps.data.batch_size, len(state.history)
    expected = f"resume must be a state of {images} images in batches of {batch_size}"
    if state.images is not None and (state.images, state.batch_size) != (images, batch_size):
        raise ValueError(f"{expected}, got {state.images} images in batches of {state.batch_size}")
    # What older files tell.
    if done and (len(state.order) != (images if steps.data.ordered else 0) or done > steps.count):
        raise ValueError(f"{expected}, got {len(state.order)} images and {done} steps")
    if state.rows and state.rows[-1].step != len(state.rows) * steps.count:
        raise ValueError(f"{expected}, {steps.count} steps an epoch, got {state.rows[-1].step} in {len(state.rows)}")
    if done:
        check_tensor("order", state.order, torch.int64, torch.Size([len(state.order)]))
        check_tensor("history", state.history, steps.history.dtype, steps.history[:done].shape)
        if not torch.equal(state.order.sort().values, torch.arange(len(state.order))):
            raise ValueError(f"resume must have the order of {images} images, each of them once")
    for generator, now in zip(state.generators, _generators(steps.device), strict=True):
        check_tensor("the state of a generator", generator, now.dtype, now.shape)


def _check_schedule(scheduler: LRScheduler, state: dict[str, Any]) -> None:
    """Loading it replaces any attribute, methods included."""
    wrong = [it for it in state if it == "optimizer" or callable(getattr(type(scheduler), it, None))]
    if wrong:
        raise ValueError(f"resume must have the state of a {type(scheduler).__name__}, got {', '.join(wrong)} in it")


def _on_cpu(value: Any) -> Any:
    """The tensors in nested dictionaries and lists as copies on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {name: _on_cpu(item) for name, item in value.items()}
    return [_on_cpu(item) for item in value] if isinstance(value, list) else value
