"""fastvae: fused operations for training variational autoencoders in PyTorch."""

from fastvae import functional, nn
from fastvae.backend import Backend, backend_for, use_backend

__version__ = "0.1.0"

__all__ = ["Backend", "__version__", "backend_for", "functional", "nn", "use_backend"]
