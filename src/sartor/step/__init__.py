"""One training step: loss, precision, clipping, optimizer. What is traced is what runs."""

from sartor.step.assemble import make_step, make_trainable
from sartor.step.loss import SumLoss, TensorBatch
from sartor.step.optim import learning_rate
from sartor.step.packing import cannot_pack, cannot_share_prefixes, mixes_examples, splits_prefixes
from sartor.step.precision import FAST_BF16, Precision
from sartor.step.processes import GradientSum, World
from sartor.step.shared import SharedGradients
from sartor.step.step import Gradients, TrainStep, first_of, share_step

__all__ = [
    "FAST_BF16",
    "GradientSum",
    "Gradients",
    "Precision",
    "SharedGradients",
    "SumLoss",
    "TensorBatch",
    "TrainStep",
    "World",
    "cannot_pack",
    "cannot_share_prefixes",
    "first_of",
    "learning_rate",
    "make_step",
    "make_trainable",
    "mixes_examples",
    "share_step",
    "splits_prefixes",
]
