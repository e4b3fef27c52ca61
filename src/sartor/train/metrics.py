"""Where the numbers of a run go: metrics.jsonl, TensorBoard, and whoever watches."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sartor.train.folder import explained, write_text
from sartor.train.record import EvalRecord, Run, StepRecord, read_metrics


class Observer:
    """Watches a run. Every method may be left as it is; none may change the model."""

    def said(self, text: str) -> None:
        """Something the user should know."""

    def loaded(self, model: Any, tokenizer: Any, sets: Any, step: int) -> None:
        """Model and data are there; `step` steps were done before this process."""

    def started(self, step: int, total_steps: int) -> None:
        """The loop begins at `step`."""

    def stepped(self, record: StepRecord) -> None:
        """A step is done."""

    def evaluated(self, record: EvalRecord) -> None:
        """The held-out loss is known."""

    def saved(self, checkpoint: Path) -> None:
        """A checkpoint is on the disk."""

    def trained(self, model: Any, tokenizer: Any, sets: Any) -> None:
        """The loop is over; the model is the final one."""

    def finished(self, run: Run) -> None:
        """Everything is written."""


class MetricsWriter(Observer):
    """metrics.jsonl and TensorBoard events. A resumed run first drops what it had written after its checkpoint."""

    def __init__(self, folder: Path, *, step: int, tensorboard: bool) -> None:
        self._path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(folder) if line["step"] <= step]
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self._path.open("a", encoding="utf-8")
        self._events: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def stepped(self, record: StepRecord) -> None:
        self._write(asdict(record))

    def evaluated(self, record: EvalRecord) -> None:
        self._write(asdict(record))

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()

    def _write(self, values: dict[str, Any]) -> None:
        with explained(self._path):
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                if name != "step":
                    self._events.add_scalar(name, value, values["step"])


class Observers(Observer):
    """Several observers as one."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers
        for name in (name for name in vars(Observer) if not name.startswith("_")):
            setattr(self, name, self._to_all(name))

    def _to_all(self, name: str) -> Any:
        def call(*args: Any) -> None:
            for observer in self._observers:
                getattr(observer, name)(*args)

        return call
