"""What every peer's script shares: the task it is given, the examples, and the lines it writes after each step.

These scripts run in the peer's own Python, where Sartor need not be installed; they import nothing of it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

IGNORE = -100


@dataclass(frozen=True, kw_only=True)
class Task:
    """One run, as the benchmark's parent wrote it. Every peer trains with a constant rate, no warm-up and no weight decay."""

    model: str
    examples: str
    metrics: str
    scratch: str
    method: str
    batch: int
    steps: int
    epochs: int
    learning_rate: float
    max_length: int
    rank: int
    alpha: int
    in_order: bool = False
    """The examples in the order of Sartor's steps, so that the losses of every step can be compared."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of the entrant, e.g. {"bf16": true}."""


def read_task() -> Task:
    """The task whose file is this script's argument."""
    return Task(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))


def read_examples(task: Task) -> list[dict[str, list[int]]]:
    """Token ids and labels (IGNORE where the loss mask is not set), in the order of Sartor's steps."""
    lines = Path(task.examples).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


class Metrics:
    """A line of JSON per optimizer step: `step`, `loss` (mean over the trained tokens), `tokens` (padding not counted)."""

    def __init__(self, path: str) -> None:
        self._file = Path(path).open("a", encoding="utf-8")  # noqa: SIM115

    def write(self, step: int, loss: float, tokens: int) -> None:
        self._file.write(json.dumps({"step": step, "loss": loss, "tokens": tokens}) + "\n")
        self._file.flush()
