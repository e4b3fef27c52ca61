"""What a run leaves behind: a record for every step, and one for the whole."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sartor.train.folder import write_text

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One line of metrics.jsonl. `loss` is the mean over the step's trained tokens, nats per token."""

    step: int
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    trained_tokens: int
    tokens_per_second: float
    seconds: float
    """Since the run began, pauses between resumptions not counted."""


@dataclass(frozen=True, kw_only=True)
class EvalRecord:
    """Held-out loss after `step` steps, nats per token."""

    step: int
    eval_loss: float
    eval_tokens: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A held-out prompt, what should follow, and what the model said before and after."""

    prompt: str
    reference: str
    before: str
    after: str


@dataclass(frozen=True, kw_only=True)
class MemoryOutcome:
    """The forecast beside the measurement. What is compared is the same thing: see `measured_name`."""

    forecast_bytes: int | None
    measured_bytes: int
    measured_name: str
    error_percent: float | None
    """(forecast / measured - 1) × 100."""


@dataclass(frozen=True, kw_only=True)
class TimeOutcome:
    """Seconds of a step: the forecast beside the median of the steps after the first few, which warm up."""

    forecast_step_seconds: float | None
    measured_step_seconds: float
    error_percent: float | None
    """(forecast / measured - 1) × 100."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """The outcome of `sartor train`; `run.json` holds it."""

    folder: str
    status: str
    """finished, or interrupted."""
    steps: int
    total_steps: int
    epochs: float
    seconds: float
    tokens: int
    trained_tokens: int
    tokens_per_second: float
    first_loss: float | None
    last_loss: float | None
    first_eval_loss: float | None
    last_eval_loss: float | None
    memory: MemoryOutcome
    checkpoint: str
    time: TimeOutcome | None = None
    """None for a run of too few steps to tell."""
    answers: tuple[Answer, ...] = ()
    exact_match_before: float | None = None
    exact_match_after: float | None = None
    versions: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def to_mapping(self) -> dict[str, Any]:
        return asdict(self)

    def save(self) -> None:
        write_text(Path(self.folder) / "run.json", json.dumps(self.to_mapping(), indent=1, ensure_ascii=False) + "\n")


def load_run(folder: Path) -> Run:
    """The record of a finished or interrupted run."""
    tree = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    answers = tuple(Answer(**answer) for answer in tree.pop("answers"))
    time = tree.pop("time", None)
    return Run(
        memory=MemoryOutcome(**tree.pop("memory")), time=None if time is None else TimeOutcome(**time), answers=answers, **tree
    )


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a line that a crash cut short ends the list."""
    lines: list[dict[str, Any]] = []
    path = folder / "metrics.jsonl"
    if not path.exists():
        return lines
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines
