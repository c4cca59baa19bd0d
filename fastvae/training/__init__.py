"""Training: the loop of the reference example, what it shows, and what it leaves on disk."""

from fastvae.training.display import Display, make_display
from fastvae.training.interrupt import stop_on_interrupt
from fastvae.training.loop import EpochMetrics, Progress, train
from fastvae.training.precision import PRECISIONS
from fastvae.training.records import versions, write_checkpoint, write_metrics, write_summary
from fastvae.training.steps import training_step

__all__ = [
    "PRECISIONS",
    "Display",
    "EpochMetrics",
    "Progress",
    "make_display",
    "stop_on_interrupt",
    "train",
    "training_step",
    "versions",
    "write_checkpoint",
    "write_metrics",
    "write_summary",
]
