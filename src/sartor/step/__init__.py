"""One training step: loss, precision, clipping, optimizer. What is traced is what runs."""

from sartor.step.loss import SumLoss, TensorBatch, accepts_positions
from sartor.step.optim import learning_rate, make_optimizer
from sartor.step.precision import Precision
from sartor.step.step import Gradients, TrainStep, enable_recompute

__all__ = [
    "Gradients",
    "Precision",
    "SumLoss",
    "TensorBatch",
    "TrainStep",
    "accepts_positions",
    "enable_recompute",
    "learning_rate",
    "make_optimizer",
]
