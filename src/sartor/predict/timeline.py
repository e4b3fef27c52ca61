"""Memory over a step as a picture: the live bytes of each kind, few points that lose no peak, and what runs when."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise, takewhile

import numpy as np

from sartor.predict.ledger import KINDS, Event, Ledger, _maker

MOST_POINTS = 200
FORWARD, BACKWARD = "forward", "loss and backward"
_BOTH = "forward and backward"


@dataclass(frozen=True, kw_only=True)
class Section:
    """What runs from `first` to `end`, both from 0 to 1."""

    name: str
    first: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Live bytes over a step, at moments from 0 to 1 (`clock`).

    Between two points memory is drawn as a straight line: it is off by at most `off_by_bytes` in any sum of the first kinds.
    """

    kinds: tuple[str, ...]
    moments: tuple[float, ...]
    live_bytes: tuple[tuple[int, ...], ...]
    """A point's bytes, in the order of `kinds`."""
    sections: tuple[Section, ...]
    peak: int
    """Which point is the fullest."""
    peak_module: str
    """The module that runs there, forward or backward, blocks counted together (`layers.*`); empty where none does."""
    off_by_bytes: int
    reserved: tuple[tuple[float, int], ...] = ()
    """(moment, what the device's allocator has taken from the driver), where there is such an allocator."""

    @property
    def peak_bytes(self) -> int:
        return sum(self.live_bytes[self.peak])

    @property
    def peak_kind(self) -> str:
        """The kind that holds most at the peak."""
        return self.kinds[max(range(len(self.kinds)), key=self.live_bytes[self.peak].__getitem__)]

    @property
    def peak_section(self) -> str:
        """What runs at the peak."""
        at = self.moments[self.peak]
        return next((section.name for section in self.sections if section.first < at <= section.end), "")

    def columns(self, count: int) -> list[tuple[float, ...]]:
        """Bytes by kind at the fullest moment of each of `count` equal stretches of the step."""
        borders = np.linspace(0, 1, count + 1)
        live, moments = np.array(self.live_bytes, dtype=float), np.array(self.moments)
        at_borders = np.stack([np.interp(borders, moments, column) for column in live.T], axis=1)
        fullest = []
        for number, (left, right) in enumerate(pairwise(borders)):
            inside = live[(moments >= left) & (moments <= right)]
            candidates = np.concatenate([inside, at_borders[number : number + 2]])
            fullest.append(tuple(float(size) for size in candidates[candidates.sum(axis=1).argmax()]))
        return fullest


def make_timeline(ledger: Ledger, *, held: Sequence[tuple[int, int]] = (), most_points: int = MOST_POINTS) -> Timeline | None:
    """The picture of the step in which the ledger's peak lies (the last one, if several reach it); None without a step.

    `held`: what the device's allocator holds after some of the ledger's events, as (number of the event from 0, bytes).
    """
    phases = {event.phase for event in ledger.events}
    step_of = {phase: phase.partition(": ")[0] for phase in phases}
    steps = [(name, list(group)) for name, group in groupby(ledger.events, key=lambda event: step_of[event.phase])]
    if not any(": " in events[0].phase for _, events in steps):
        return None
    kinds = (*KINDS, *sorted(set(ledger.kinds.values()) - set(KINDS)))
    rest = kinds.index("activations")
    kind_of = {storage: kinds.index(kind) for storage, kind in ledger.kinds.items()}
    before = np.zeros(len(kinds), dtype=np.int64)
    best: tuple[int, np.ndarray, list[Event], int] | None = None
    start = 0
    for _, events in steps:
        live_PK = _live(before, events, [kind_of.get(event.storage, rest) for event in events])
        before, highest = live_PK[-1], int(live_PK.sum(axis=1).max())
        if ": " in events[0].phase and (best is None or highest >= best[0]):
            best = highest, live_PK, events, start
        start += len(events)
    assert best is not None, "some step has a phase"
    _, live_PK, events, start = best
    top, moment_P = int(live_PK.sum(axis=1).argmax()), clock(events)
    places, off_by = _thin(moment_P, live_PK.cumsum(axis=1).T.copy(), {0, top, len(events)}, most_points)
    return Timeline(
        kinds=kinds,
        moments=tuple(float(moment_P[place]) for place in places),
        live_bytes=tuple(tuple(int(size) for size in live_PK[place]) for place in places),
        sections=tuple(
            Section(name=name, first=float(moment_P[first]), end=float(moment_P[end])) for name, first, end in _sections(events)
        ),
        peak=places.index(top),
        peak_module=_running(ledger.events, events, top),
        off_by_bytes=off_by,
        reserved=tuple(
            (float(moment_P[event + 1 - start]), size) for event, size in held if start <= event < start + len(events)
        ),
    )


def clock(events: Sequence[Event]) -> np.ndarray:
    """The moment, from 0 to 1, before each event and after the last. A trace knows no time: half of the way goes by events, half
    by the bytes that they move, since what moves more takes longer."""
    sizes = np.abs([event.size_bytes for event in events], dtype=float)
    steps = 1 / len(events) + sizes / max(sizes.sum(), 1)
    moments: np.ndarray = np.concatenate([[0.0], steps.cumsum()])
    moments /= moments[-1]
    return moments


def _live(before: np.ndarray, events: Sequence[Event], kinds: Sequence[int]) -> np.ndarray:
    """Bytes by place and kind."""
    changes_PK = np.zeros((len(events) + 1, len(before)), dtype=np.int64)
    changes_PK[0] = before
    changes_PK[np.arange(1, len(events) + 1), kinds] = [event.size_bytes for event in events]
    return changes_PK.cumsum(axis=0)


def _thin(moment_P: np.ndarray, stacks_KP: np.ndarray, kept: set[int], most: int) -> tuple[list[int], int]:
    """At most so many places, `kept` among them, and how far lines between them are off: each further place is the one where
    the lines so far are off most (Ramer 1972, Douglas and Peucker 1973, with the distance measured upwards)."""

    def worst(left: int, right: int) -> tuple[int, int, int, int]:
        if right - left < 2:
            return 0, left, left, right
        share_P = (moment_P[left : right + 1] - moment_P[left]) / (moment_P[right] - moment_P[left])
        first_K1, last_K1 = stacks_KP[:, left, None], stacks_KP[:, right, None]
        off_P = np.abs(stacks_KP[:, left : right + 1] - (first_K1 + share_P * (last_K1 - first_K1))).max(axis=0)
        place = int(off_P.argmax())
        return -int(np.ceil(off_P[place])), left + place, left, right

    gaps = [worst(left, right) for left, right in pairwise(sorted(kept))]
    heapq.heapify(gaps)
    while gaps and gaps[0][0] < 0 and len(kept) < most:
        _, place, left, right = heapq.heappop(gaps)
        kept.add(place)
        heapq.heappush(gaps, worst(left, place))
        heapq.heappush(gaps, worst(place, right))
    return sorted(kept), -gaps[0][0] if gaps else 0


def _sections(events: Sequence[Event]) -> list[tuple[str, int, int]]:
    """The step's phases as name, first and last place (place n comes after n events); forward is told from backward by when the
    last module has run for the first time."""
    sections: list[tuple[str, int, int]] = []
    place = 0
    for phase, group in groupby(events, key=lambda event: event.phase):
        part = list(group)
        name = phase.partition(": ")[2]
        cuts = (passes(part) if name == _BOTH else []) or [(name, 0)]
        sections += [(title, place + first, place + end) for (title, first), (_, end) in pairwise([*cuts, ("", len(part))])]
        place += len(part)
    return sections


def passes(events: Sequence[Event]) -> list[tuple[str, int]]:
    """Where forward and backward of each micro-batch begin; empty where no module was followed."""
    entry = next((event.module for event in events if event.module), "")
    if not entry:
        return []
    modules = ["", *(event.module for event in events)]
    starts = [place for place, (left, right) in enumerate(pairwise(modules)) if right == entry and not left]
    starts[0] = 0
    cuts = []
    for start, end in pairwise([*starts, len(events)]):
        seen: set[str] = set()
        last_new = ""
        for event in events[start:end]:
            if event.module not in seen:
                last_new = event.module
                seen.add(event.module)
        first = next(place for place in range(start, end) if events[place].module == last_new)
        backward = next((place for place in range(first, end) if not events[place].module), end)
        cuts += [(FORWARD, start), (BACKWARD, backward)]
    return cuts


def _running(everything: Sequence[Event], step: Sequence[Event], place: int) -> str:
    """The module at work at a place. In backward no module is noted: there it is the one that made what is released next."""
    if not place:
        return ""
    now = step[place - 1]
    if now.module:
        return _maker(now)
    if not now.phase.endswith(_BOTH):
        return ""
    made = {event.storage: event for event in everything if event.size_bytes > 0 and event.module}
    released = takewhile(lambda event: event.phase == now.phase, step[place:])
    return next((_maker(made[event.storage]) for event in released if event.size_bytes < 0 and event.storage in made), "")
