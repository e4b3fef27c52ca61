"""The run while it goes: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich import progress as bars
from rich.console import Console
from rich.text import Text

from sartor.report.facts import visible
from sartor.train.metrics import Observer
from sartor.train.record import EvalRecord, Run, StepRecord

_PLAIN_LINES = 40
"""Steps that are printed where there is no terminal, evaluations and checkpoints not counted."""

_SMOOTHING = 0.9
_RATE_STEPS = 100
_REFRESHES_PER_SECOND = 4


class Progress(Observer):
    """Shows a run to a person. The loss and the speed are smoothed over some ten steps; metrics.jsonl holds each step's.

    Use it as a context manager, or call `close`: whatever ends the run, the terminal is as it was.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = console.is_terminal and not console.is_dumb_terminal
        self._bar: bars.Progress | None = None
        self._task = bars.TaskID(0)
        self._total = 0
        self._every = 1
        self._first = 0
        self._loss = _Smooth()
        self._speed = _Smooth()
        self._times: deque[tuple[int, float]] = deque(maxlen=_RATE_STEPS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar off the terminal's hands; its last state stays."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def said(self, text: str) -> None:
        self._print(Text(visible(text), style="yellow"))

    def started(self, step: int, total_steps: int) -> None:
        self.close()
        self._loss, self._speed = _Smooth(), _Smooth()
        self._first, self._total = step, total_steps
        self._every = max(-(-(total_steps - step) // _PLAIN_LINES), 1)
        self._times.clear()
        self._times.append((step, time.monotonic()))
        if self._live:
            self._bar = _make_bar(self._console)
            fields: dict[str, Any] = {"loss": "–", "speed": "–", "rate": "–", "left": "–"}
            self._task = self._bar.add_task("training", total=max(total_steps, 1), completed=step, **fields)
            self._bar.start()

    def stepped(self, record: StepRecord) -> None:
        loss, speed = self._loss.add(record.loss), self._speed.add(record.tokens_per_second)
        self._times.append((record.step, time.monotonic()))
        left = self._left(record.step)
        if self._bar is not None:
            fields: dict[str, Any] = {
                "loss": f"{loss:.3f}",
                "speed": f"{speed:,.0f}",
                "rate": f"{record.learning_rate:.1e}",
                "left": left,
            }
            self._bar.update(self._task, completed=record.step, **fields)
        elif record.step in (self._first + 1, self._total) or record.step % self._every == 0:
            line = f"step {record.step}/{self._total}  loss {loss:.3f}  {speed:,.0f} tokens/s  lr {record.learning_rate:.1e}"
            self._print(Text(f"{line}  {left} left" if record.step < self._total else line))

    def evaluated(self, record: EvalRecord) -> None:
        when = f"after step {record.step}" if record.step else "before training"
        self._print(Text.assemble(f"held-out loss {when}: ", (f"{record.eval_loss:.3f}", "bold")))

    def saved(self, checkpoint: Path) -> None:
        self._print(Text(visible(f"saved {checkpoint}"), style="dim"))

    def trained(self, model: Any, tokenizer: Any, sets: Any) -> None:
        self.close()

    def finished(self, run: Run) -> None:
        self.close()

    def _left(self, step: int) -> str:
        """Time left at the pace of the last steps, pauses for evaluations and checkpoints included."""
        (first, start), (last, now) = self._times[0], self._times[-1]
        return _clock((now - start) / max(last - first, 1) * max(self._total - step, 0))

    def _print(self, text: Text) -> None:
        # With the bar on the screen, rich prints above it. A log's lines are not wrapped.
        self._console.print(text, soft_wrap=True, highlight=False)


class _Smooth:
    """An exponential mean without the bias of its start."""

    def __init__(self) -> None:
        self._sum = self._weight = 0.0

    def add(self, value: float) -> float:
        self._sum = _SMOOTHING * self._sum + (1 - _SMOOTHING) * value
        self._weight = _SMOOTHING * self._weight + (1 - _SMOOTHING)
        return self._sum / self._weight


def _make_bar(console: Console) -> bars.Progress:
    """At 80 columns the learning rate gives way, so that the line never breaks."""
    columns: list[bars.ProgressColumn] = [
        bars.BarColumn(bar_width=None, style="grey37", complete_style="green", finished_style="green"),
        bars.TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        bars.TextColumn("loss [bold]{task.fields[loss]}[/]"),
        bars.TextColumn("[cyan]{task.fields[speed]}[/] tokens/s"),
        bars.TextColumn("[dim]{task.fields[left]} left[/]"),
    ]
    if console.width >= 90:
        columns.insert(4, bars.TextColumn("[dim]lr {task.fields[rate]}[/]"))
    return bars.Progress(*columns, console=console, expand=True, refresh_per_second=_REFRESHES_PER_SECOND)


def _clock(seconds: float) -> str:
    """`0:23`, `1:02:05`, `3 d 4 h`."""
    whole = round(seconds)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
