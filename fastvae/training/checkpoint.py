"""A model in a file, and what its training needs to go on from there."""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastvae.files import replacing
from fastvae.likelihoods import NotImported, SigmoidMSE
from fastvae.models import VAE
from fastvae.models.stored import ModelNeeded, Stored, restored, stored
from fastvae.training.metrics import EpochMetrics
from fastvae.training.state import TrainingState


class Checkpoint(NamedTuple):
    """What `write_checkpoint` wrote. run and state are None where it was given none.

    model: as it was trained. average: the model with the moving average of its weights, where the state has one.
    """

    model: VAE
    epoch: int
    state: TrainingState | None
    run: dict[str, Any] | None
    average: VAE | None = None

    @property
    def in_use(self) -> VAE:
        """The model that is tested and shown: the average, where there is one."""
        return self.model if self.average is None else self.average


def previous(path: Path) -> Path:
    """Where `write_checkpoint` keeps the checkpoint that it replaces."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def write_checkpoint(
    path: str | os.PathLike[str],
    model: VAE,
    epoch: int,
    state: TrainingState | None = None,
    run: Mapping[str, Any] | None = None,
    *,
    keep_previous: bool = True,
) -> None:
    """A file for ``torch.load(path, weights_only=True)``, with everything on the CPU.

    It holds "model", the state_dict; "class", the name of its class; "settings", the arguments of that class, where the
    model has an attribute of this name, a dict; "likelihood", a text; "epoch", the epochs trained, an unfinished one
    included; and, where given, "state" and "run", what training is to go on with: any settings that a later run is to
    be compared with. Whoever is killed while this writes leaves the file that was there before; that file is then
    kept beside the new one, as `previous`, unless ``keep_previous`` is false.

    torch keeps a checksum of each part of the file, which `read_checkpoint` compares.

    Raises ``OSError`` where it cannot be written; ``ValueError`` for a ConvVAE that its settings do not build, because
    a layer was replaced; ``TypeError`` for what is no VAE, or settings that no file can hold. What was there stays.
    """
    path = Path(path)
    held = stored(model)
    saved = {
        "model": held.tensors,
        "class": held.model,
        "settings": held.settings,
        "likelihood": held.likelihood,
        "epoch": epoch,
        "state": None if state is None else {**state._asdict(), "rows": [row._asdict() for row in state.rows]},
        "run": None if run is None else dict(run),
    }
    content = io.BytesIO()  # torch's own writer to a file hides why the file could not be written
    torch.save(saved, content)
    if keep_previous and path.exists():
        with open(path, "rb") as old, replacing(previous(path)) as copy:
            shutil.copyfileobj(old, copy)
    with replacing(path) as file:
        file.write(content.getbuffer())


def read_checkpoint(path: str | os.PathLike[str], model: VAE | type[VAE] | None = None) -> Checkpoint:
    """What is in a checkpoint's file, on the CPU, in the dtypes that it had.

    model: for a class of your own, a model of it, which is copied, or the class, if its models have ``settings``.

    Raises ``OSError`` where there is no such file, and ``ValueError`` where it is no checkpoint, or a damaged one; if
    the one before it, `previous`, is there and whole, the error says so. A model that the file does not build without
    ``model``, or that does not fit it, is a ``ValueError``. A likelihood of your own must have been
    imported before, else the ``ValueError`` names its module: reading a file imports nothing.
    """
    path = Path(path)
    try:
        return _read(path, model)
    except ValueError as error:
        before = previous(path)
        try:
            epoch = _read(before, model).epoch
        except (OSError, ValueError):
            raise error from None
        raise ValueError(f"{error}; {before}, of epoch {epoch}, is whole") from error


def _read(path: Path, given: VAE | type[VAE] | None) -> Checkpoint:
    content = path.read_bytes()
    try:
        # torch writes the checksums of a zip file, and does not compare them.
        with zipfile.ZipFile(io.BytesIO(content)) as parts:
            damaged = parts.testzip()
        if damaged is not None:
            raise ValueError(f"it is damaged: the checksum of {damaged} is not that of its content")
        saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        held = Stored(
            # What files of before do not hold.
            saved.get("class", "fastvae.models.ConvVAE"),
            saved["settings"],
            saved.get("likelihood", (saved["settings"] or {}).get("likelihood", SigmoidMSE().key)),
            saved["model"],
        )
        model = restored(held, given)
        state, average = saved["state"], None
        if state is not None:
            state = TrainingState(**{**state, "rows": [EpochMetrics(**row) for row in state["rows"]]})
            if state.average is not None:
                average = restored(held._replace(tensors=state.average), given)
        return Checkpoint(model, saved["epoch"], state, saved["run"], average)
    except (NotImported, ModelNeeded) as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # of a damaged file, zipfile, torch.load and load_state_dict raise errors of many kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is not a checkpoint of fastvae: {reason}") from error
