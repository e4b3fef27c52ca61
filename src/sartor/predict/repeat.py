"""From the trace of a shortened model to the ledger of the whole one, by repeating the events of a middle unit.

A storage of a unit is known by its place among all storages that the unit makes; the same place in another unit is the same
tensor. Where an event of the template names a neighbour's storage (the hidden state it got, the gradient it hands on), its copy
names that of the copy's neighbour. That the units beside the template do exactly what it does is checked, event by event.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import TypeVar

from sartor.model.regions import EDGE, Reduction, Region
from sartor.predict.ledger import OUTSIDE, Event, Ledger

T = TypeVar("T")
UNIT = Event._fields.index("unit")


class NotRepeatable(Exception):
    """The units of a region do not do the same, or reach further than to their neighbours."""


@dataclass(frozen=True, slots=True)
class _Run:
    """Consecutive events of one unit (or of none)."""

    tag: int
    events: list[Event]
    storages: frozenset[int]

    @classmethod
    def of(cls, tag: int, events: list[Event]) -> _Run:
        return cls(tag, events, frozenset(event.storage for event in events))


def expand(ledger: Ledger, reduction: Reduction) -> Ledger:
    """The ledger of the whole model; its events' units are numbered through. Raises NotRepeatable."""
    if not reduction.regions:
        return ledger
    names = _Names(ledger, reduction.regions)
    places = reduction.numbers()
    runs = [_Run.of(tag, list(events)) for tag, events in groupby(ledger.events, key=itemgetter(UNIT))]
    for region in reduction.regions:
        if region.edge < EDGE:
            continue
        _check(runs, region, names)
        if not ledger.operations.alike(range(region.template - 1, region.template + 2)):
            raise NotRepeatable("blocks that look alike do not compute alike")
    whole = Ledger(operations=ledger.operations.repeated(reduction))
    for place, run in enumerate(runs):
        home = names.region_of(run.tag)
        if home is None:
            numbers: Sequence[int] = (0,)
        elif run.tag != home.template:
            numbers = (home.number(run.tag),)
        else:
            numbers = _order(runs, place, home)
        for number in numbers:
            first = places.get(run.tag, OUTSIDE) if home is None else places[home.first_tag]
            whole.events += names.rename(run, home, number, unit=first + number)
    whole.kinds = dict(names.renamed(ledger.kinds))
    whole.workspaces = dict(names.renamed(ledger.workspaces))
    return whole


class _Names:
    """Storages of the trace as (unit, place), and their numbers in the whole ledger."""

    def __init__(self, ledger: Ledger, regions: Sequence[Region]) -> None:
        self.regions = regions
        self._region_of = {region.first_tag + place: region for region in regions for place in range(region.kept)}
        self.owner: dict[int, int] = {}
        self.place: dict[int, int] = {}
        made: dict[int, int] = defaultdict(int)
        for event in ledger.events:
            if event.storage not in self.owner:
                self.owner[event.storage] = event.unit
                self.place[event.storage] = made[event.unit]
                made[event.unit] += 1
        self._stride = max(made.values(), default=0)
        self._base: dict[int, int] = {}
        start = 1 + max(self.owner, default=0)
        for region in regions:
            self._base[region.first_tag] = start
            start += region.count * self._stride

    def region_of(self, tag: int) -> Region | None:
        return self._region_of.get(tag)

    def rename(self, run: _Run, region: Region | None, number: int, *, unit: int) -> list[Event]:
        """The run's events as those of unit `number` of its region; `unit`: its place in the whole model."""
        names = {storage: self._number(storage, run.tag, region, number) for storage in run.storages}
        make = tuple.__new__  # half the time of Event's own constructor, for most events of a large model
        return [make(Event, (names[storage], size, phase, module, unit)) for storage, size, phase, module, _ in run.events]

    def renamed(self, known: dict[int, T]) -> Iterator[tuple[int, T]]:
        """What is known of storages, of those of the whole ledger."""
        for storage, what in known.items():
            tag = self.owner[storage]
            region = self._region_of.get(tag)
            if region is None:
                yield storage, what
                continue
            first = region.number(tag)
            copies = region.copies if tag == region.template else 1
            for number in range(first, first + copies):
                yield self._name(region, number, storage), what

    def _number(self, storage: int, tag: int, region: Region | None, number: int) -> int:
        owner = self.owner[storage]
        if owner == tag and region is not None:
            return self._name(region, number, storage)
        home = self._region_of.get(owner)
        if home is None:
            return storage
        if home is region and abs(owner - tag) == 1:
            return self._name(region, number + owner - tag, storage)
        if owner == home.template:
            raise NotRepeatable("something outside of its neighbours uses a repeated unit's memory")
        return self._name(home, home.number(owner), storage)

    def _name(self, region: Region, number: int, storage: int) -> int:
        return self._base[region.first_tag] + number * self._stride + self.place[storage]


def _order(runs: Sequence[_Run], place: int, region: Region) -> range:
    """Units in the order of this pass: up in forward, down in backward."""
    template = region.template
    before = next((run.tag for run in reversed(runs[:place]) if region.holds(run.tag)), template - 1)
    first, last = region.edge, region.edge + region.copies - 1
    return range(last, first - 1, -1) if before > template else range(first, last + 1)


def _check(runs: Sequence[_Run], region: Region, names: _Names) -> None:
    """The template's neighbours do what it does; references to a third unit are compared where that one is alike as well."""
    below, template, above = (_story(runs, region.template + step, names) for step in (-1, 0, 1))
    if not _same(template, above, blurred=1) or not _same(template, below, blurred=-1):
        raise NotRepeatable("blocks that look alike do not allocate alike")


_Entry = tuple[str, int, int | None, int]


def _story(runs: Sequence[_Run], tag: int, names: _Names) -> list[_Entry]:
    """A unit's events without its name: phase, size, how far the owner is (None: outside of all units), and which storage."""
    told: list[_Entry] = []
    for run in runs:
        if run.tag != tag:
            continue
        for event in run.events:
            owner = names.owner[event.storage]
            if names.region_of(owner) is None:
                told.append((event.phase, event.size_bytes, None, 0))
            else:
                told.append((event.phase, event.size_bytes, owner - tag, names.place[event.storage]))
    # What is freed at one go (autocast's copies, say) comes in the order of some table; here it is sorted.
    ordered: list[_Entry] = []
    for frees, entries in groupby(told, key=lambda entry: entry[1] < 0):
        told_now = list(entries)
        ordered += (
            sorted(told_now, key=lambda entry: (entry[1], entry[2] is None, entry[2] or 0, entry[3])) if frees else told_now
        )
    return ordered


def _same(one: Sequence[_Entry], other: Sequence[_Entry], *, blurred: int) -> bool:
    """Equal, but for the place of storages whose owner lies on the `blurred` side: a unit at the region's end may differ."""
    if len(one) != len(other):
        return False
    return all(a[:3] == b[:3] and (a[3] == b[3] or a[2] == blurred) for a, b in zip(one, other, strict=True))
