"""fastvae: fused operations for training variational autoencoders in PyTorch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from fastvae import functional, nn
from fastvae.backend import Backend, backend_for, use_backend
from fastvae.distributions import DiagonalGaussian

if TYPE_CHECKING:
    from fastvae.models import ConvVAE

__version__ = "0.1.0"

__all__ = ["Backend", "DiagonalGaussian", "__version__", "backend_for", "functional", "load", "nn", "use_backend"]


def load(path: str | os.PathLike[str]) -> ConvVAE:
    """The model of a run: of its folder, or of its checkpoint.pt, see `fastvae.training.write_checkpoint`; or of a file
    whose name ends in .safetensors, see `fastvae.export.write_safetensors`.

    Of a run that kept a moving average of the weights, the model has the average. It is on the CPU, in evaluation mode,
    and has the dtypes that it was written with. Raises ``OSError`` where there is no such file, and ``ValueError``
    where it holds no such model or is damaged.
    """
    path = Path(path)
    model: ConvVAE
    # Imported here, so that importing fastvae stays quick.
    if path.suffix == ".safetensors":
        from fastvae.export import read_safetensors

        model = read_safetensors(path)
    else:
        from fastvae.training.checkpoint import read_checkpoint

        model = read_checkpoint(path / "checkpoint.pt" if path.is_dir() else path).in_use
    return model.eval()
