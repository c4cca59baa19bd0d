"""fastvae: fused operations for training variational autoencoders in PyTorch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from fastvae import functional, nn
from fastvae.backend import Backend, backend_for, use_backend

if TYPE_CHECKING:
    from fastvae.models import ConvVAE

__version__ = "0.1.0"

__all__ = ["Backend", "__version__", "backend_for", "functional", "load", "nn", "use_backend"]


def load(path: str | os.PathLike[str]) -> ConvVAE:
    """The model of a run: of its folder, or of its checkpoint.pt, see `fastvae.training.write_checkpoint`.

    Of a run that kept a moving average of the weights, the model has the average. It is on the CPU and in evaluation
    mode. Raises ``OSError`` where there is no such file, and ``ValueError`` where it is no checkpoint.
    """
    from fastvae.training.checkpoint import read_checkpoint  # here, so that importing fastvae stays quick

    path = Path(path)
    found = read_checkpoint(path / "checkpoint.pt" if path.is_dir() else path)
    model: ConvVAE = found.model if found.average is None else found.average
    return model.eval()
