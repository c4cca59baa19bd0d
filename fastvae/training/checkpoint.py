"""A model in a file, and what its training needs to go on from there."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastvae.files import replacing
from fastvae.models import ConvVAE
from fastvae.training.metrics import EpochMetrics
from fastvae.training.state import TrainingState


class Checkpoint(NamedTuple):
    """What `write_checkpoint` wrote. run and state are None where it was given none.

    model: as it was trained. average: the model with the moving average of its weights, where the state has one.
    """

    model: ConvVAE
    epoch: int
    state: TrainingState | None
    run: dict[str, Any] | None
    average: ConvVAE | None = None

    @property
    def in_use(self) -> ConvVAE:
        """The model that is tested and shown: the average, where there is one."""
        return self.model if self.average is None else self.average


def previous(path: Path) -> Path:
    """Where `write_checkpoint` keeps the checkpoint that it replaces."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def write_checkpoint(
    path: Path,
    model: ConvVAE,
    epoch: int,
    state: TrainingState | None = None,
    run: Mapping[str, Any] | None = None,
    *,
    keep_previous: bool = True,
) -> None:
    """A file for ``torch.load(path, weights_only=True)``, with everything on the CPU.

    It holds "model", the state_dict; "settings", the arguments of `ConvVAE`; "epoch", the epochs trained, an unfinished
    one included; and, where given, "state" and "run", what training is to go on with: any settings that a later run is
    to be compared with. Whoever is killed while this writes leaves the file that was there before; that file is then
    kept beside the new one, as `previous`, unless ``keep_previous`` is false.

    Raises ``OSError`` where it cannot be written; what was there stays.
    """
    saved = {
        "model": {name: value.detach().cpu() for name, value in model.state_dict().items()},
        "settings": model.settings,
        "epoch": epoch,
        "state": None if state is None else {**state._asdict(), "rows": [row._asdict() for row in state.rows]},
        "run": None if run is None else dict(run),
    }
    if keep_previous and path.exists():
        with open(path, "rb") as old, replacing(previous(path)) as copy:
            shutil.copyfileobj(old, copy)
    with replacing(path) as file:
        try:
            torch.save(saved, file)
        except RuntimeError as error:
            # Of torch's writer, in the wake of what the file itself raised.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def read_checkpoint(path: Path) -> Checkpoint:
    """What is in a checkpoint's file, on the CPU.

    Raises ``OSError`` where there is no such file, and ``ValueError`` where it is no checkpoint.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        model = ConvVAE(**saved["settings"])
        model.load_state_dict(saved["model"])
        state, average = saved["state"], None
        if state is not None:
            state = TrainingState(**{**state, "rows": [EpochMetrics(**row) for row in state["rows"]]})
            if state.average is not None:
                average = ConvVAE(**saved["settings"])
                average.load_state_dict(state.average)
        return Checkpoint(model, saved["epoch"], state, saved["run"], average)
    except OSError:
        raise
    except Exception as error:  # torch.load and load_state_dict raise errors of many kinds
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is not a checkpoint of fastvae: {reason}") from error
