"""Training: the loop of the reference example."""

from fastvae.training.loop import EpochMetrics, Progress, train, training_step

__all__ = ["EpochMetrics", "Progress", "train", "training_step"]
