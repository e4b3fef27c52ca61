"""Recomputation in some blocks only: what runs is what was forecast, and the gradient does not change."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sartor.data.pack import Batch
from sartor.job import Job, from_mapping
from sartor.methods import traits
from sartor.model import choose_recomputed, skeleton
from sartor.predict import Ledger, StorageTracker
from sartor.predict.trace import run_traced_step
from sartor.predict.whole import Traces, trace_job
from sartor.step import Precision, TensorBatch, make_step, make_trainable

from .test_repeat import batches, source
from .test_sharded import CPU

LAYERS = 14


def job_of(method: str) -> Job:
    return from_mapping({"model": "unused", "data": "unused", "method": method})


def forecast(method: str, mode: str, recomputed: int | None, *, layers: int, known: Traces | None = None) -> Ledger:
    options: dict[str, Any] = {"precision": Precision.of(mode), "attention": None, "recompute": recomputed != 0}
    model = source("llama", num_hidden_layers=layers)
    return trace_job(job_of(method), model, batches(2), CPU, recomputed=recomputed, known=known, **options)


def real_step(method: str, mode: str, recomputed: int, *, layers: int) -> Any:
    precision = Precision.of(mode)
    torch.manual_seed(0)
    dtype = precision.load_dtype(adapter=traits(job_of(method)).adapter)
    model = AutoModelForCausalLM.from_config(source("llama", num_hidden_layers=layers).config, dtype=dtype)
    choose_recomputed(model, recomputed)
    model = make_trainable(model, job_of(method), precision, recompute=recomputed > 0, seed=0)
    return make_step(model, job_of(method), precision, device_kind="cpu")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("method", "mode", "recomputed"), [("full", "float32", 1), ("full", "bf16", 3), ("lora", "bf16-mixed", 2)]
)
def test_the_forecast_is_what_runs(method: str, mode: str, recomputed: int) -> None:
    given: list[Batch] = batches(2)
    tracker = StorageTracker()
    with tracker:
        step = real_step(method, mode, recomputed, layers=4)
        tracker.mark([*step.model.parameters(), *step.model.buffers()], "weights")
        for number in range(2):
            run_traced_step(tracker, step, given, sum(batch.trained_tokens for batch in given), number=number)
    peak = forecast(method, mode, recomputed, layers=4).peak()
    assert peak.total_bytes == pytest.approx(tracker.ledger.peak().total_bytes, rel=0.005)


def test_every_block_that_recomputes_needs_less() -> None:
    peaks = [forecast("full", "bf16", count, layers=6).peak().total_bytes for count in range(6)]
    peaks.append(forecast("full", "bf16", None, layers=6).peak().total_bytes)
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[5] < 0.8 * peaks[0]


def test_gradients_are_those_without() -> None:
    found = []
    for recomputed in (0, 2):
        step = real_step("full", "float32", recomputed, layers=3)
        step.backward([TensorBatch.of(batch, "cpu") for batch in batches(1)], 10)
        found.append([parameter.grad for parameter in step.parameters.values()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("recomputed", [6, 8])
def test_one_trace_tells_of_every_number_of_blocks(recomputed: int) -> None:
    """Traced with seven, repeated for others; against the trace of the whole model."""
    known: Traces = {}
    forecast("full", "bf16", 7, layers=LAYERS, known=known)
    traced = forecast("full", "bf16", recomputed, layers=LAYERS, known=known)
    assert len(known) == 1, "nothing was traced again"
    other = whole(recomputed)
    assert traced.peak().total_bytes == pytest.approx(other.peak().total_bytes, rel=1e-4)
    sizes = Counter((event.phase, event.size_bytes) for event in traced.events if "clip" not in event.phase)
    assert sizes == Counter((event.phase, event.size_bytes) for event in other.events if "clip" not in event.phase)


def whole(recomputed: int) -> Ledger:
    """Without leaving any block out."""
    from sartor.model.regions import Reduction
    from sartor.predict.trace import trace_steps

    job, precision = job_of("full"), Precision.of("bf16")
    model = skeleton(source("llama", num_hidden_layers=LAYERS), dtype=torch.bfloat16)
    choose_recomputed(model, recomputed)
    model = make_trainable(model, job, precision, recompute=True, meta=True)
    step = lambda fake: make_step(fake, job, precision, device_kind="cpu", kind="cpu")  # noqa: E731
    return trace_steps(model, step, batches(2), target=CPU, reduction=Reduction())
