"""The traced peak is the real one: the same storage tracker over real execution counts the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sartor.data.pack import Batch, collate, fill_rows
from sartor.data.tokens import Sample, TokenSet
from sartor.job import Job, from_mapping
from sartor.methods import traits
from sartor.model import build, resolve, skeleton
from sartor.predict import StorageTracker, trace_steps
from sartor.predict.trace import run_traced_step
from sartor.step import Precision, make_step, make_trainable


def batch(packing: bool) -> Batch:
    lengths = [60, 41, 30, 22, 17, 9] if packing else [60, 33, 9]
    samples = TokenSet.from_samples(
        [
            Sample(input_ids=np.arange(length) % 300 + 3, trained=np.arange(length) % 3 > 0, source=f"test:{length}")
            for length in lengths
        ]
    )
    rows = fill_rows(range(len(lengths)), samples.lengths, capacity=64, packing=packing)
    return collate(samples, rows, pad_id=0, packing=packing)


def forecast(job: Job, mode: str, recompute: bool, batches: list[Batch]) -> dict[str, int]:
    precision = Precision.of(mode)
    model = skeleton(resolve(job.model), dtype=precision.load_dtype(adapter=traits(job).adapter))
    model = make_trainable(model, job, precision, recompute=recompute, meta=True)
    peak = trace_steps(model, lambda fake: make_step(fake, job, precision, device_kind="cpu"), batches).peak()
    return {"total": peak.total_bytes, **peak.by_kind}


def measured(job: Job, mode: str, recompute: bool, batches: list[Batch]) -> dict[str, int]:
    precision = Precision.of(mode)
    model = build(resolve(job.model), dtype=precision.load_dtype(adapter=traits(job).adapter), device="cpu")
    model = make_trainable(model, job, precision, recompute=recompute, seed=0)
    tracker = StorageTracker()
    with tracker:
        tracker.mark([*model.parameters(), *model.buffers()], "weights")
        step = make_step(model, job, precision, device_kind="cpu")
        for number in range(2):
            run_traced_step(tracker, step, batches, sum(one.trained_tokens for one in batches), number=number)
    peak = tracker.ledger.peak()
    return {"total": peak.total_bytes, **peak.by_kind}


CASES = [
    (method, mode, recompute, packing)
    for method in ("full", "lora", "prefix", "prompt")
    for mode in ("float32", "bf16-mixed", "bf16")
    for recompute in (False, True)
    for packing in (False, True)
    if not (recompute and method == "prefix") and not (packing and method in ("prefix", "prompt"))
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("method", "mode", "recompute", "packing"), CASES)
def test_the_traced_peak_is_the_measured_one(tiny: Path, method: str, mode: str, recompute: bool, packing: bool) -> None:
    job = from_mapping({"model": str(tiny), "data": "unused", "method": method, "prefix": {"length": 5}, "prompt": {"length": 5}})
    batches = [batch(packing), batch(packing)]
    assert forecast(job, mode, recompute, batches) == measured(job, mode, recompute, batches)


@pytest.mark.shared
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", ["full", "lora"])
def test_another_architecture(shared: Callable[[str], Path], method: str) -> None:
    job = from_mapping({"model": str(shared("models/tiny-gpt2")), "data": "unused", "method": method})
    batches = [batch(packing=False)]
    assert forecast(job, "float32", False, batches) == measured(job, "float32", False, batches)


def test_tracing_takes_no_memory() -> None:
    """A 7B model, full size: its weights alone are 13 GB."""
    from transformers import LlamaConfig

    from sartor.model import ModelSource

    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    source = ModelSource(path="llama-7b", config=config, has_weights=False)
    job = from_mapping({"model": "llama-7b", "data": "unused", "method": "lora"})
    precision = Precision.of("bf16")
    model = make_trainable(skeleton(source, dtype=torch.bfloat16), job, precision, recompute=False, meta=True)
    peak = trace_steps(model, lambda fake: make_step(fake, job, precision, device_kind="cpu"), [batch(packing=True)]).peak()
    assert peak.by_kind["weights"] > 12 * 2**30
    assert peak.by_kind["gradients"] + peak.by_kind["activations"] > 0
