"""The ledger: every allocation and release of a traced training step, and what they add up to."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

KINDS = ("weights", "gradients", "optimizer", "activations")


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """A storage comes to life (`size_bytes` > 0) or dies (< 0)."""

    storage: int
    size_bytes: int
    phase: str


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The fullest moment: how much, when, and of what."""

    total_bytes: int
    phase: str
    by_kind: dict[str, int]


@dataclass(kw_only=True)
class Ledger:
    """Events in order. Storages are activations (and other temporaries) until something says what they are."""

    events: list[Event] = field(default_factory=list)
    kinds: dict[int, str] = field(default_factory=dict)

    def peak(self) -> Peak:
        """The highest sum of live bytes, with its parts."""
        live = best = 0
        at = 0
        for place, event in enumerate(self.events):
            live += event.size_bytes
            if live > best:
                best, at = live, place
        by_kind: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
        for event in self.events[: at + 1]:
            by_kind[self.kinds.get(event.storage, "activations")] += event.size_bytes
        phase = self.events[at].phase if self.events else ""
        return Peak(total_bytes=best, phase=phase, by_kind=dict(by_kind))
