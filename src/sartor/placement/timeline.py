"""The timeline of a step: what computed, what moved, and how much was in memory and on the lower tiers meanwhile."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sartor.job.units import format_bytes, format_seconds
from sartor.placement.tiers import Tier

TIMELINE = "placement.json"
"""In a run's folder."""
STREAMS = ("compute", "update", "fetch", "write back")
MOST_LEVELS = 600
"""More are thinned out: those between which little changes."""


class Span(NamedTuple):
    """Something was at work."""

    stream: str
    name: str
    """The row, where it is known."""
    start: float
    end: float


class Level(NamedTuple):
    """Bytes, from this moment on: of what moves that is on the device, and of what lives elsewhere."""

    seconds: float
    device: int
    lower: int


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Of one step. Seconds are since its beginning."""

    seconds: float
    tiers: tuple[str, ...]
    """The lower ones."""
    kept_bytes: int
    """Of weights, gradients and optimizer state that stay on the device."""
    spans: tuple[Span, ...]
    levels: tuple[Level, ...]

    def busy(self, stream: str) -> float:
        """Seconds in which a stream was at work; what overlaps counts once."""
        total, until = 0.0, 0.0
        for span in sorted((span for span in self.spans if span.stream == stream), key=lambda span: span.start):
            total += max(span.end - max(span.start, until), 0.0)
            until = max(until, span.end)
        return total

    def describe(self) -> str:
        """In a sentence."""
        shares = ", ".join(f"{stream} {self.busy(stream) / self.seconds:.0%}" for stream in STREAMS)
        most = max((level.device for level in self.levels), default=0)
        return f"of {format_seconds(self.seconds)} a step: {shares}; at most {format_bytes(most)} of what moves were in memory"

    def to_mapping(self) -> dict[str, Any]:
        """As `placement.json` holds it."""
        return asdict(self)

    @classmethod
    def read(cls, folder: Path) -> Timeline | None:
        """Of a run's folder; None where there is none."""
        path = folder / TIMELINE
        if not path.is_file():
            return None
        tree = json.loads(path.read_text(encoding="utf-8"))
        return cls(
            seconds=tree["seconds"],
            tiers=tuple(tree["tiers"]),
            kept_bytes=tree["kept_bytes"],
            spans=tuple(Span(*span) for span in tree["spans"]),
            levels=tuple(Level(*level) for level in tree["levels"]),
        )


class Recorder:
    """Notes what happens between `begin` and `end`, from any thread."""

    def __init__(self, tiers: Mapping[str, Tier]) -> None:
        self._tiers = tiers
        self._start: float | None = None
        self._spans: list[Span] = []
        self._levels: list[Level] = []

    def begin(self) -> None:
        """A step begins; an earlier one is forgotten."""
        self._spans, self._levels, self._start = [], [], time.perf_counter()

    def end(self, kept_bytes: int) -> Timeline | None:
        """The step is over. None where none had begun."""
        start, self._start = self._start, None
        if start is None:
            return None
        step = max(len(self._levels) // MOST_LEVELS, 1)
        peak = max(self._levels, key=lambda level: level.device, default=None)
        return Timeline(
            seconds=time.perf_counter() - start,
            tiers=tuple(self._tiers),
            kept_bytes=kept_bytes,
            spans=tuple(self._spans),
            levels=tuple(level for number, level in enumerate(self._levels) if number % step == 0 or level is peak),
        )

    def span(self, stream: str, name: str, since: float) -> None:
        """Something that began at `since` (`time.perf_counter`) is over."""
        if self._start is not None and since >= self._start:
            self._spans.append(Span(stream, name, since - self._start, time.perf_counter() - self._start))

    def level(self, device_bytes: int) -> None:
        """What is on the device has changed."""
        if self._start is not None:
            lower = sum(tier.used_bytes for tier in self._tiers.values())
            self._levels.append(Level(time.perf_counter() - self._start, device_bytes, lower))
