"""Datasets. Images are uint8 tensors: published datasets, a small default that needs no network, and your own files.
Your own tables and signals are standardised.
"""

from .dataset import ImageDataset, SkippedFile
from .digits import load_digits
from .folder import load_folder
from .idx import read_idx
from .idx_pair import load_idx
from .mnist import (
    FASHION_MNIST_MIRRORS,
    KMNIST_MIRRORS,
    MNIST_MIRRORS,
    DownloadError,
    default_data_dir,
    load_fashion_mnist,
    load_kmnist,
    load_mnist,
)
from .named import DATASETS, OWN_DATASETS, find_dataset, load_dataset
from .numbers import load_signals, load_table
from .numpy_files import load_npy, load_npz
from .standardisation import Standardisation

__all__ = [
    "DATASETS",
    "FASHION_MNIST_MIRRORS",
    "KMNIST_MIRRORS",
    "MNIST_MIRRORS",
    "OWN_DATASETS",
    "DownloadError",
    "ImageDataset",
    "SkippedFile",
    "Standardisation",
    "default_data_dir",
    "find_dataset",
    "load_dataset",
    "load_digits",
    "load_fashion_mnist",
    "load_folder",
    "load_idx",
    "load_kmnist",
    "load_mnist",
    "load_npy",
    "load_npz",
    "load_signals",
    "load_table",
    "read_idx",
]
