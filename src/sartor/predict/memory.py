"""The memory forecast of a job: the traced peak, what the process adds to it, and what there is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sartor.data.pack import Batch
from sartor.job.schema import Job
from sartor.job.units import format_bytes
from sartor.machine import Machine
from sartor.machine.memory import resident_bytes
from sartor.methods import traits
from sartor.model import ModelSource, skeleton
from sartor.predict.ledger import Ledger, Peak
from sartor.predict.trace import trace_steps
from sartor.step import Precision, make_step, make_trainable

Verdict = Literal["fits", "tight", "does not fit", "cannot say"]

TIGHT_SHARE = 0.9
"""Above this share of what is available a forecast is called tight: the allocator's slack and others' memory move."""


@dataclass(frozen=True, kw_only=True)
class MemoryForecast:
    """What a run will need on its device, before a byte is allocated.

    `peak` counts tensors exactly as the step allocates them. `process_bytes` is what the system will show for the process:
    on a CPU the peak on top of what the process holds already (interpreter and libraries, measured now).
    """

    verdict: Verdict
    reason: str
    peak: Peak | None
    process_bytes: int | None
    baseline_bytes: int
    available_bytes: int
    trace_seconds: float


def forecast_memory(
    job: Job,
    source: ModelSource,
    machine: Machine,
    batches: Sequence[Batch],
    *,
    precision: Precision,
    recompute: bool,
    attention: str | None,
) -> MemoryForecast:
    """Trace two steps of the job over `batches` and compare the peak with the device's memory."""
    start = time.perf_counter()
    peak, reason = None, ""
    try:
        peak = _trace(job, source, batches, precision=precision, recompute=recompute, attention=attention).peak()
    except Exception as error:  # whatever a foreign model's code raises under tracing: say so, and let the user decide
        reason = f"this model's step cannot be traced ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    seconds = time.perf_counter() - start
    # Measured after tracing: by then the libraries that training needs are loaded.
    baseline = resident_bytes() if machine.device.kind == "cpu" else 0
    available = min(machine.device.available_bytes + baseline, machine.device.total_bytes)
    needed = None if peak is None else baseline + peak.total_bytes
    verdict: Verdict = "cannot say"
    if needed is not None:
        verdict, reason = _judge(needed, available)
    return MemoryForecast(
        verdict=verdict,
        reason=reason,
        peak=peak,
        process_bytes=needed,
        baseline_bytes=baseline,
        available_bytes=available,
        trace_seconds=seconds,
    )


def _trace(
    job: Job, source: ModelSource, batches: Sequence[Batch], *, precision: Precision, recompute: bool, attention: str | None
) -> Ledger:
    model = skeleton(source, dtype=precision.load_dtype(adapter=traits(job).adapter), attention=attention)
    model = make_trainable(model, job, precision, recompute=recompute, meta=True)
    return trace_steps(model, lambda fake: make_step(fake, job, precision, device_kind="cpu"), batches)


def _judge(needed: int, available: int) -> tuple[Verdict, str]:
    text = f"needs {format_bytes(needed)} of {format_bytes(available)}"
    if needed <= TIGHT_SHARE * available:
        return "fits", text
    if needed <= available:
        return "tight", text
    return "does not fit", text
