"""What is measured after training, or between epochs, on images the model has not seen."""

from fastvae.evaluation.reconstruction import Evaluation, evaluate, reconstruction_errors

__all__ = ["Evaluation", "evaluate", "reconstruction_errors"]
