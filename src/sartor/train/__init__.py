"""The training loop, its checkpoints and its record."""

from sartor.train.loop import RESUME_LATEST, fit
from sartor.train.metrics import Observer
from sartor.train.record import Answer, EvalRecord, MemoryOutcome, Run, StepRecord, load_run, read_metrics

__all__ = [
    "RESUME_LATEST",
    "Answer",
    "EvalRecord",
    "MemoryOutcome",
    "Observer",
    "Run",
    "StepRecord",
    "fit",
    "load_run",
    "read_metrics",
]
