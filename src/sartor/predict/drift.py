"""How reserved memory grows while lengths vary: the run's first steps, in their order, through the device's allocator.

PyTorch's allocator keeps what it has; a micro-batch that is a little longer than those before finds no block that is large
enough and takes new segments, while the old ones lie idle. So what is reserved depends on the order of lengths, and may end far
above what the longest micro-batch needs. With expandable segments blocks grow in place instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from sartor.predict.allocator import Allocator, AllocatorConfig, OutOfMemory
from sartor.predict.ledger import Event
from sartor.predict.shapes import Family, NotComparable, Shape
from sartor.predict.timeline import FORWARD, passes

MOST_EVENTS = 400_000
"""Allocations and releases that are replayed: about a second's work."""

Step = Sequence[Shape]
"""The micro-batches of an optimizer step, in order."""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """What the allocator holds after each of the steps that were replayed."""

    reserved_bytes: tuple[int, ...]
    peak_bytes: int
    """The most that was reserved."""
    retries: int
    """How often the cache had to be emptied to go on; each stops the device."""
    out_of_memory: bool
    """Whether even that was not enough in the step after the last."""


def replay_steps(family: Family, steps: Iterable[Step], config: AllocatorConfig, *, accumulated: int = 1) -> Drift:
    """Optimizer steps of a run, one after another, through one allocator.

    `accumulated`: how many micro-batches a step of the family's traces has. Raises NotComparable where they are not found.
    """
    replay = _Replay(family, Allocator(config), accumulated)
    reserved: list[int] = []
    out_of_memory = False
    for shapes in steps:
        try:
            replay.step(shapes)
        except OutOfMemory:
            out_of_memory = True
            break
        reserved.append(replay.allocator.reserved)
    allocator = replay.allocator
    return Drift(
        reserved_bytes=tuple(reserved),
        peak_bytes=allocator.peak_reserved,
        retries=allocator.retries,
        out_of_memory=out_of_memory,
    )


def telling_steps(sizes: Sequence[int], most: int) -> list[int]:
    """Which steps of a run to replay: the first ones, and of the others those that are larger than every step before them, as
    far as there is room; new memory is taken by these. `sizes`: the largest micro-batch of each step."""
    largest, records = 0, []
    for step, size in enumerate(sizes):
        if size > largest:
            largest = size
            records.append(step)
    late = [step for step in records if step >= most // 2][-(most // 2) :] if most > 1 else []
    chosen = set(range(min(most - len(late), len(sizes)))) | set(late)
    return sorted(chosen)


@dataclass(frozen=True, kw_only=True)
class _StepPlaces:
    """Where in the family's events a step's first micro-batch, a later one (the same where there is none), and its update are."""

    first: range
    later: range
    update: range


class _Replay:
    """The family's events, again and again, at other shapes; storages of a step die with it, but for the optimizer's."""

    def __init__(self, family: Family, allocator: Allocator, accumulated: int) -> None:
        self.allocator = allocator
        self._family = family
        self._steps = _cut(family.events, accumulated)
        self._sizes: dict[Shape, list[int]] = {}
        self._done = self._key = 0
        self._lasting: dict[int, int] = {}
        build = next(place for place, event in enumerate(family.events) if event.phase != "build")
        self._left: list[int] = []
        self._run(range(build), Shape(1, 1, 1), self._lasting)

    def step(self, shapes: Step) -> None:
        """One optimizer step. Raises OutOfMemory."""
        places = self._steps[min(self._done, len(self._steps) - 1)]
        made: dict[int, int] = {}
        for number, shape in enumerate(shapes):
            self._run(places.later if number else places.first, shape, made)
        self._run(places.update, shapes[-1], made)
        for storage, key in made.items():
            if self._family.kinds.get(storage) == "optimizer":
                self._lasting[storage] = key
            else:
                self._left.append(key)
        for key in self._left:
            self.allocator.free(key)
        self._left.clear()
        self._done += 1

    def _run(self, places: range, shape: Shape, made: dict[int, int]) -> None:
        sizes = self._sizes.get(shape)
        if sizes is None:
            sizes = self._sizes[shape] = self._family.sizes(shape)
        events, malloc, free = self._family.events, self.allocator.malloc, self.allocator.free
        for place in places:
            event = events[place]
            if event.size_bytes < 0:
                key = made.pop(event.storage, None) or self._lasting.pop(event.storage, None)
                if key is not None:
                    free(key)
            elif event.size_bytes:
                if event.storage in made:  # the micro-batch before left it to the end of the step
                    self._left.append(made[event.storage])
                self._key += 1
                malloc(self._key, sizes[place])
                made[event.storage] = self._key


def _cut(events: Sequence[Event], accumulated: int) -> list[_StepPlaces]:
    """The steps of a trace, cut into parts. Raises NotComparable where the micro-batches cannot be told apart."""
    steps = []
    place = 0
    for name, group in groupby(events, key=lambda event: event.phase.partition(": ")[0]):
        part = list(group)
        if name.startswith("step "):
            phase = part[0].phase
            passed = next((number for number, event in enumerate(part) if event.phase != phase), len(part))
            starts = [start for title, start in passes(part[:passed]) if title == FORWARD]
            if len(starts) != accumulated:
                raise NotComparable("micro-batches cannot be told apart in the trace")
            borders = [*starts, passed]
            ranges = [range(place + first, place + end) for first, end in pairwise(borders)]
            update = range(place + passed, place + len(part))
            steps.append(_StepPlaces(first=ranges[0], later=ranges[-1], update=update))
        place += len(part)
    if not steps:
        raise NotComparable("the trace has no step")
    return steps
