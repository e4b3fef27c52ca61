"""Three architectures, three methods, recomputation, precision: the forecast's peak is what real steps on the CPU count."""

from __future__ import annotations

from typing import Any

import pytest

from sartor.data.pack import Batch
from sartor.job import Job, from_mapping
from sartor.methods import traits
from sartor.model import ModelSource, build
from sartor.predict import Peak, StorageTracker
from sartor.predict.trace import run_traced_step
from sartor.predict.whole import trace_job
from sartor.step import Precision, make_step, make_trainable

from .test_repeat import batches, short
from .test_sharded import CPU

KINDS = "llama", "gpt2", "gemma3_text", "qwen3_moe"
METHODS, MODES = ("full", "lora", "prefix"), ("float32", "bf16", "bf16-master")
CASES = [  # everything for the first architecture; of the others each method in two precisions, so that every pair is there
    (kind, method, mode, recompute)
    for at, kind in enumerate(KINDS)
    for method in METHODS
    for mode in MODES
    for recompute in (False, True)
    if not (recompute and (method == "prefix" or mode == "bf16-master"))
    if not at or (at + METHODS.index(method) + MODES.index(mode)) % 3
]


def counted(
    job: Job,
    model_source: ModelSource,
    given: list[Batch],
    *,
    precision: Precision,
    recompute: bool,
    attention: str | None = None,
    packed: bool = False,
) -> Peak:
    """The peak of two real steps, on random weights."""
    dtype = precision.load_dtype(adapter=traits(job).adapter)
    model = build(model_source, dtype=dtype, device="cpu", attention=attention)
    model = make_trainable(model, job, precision, recompute=recompute, seed=0)
    tracker = StorageTracker(packed=packed)
    with tracker:
        tracker.mark([*model.parameters(), *model.buffers()], "weights")
        step = make_step(model, job, precision, device_kind="cpu")
        for number in range(2):
            run_traced_step(tracker, step, given, 34, number=number)
    return tracker.ledger.peak()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("kind", "method", "mode", "recompute"), CASES)
def test_the_forecast_is_what_a_run_counts(kind: str, method: str, mode: str, recompute: bool) -> None:
    job = from_mapping({"model": "unused", "data": "unused", "method": method, "prefix": {"length": 5}})
    precision, model_source = Precision.of(mode), short(kind)
    given = batches(2 if kind == "llama" else 1)
    forecast = trace_job(job, model_source, given, CPU, precision=precision, recompute=recompute, attention=None).peak()

    measured = counted(job, model_source, given, precision=precision, recompute=recompute)
    assert forecast.total_bytes == pytest.approx(measured.total_bytes, rel=0.005)
    assert forecast.by_kind["weights"] == measured.by_kind["weights"]


@pytest.mark.parametrize(
    ("kind", "packing", "recompute"), [("llama", True, False), ("gemma3_text", True, True), ("llama", False, True)]
)
def test_attention_by_segments_is_forecast_as_it_runs(kind: str, packing: bool, recompute: bool) -> None:
    job = from_mapping({"model": "unused", "data": "unused", "method": "full"})
    precision, model_source = Precision.of("bf16"), short(kind)
    given = batches(2, packing=packing)
    options: dict[str, Any] = {"recompute": recompute, "attention": "segments"}
    forecast = trace_job(job, model_source, given, CPU, precision=precision, **options).peak()
    measured = counted(job, model_source, given, precision=precision, packed=packing, **options)
    assert forecast.total_bytes == pytest.approx(measured.total_bytes, rel=0.005)
