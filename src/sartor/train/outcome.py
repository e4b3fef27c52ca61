"""What came of a run: its memory beside the forecast, its record, and the message for a loss that is not a number."""

from __future__ import annotations

import math
import platform
import statistics
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import torch

from sartor.data.pack import Batch
from sartor.errors import RunError
from sartor.machine.memory import peak_resident_bytes, reset_peak_resident, resident_shared_bytes
from sartor.plan import Plan
from sartor.step import SharedGradients, TrainStep
from sartor.train.checkpoint import Progress
from sartor.train.record import MemoryOutcome, Run, TimeOutcome, read_metrics
from sartor.train.setup import Workbench

_VERSIONED = ("sartor", "torch", "transformers", "peft", "tokenizers", "safetensors", "pyarrow", "numpy")


def reset_peaks(plan: Plan) -> None:
    """Begin a new high-water mark on the device of the plan."""
    if plan.machine.device.kind == "cpu":
        reset_peak_resident()
    else:
        torch.accelerator.reset_peak_memory_stats(plan.machine.device.index)


def memory_outcome(plan: Plan, step: TrainStep) -> MemoryOutcome:
    """Forecast beside measurement: resident memory of the process on a CPU, allocated memory on an accelerator. Where processes
    share memory, each counts what it writes, not what it reads of the others'."""
    forecast = plan.forecast
    if plan.machine.device.kind == "cpu":
        expected, measured, name = forecast.process_bytes, peak_resident_bytes(), "peak resident memory of the process"
        if isinstance(step.shared, SharedGradients):
            measured -= max(resident_shared_bytes() - step.shared.own_bytes, 0)
    else:
        expected = forecast.allocated_bytes
        measured, name = torch.accelerator.max_memory_allocated(plan.machine.device.index), "peak allocated device memory"
    error = None if expected is None else (expected / measured - 1) * 100
    return MemoryOutcome(forecast_bytes=expected, measured_bytes=measured, measured_name=name, error_percent=error)


WARM_UP_STEPS = 2


def time_outcome(plan: Plan, seconds: list[float]) -> TimeOutcome | None:
    """`seconds`: since the run began, after each step. Evaluations and checkpoints lie between steps and count in none."""
    steps = [after - before for before, after in pairwise(seconds)][WARM_UP_STEPS - 1 :]
    if not steps:
        return None
    measured, forecast = statistics.median(steps), plan.time.step_seconds if plan.time else None
    error = None if forecast is None else (forecast / measured - 1) * 100
    return TimeOutcome(forecast_step_seconds=forecast, measured_step_seconds=measured, error_percent=error)


def record(
    plan: Plan, folder: Path, progress: Progress, checkpoint: Path, memory: MemoryOutcome, *, epochs: float, finished: bool
) -> Run:
    """The run in one object."""
    steps = [line for line in read_metrics(folder) if "loss" in line]
    losses = [line["loss"] for line in steps]
    return Run(
        folder=str(folder),
        status="finished" if finished else "interrupted",
        steps=progress.step,
        total_steps=plan.total_steps,
        epochs=epochs,
        seconds=progress.seconds,
        tokens=progress.tokens,
        trained_tokens=progress.trained_tokens,
        tokens_per_second=progress.tokens / progress.seconds if progress.seconds else 0.0,
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
        first_eval_loss=progress.first_eval_loss,
        last_eval_loss=progress.last_eval_loss,
        memory=memory,
        checkpoint=checkpoint.name,
        time=time_outcome(plan, [line["seconds"] for line in steps]),
        versions={"python": platform.python_version()} | {name: _version(name) for name in _VERSIONED},
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def not_finite(bench: Workbench, batches: list[Batch], losses: list[float], norm: float, step: int) -> RunError:
    """Names the examples whose loss is not finite, or says that the gradient is."""
    own = [batch for batch, loss in zip(batches, losses, strict=True) if not math.isfinite(loss)]
    guilty = [batch for some in bench.world.gather(own) for batch in some]
    examples = [example for batch in guilty or batches for example in batch.examples]
    sources = ", ".join(bench.sets.train.source(example) for example in examples[:8])
    more = f" and {len(examples) - 8} more" if len(examples) > 8 else ""
    what = "loss" if guilty else f"gradient norm ({norm})"
    return RunError(
        f"the {what} of step {step + 1} is not a finite number; the step was not taken",
        why=f"it came from the examples {sources}{more}",
        remedy="look at these examples; lower training.learning_rate or raise training.warmup; then --resume from before it",
    )
