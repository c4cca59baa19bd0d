"""Training: the loop of the reference example, what it shows, and what it leaves on disk."""

from fastvae.training.average import MovingAverage
from fastvae.training.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from fastvae.training.display import Display, make_display
from fastvae.training.distributed import Processes, ProcessLost, process_group
from fastvae.training.graphs import GraphError
from fastvae.training.interrupt import stop_on_interrupt
from fastvae.training.listener import Listener
from fastvae.training.loop import train
from fastvae.training.metrics import EpochMetrics, Progress, best_epoch
from fastvae.training.precision import PRECISIONS
from fastvae.training.records import versions, write_metrics, write_summary
from fastvae.training.settings import Training
from fastvae.training.state import TrainingState
from fastvae.training.steps import training_step
from fastvae.training.threads import choose_threads, with_threads

__all__ = [
    "PRECISIONS",
    "Checkpoint",
    "Display",
    "EpochMetrics",
    "GraphError",
    "Listener",
    "MovingAverage",
    "ProcessLost",
    "Processes",
    "Progress",
    "Training",
    "TrainingState",
    "best_epoch",
    "choose_threads",
    "make_display",
    "process_group",
    "read_checkpoint",
    "stop_on_interrupt",
    "train",
    "training_step",
    "versions",
    "with_threads",
    "write_checkpoint",
    "write_metrics",
    "write_summary",
]
