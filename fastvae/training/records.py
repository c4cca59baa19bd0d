"""What a run says of itself: metrics.csv and summary.json, each written atomically."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from fastvae.files import replacing, write_csv
from fastvae.training.metrics import EpochMetrics


def write_metrics(path: Path, rows: Iterable[EpochMetrics]) -> None:
    """A CSV file with the fields of `EpochMetrics` as its header, and a line for each epoch."""
    write_csv(path, EpochMetrics._fields, rows)


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """A JSON file."""
    with replacing(path) as file:
        file.write((json.dumps(summary, indent=2) + "\n").encode())


def versions() -> dict[str, str | None]:
    """The versions of what a result depends on; None for Triton where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "fastvae"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found
