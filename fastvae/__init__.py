"""fastvae: fused operations for training variational autoencoders in PyTorch."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, overload

# In a checkout, which holds kernels/ beside fastvae/, so that it works where Python finds it by its path alone.
if not Path(__file__).with_name("kernels").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

from fastvae import functional, nn
from fastvae.backend import Backend, backend_for, use_backend
from fastvae.distributions import DiagonalGaussian

if TYPE_CHECKING:
    from fastvae import data as data
    from fastvae import evaluation as evaluation
    from fastvae import export as export
    from fastvae import models as models
    from fastvae import plots as plots
    from fastvae import priors as priors
    from fastvae import training as training
    from fastvae.models import VAE

Model = TypeVar("Model", bound="VAE")

__version__ = "0.1.0"

# Imported when they are first asked for, so that importing fastvae stays quick.
_LATER = ("data", "evaluation", "export", "models", "plots", "priors", "training")

__all__ = ["Backend", "DiagonalGaussian", "__version__", "backend_for", "functional", "load", "nn", "use_backend"]


if not TYPE_CHECKING:  # else a name that does not exist would have a type

    def __getattr__(name):
        if name in _LATER:
            return importlib.import_module(f"fastvae.{name}")
        raise AttributeError(f"module 'fastvae' has no attribute {name!r}")


@overload
def load(path: str | os.PathLike[str]) -> VAE: ...
@overload
def load(path: str | os.PathLike[str], model: Model | type[Model]) -> Model: ...
def load(path: str | os.PathLike[str], model: VAE | type[VAE] | None = None) -> VAE:
    """Load a trained model from the folder of a run, from its checkpoint.pt (see `fastvae.training.write_checkpoint`),
    or from a file whose name ends in .safetensors (see `fastvae.export.write_safetensors`).

    A file is enough to build fastvae's own models, such as `ConvVAE`. For a model of your own pass ``model``. It is a
    model with the same layers; it is copied, and the copy gets the file's weights. Or it is a class whose models have
    an attribute ``settings``, a dict of the arguments of the class.

    If the run kept a moving average of the weights, the model has the average. The model is on the CPU, in evaluation
    mode, with the dtypes that it was saved with. Raises ``OSError`` if there is no such file. Raises ``ValueError`` if
    the file holds no model or is damaged, if ``model`` is needed or does not fit, or if the module of your own
    likelihood is not imported yet.
    """
    path = Path(path)
    found: VAE
    # Imported here, so that importing fastvae stays quick.
    if path.suffix == ".safetensors":
        from fastvae.export import read_safetensors

        found = read_safetensors(path, model)
    else:
        from fastvae.training.checkpoint import read_checkpoint

        found = read_checkpoint(path / "checkpoint.pt" if path.is_dir() else path, model).in_use
    return found.eval()
