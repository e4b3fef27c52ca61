"""What tests of several devices share that train with plain PyTorch: how they begin, what is measured, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sartor.errors import JobError
from sartor.job import from_mapping
from sartor.model import ModelSource
from sartor.parallel import Layout
from sartor.predict import StorageTracker
from sartor.predict.target import Target
from sartor.predict.whole import trace_job
from sartor.step import Precision

from .test_repeat import batches


def fill(model: nn.Module, tracker: StorageTracker) -> None:
    """Random weights, each seen by the tracker."""
    for tensor in (*model.parameters(), *model.buffers()):
        tracker.see(tensor)
        if tensor.is_floating_point():
            nn.init.normal_(getattr(tensor, "_local_tensor", tensor), std=0.02)


def adamw(model: nn.Module) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    """The trained parameters, and their optimizer with the groups that a run has: matrices, and the rest."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [[p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]]
    return trained, torch.optim.AdamW([{"params": group} for group in groups if group], lr=1e-4, fused=True)


def least_peak(tracker: StorageTracker, steps: int) -> int:
    """Of all steps but the first: what is alive by chance when a step begins is not in the smallest."""
    live, peaks = 0, dict[str, int]()
    for event in tracker.ledger.events:
        live += event.size_bytes
        peaks[event.phase] = max(live, peaks.get(event.phase, 0))
    return min(peaks[f"step {number}"] for number in range(1, steps))


def refusal(model: ModelSource, layout: Layout, target: Target, *, attention: str | None = None, **job: Any) -> JobError:
    """What the forecast of a full fine-tune (or of another `job`) says that cannot be laid out like this."""
    with pytest.raises(JobError) as caught:
        trace_job(
            from_mapping({"model": "unused", "data": "unused", "method": "full", **job}),
            model,
            batches(1),
            target,
            precision=Precision.of("float32"),
            recompute=False,
            attention=attention,
            layout=layout,
        )
    return caught.value
