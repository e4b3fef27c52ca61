"""One training step: loss, precision, clipping, optimizer. What is traced is what runs."""

from sartor.step.loss import SumLoss, TensorBatch
from sartor.step.optim import learning_rate, make_optimizer
from sartor.step.packing import cannot_pack, mixes_examples
from sartor.step.precision import Precision
from sartor.step.step import Gradients, TrainStep, enable_recompute

__all__ = [
    "Gradients",
    "Precision",
    "SumLoss",
    "TensorBatch",
    "TrainStep",
    "cannot_pack",
    "enable_recompute",
    "learning_rate",
    "make_optimizer",
    "mixes_examples",
]
