"""What two short traces say of a step at other numbers of rows, against the trace at that number."""

from __future__ import annotations

from typing import Any

import pytest

from sartor.job import from_mapping
from sartor.predict.ledger import Ledger
from sartor.predict.shapes import Shape, blank_batch
from sartor.predict.sketch import ROWS, Sketch
from sartor.predict.whole import trace_job
from sartor.step import Precision

from .test_repeat import source
from .test_sharded import CPU


@pytest.mark.parametrize(("method", "mode"), [("full", "float32"), ("full", "bf16-master"), ("lora", "bf16")])
def test_a_sketch_is_what_a_trace_at_other_rows_shows(method: str, mode: str) -> None:
    """With 300 trained positions a row the loss goes through one chunk, several, and more than the sketch has seen."""
    job = from_mapping({"model": "unused", "data": "unused", "method": method})
    model = source("llama", vocab_size=16_000, num_hidden_layers=6, max_position_embeddings=512)
    common: dict[str, Any] = {"precision": Precision.of(mode), "recompute": False, "attention": None, "sketch": True}

    def traced(rows: int) -> Ledger:
        return trace_job(job, model, [blank_batch(Shape(rows, 320, 300), packing=False)], CPU, **common)

    sketch = Sketch([traced(rows) for rows in ROWS])
    for rows in (1, 32):
        ledger = traced(rows)
        assert sketch.peak_bytes(rows, accumulated=False) == pytest.approx(ledger.peak().total_bytes, rel=0.01)
        flops = ledger.operations.step().total("flops")
        assert sketch.operations(rows).total("flops") == pytest.approx(flops, rel=0.01)
