"""The state of Adam: compared with what it is for, because torch loads any, and then reads beyond its end."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_MOMENTS = ("exp_avg", "exp_avg_sq")
_OPTIONS = {"params", "lr", "betas", "eps", "weight_decay"}  # for the others torch has defaults


def check_tensor(name: str, value: object, dtype: torch.dtype, shape: torch.Size) -> None:
    """Raises ``ValueError`` for anything else."""
    if not isinstance(value, Tensor):
        raise ValueError(f"resume does not fit: {name} must be a tensor, got {value!r}")
    if value.dtype is not dtype or value.shape != shape or value.layout is not torch.strided or value.is_meta:
        found = f"{value.dtype} {list(value.shape)} on {value.device}"
        raise ValueError(f"resume does not fit: {name} must be {dtype} {list(shape)}, got {found}")


def check_optimizer(optimizer: Optimizer, state: object, names: Mapping[Any, str]) -> None:
    """Raises ``ValueError`` for a state_dict that is not one of such an Adam, with such parameters, which have `names`.

    Strides need no comparison: `restore_optimizer` gives the moments those of their parameters.
    """
    if not (isinstance(state, dict) and state.keys() == {"state", "param_groups"} and isinstance(state["state"], dict)):
        raise ValueError("resume must have the state_dict of an optimizer")
    groups, saved_groups = optimizer.state_dict()["param_groups"], state["param_groups"]
    if not isinstance(saved_groups, list) or len(saved_groups) != len(groups):
        raise ValueError(f"resume does not fit: the optimizer has {len(groups)} groups of parameters")
    for group, saved in zip(groups, saved_groups, strict=True):
        if not isinstance(saved, dict) or not saved.keys() >= _OPTIONS or saved["params"] != group["params"]:
            raise ValueError(f"resume does not fit: a group of parameters must be {group}, got {saved}")
        for option in group.keys() & saved.keys():  # torch's versions may have others
            if not _alike(group[option], saved[option]):
                raise ValueError(
                    f"resume does not fit: the optimizer's {option} must be like {group[option]}, got {saved[option]}"
                )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, held in state["state"].items():
        if not isinstance(index, int) or not 0 <= index < len(parameters):
            raise ValueError(f"resume does not fit: the optimizer has {len(parameters)} parameters, got number {index}")
        parameter, name = parameters[index], names[parameters[index]]
        if not isinstance(held, dict) or held.keys() != {"step", *_MOMENTS}:
            raise ValueError(f"resume does not fit: {name} must have step, exp_avg and exp_avg_sq, got {held}")
        check_tensor(f"step of {name}", held["step"], torch.float32, torch.Size())
        for moment in _MOMENTS:
            check_tensor(f"{moment} of {name}", held[moment], parameter.dtype, parameter.shape)


def restore_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load a state_dict. A learning rate that is a tensor stays the tensor that it was, on its device, for a captured
    graph to read; and moments lie in memory as their parameters do, which the fused Adam goes through as one row.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(rate, Tensor):
            group["lr"] = rate.copy_(torch.as_tensor(group["lr"]))
        for parameter in group["params"]:
            held = optimizer.state.get(parameter, {})
            # Each in memory of its own: tensors of a file may share theirs.
            if "step" in held:
                held["step"] = held["step"].clone()
            for moment in _MOMENTS:
                if moment in held:
                    held[moment] = torch.empty_like(parameter, requires_grad=False).copy_(held[moment])


def _alike(value: object, saved: object) -> bool:
    """Numbers may differ, as a schedule moves them; what says how the optimizer works may not."""
    if isinstance(value, tuple | list):
        return isinstance(saved, tuple | list) and len(saved) == len(value) and all(map(_alike, value, saved))
    if isinstance(value, Tensor) or (isinstance(value, Real) and not isinstance(value, bool)):
        if isinstance(saved, Tensor):
            return saved.numel() == 1 and saved.is_floating_point()
        return isinstance(saved, Real) and not isinstance(saved, bool)
    return value == saved
