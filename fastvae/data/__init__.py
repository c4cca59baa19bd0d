"""Image datasets as uint8 tensors: MNIST (downloaded once) and a small bundled default that needs no network."""

from .digits import load_digits
from .idx import read_idx
from .mnist import MNIST_MIRRORS, DownloadError, ImageDataset, default_data_dir, load_mnist
from .named import load_dataset

__all__ = [
    "MNIST_MIRRORS",
    "DownloadError",
    "ImageDataset",
    "default_data_dir",
    "load_dataset",
    "load_digits",
    "load_mnist",
    "read_idx",
]
