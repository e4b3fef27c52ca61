"""The ledger of a step on an accelerator of which weights, gradients, optimizer state or activations live elsewhere.

The step is traced as it is with everything on the device, and cut into stretches in which one row of the model (a block, the
embeddings, the head) is at work. What lives elsewhere is taken out of its events, and put in where it comes and goes:

- weights come when the stretch before theirs begins, and go when theirs ends: those of two rows are there at once;
- gradients are made where the trace makes them, and go when the stretch after theirs ends: by then they have been copied. Where
  micro-batches accumulate, they come back as weights do;
- activations go when the stretch after theirs ends, or later, as long as what leaves is no more than `in_flight_bytes`, and come
  back two stretches before their row's backward pass: what a row returns may be kept by the next one;
- optimizer state never comes: the host updates what it belongs to.

Where nothing is fetched ahead, a stretch waits for what it needs and for what it leaves. What results is a ledger like any other,
to be replayed by the allocator.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sartor.predict.ledger import OUTSIDE, Event, Ledger
from sartor.predict.rows import RowTrace, Stretch, find_owned, find_stretches

_NONE: frozenset[int] = frozenset()
_Change = tuple[int, Event]
"""An event, and the place of the one that it comes before."""


@dataclass(frozen=True, kw_only=True)
class Away:
    """Rows, by number, of which something lives elsewhere."""

    weights: frozenset[int] = _NONE
    gradients: frozenset[int] = _NONE
    state: frozenset[int] = _NONE
    activations: frozenset[int] = _NONE
    ahead: bool = True
    """Whether the next row is fetched while one computes."""
    in_flight_bytes: int = 0
    """Of activations that leave, so many may be on their way before the device waits for them."""


class PlacedTrace:
    """A trace whose rows are known, for the ledgers of any placement of them."""

    def __init__(self, ledger: Ledger, rows: Sequence[RowTrace], made: Sequence[tuple[int, int]]) -> None:
        """`ledger`: of the whole model, its events with units (`trace_job(layers=True)`); `made`: of `made_in_order`. Raises
        NotPlaceable."""
        self.ledger, self.rows = ledger, rows
        self.owned = find_owned(ledger, rows, made)
        self.stretches = find_stretches(ledger, rows)
        self._made: dict[int, int] = {}
        self._gone: dict[int, int] = {}
        for place, event in enumerate(ledger.events):
            (self._gone if event.size_bytes < 0 else self._made).setdefault(event.storage, place)
        self._size_E = np.array([event.size_bytes for event in ledger.events], dtype=np.int64)
        self._passes: dict[tuple[int, int], list[int]] = {}
        for place, stretch in enumerate(self.stretches):
            self._passes.setdefault((stretch.step, stretch.micro_batch), []).append(place)

    def placed(self, away: Away) -> Ledger:
        """With these rows away."""
        removed, inserted = self._changes(away)
        traced = list(self.ledger.events)
        for place in removed:
            traced[place] = traced[place]._replace(size_bytes=0)  # who made it is still known
        events: list[Event] = []
        last = 0
        for place, event in inserted:
            events += traced[last:place]
            events.append(event)
            last = place
        return dataclasses.replace(self.ledger, events=events + traced[last:])

    def peak_bytes(self, away: Away) -> int:
        """Of the ledger that `placed` makes."""
        removed, inserted = self._changes(away)
        size_E = self._size_E.copy()
        size_E[list(removed)] = 0
        size_E = np.insert(size_E, [place for place, _ in inserted], [event.size_bytes for _, event in inserted])
        return int(size_E.cumsum().max(initial=0))

    def offloaded_bytes(self, away: Away) -> dict[int, int]:
        """Activations of each row that leave in a micro-batch, at most."""
        most: dict[int, int] = {}
        for (step, micro_batch), _ in self._passes.items():
            sizes: dict[int, int] = {}
            for row, storage, *_ in self._leaving(away, step, micro_batch):
                sizes[row] = sizes.get(row, 0) + self._bytes(storage)
            for row, size in sizes.items():
                most[row] = max(most.get(row, 0), size)
        return most

    def _bytes(self, storage: int) -> int:
        return self.ledger.events[self._made[storage]].size_bytes

    def _changes(self, away: Away) -> tuple[list[int], list[_Change]]:
        """Places of events that are not there, and events that are there beside the traced ones, in order: what goes before
        what comes."""
        removed = [self._made[storage] for row in away.weights for storage in self.owned[row].weights]
        for row in away.state:
            for storage in self.owned[row].state:
                removed += [place[storage] for place in (self._made, self._gone) if storage in place]
        for row in away.gradients:
            for storages in self.owned[row].gradients.values():
                removed += [self._gone[storage] for storage in storages if storage in self._gone]
        spans = [*self._weights(away), *self._gradients(away), *self._activations(away)]
        changes = [change for storage, come, go in spans for change in self._visit(storage, come, go)]
        return removed, sorted(changes, key=lambda change: (change[0], change[1].size_bytes > 0))

    def _visit(self, storage: int, come: int | None, go: int | None) -> Iterator[_Change]:
        """A storage comes when a stretch begins, and goes when one ends; None: the trace says when."""
        size = self._bytes(storage)
        if come is not None:
            at = self.stretches[come].start
            yield at, self._event(storage, size, self.ledger.events[at])
        if go is not None:
            end = self.stretches[go].end
            yield end, self._event(storage, -size, self.ledger.events[end - 1])

    @staticmethod
    def _event(storage: int, size_bytes: int, beside: Event) -> Event:
        return Event(storage=storage, size_bytes=size_bytes, phase=beside.phase, module=beside.module, unit=beside.unit)

    def _weights(self, away: Away) -> Iterator[tuple[int, int, int]]:
        """(storage, stretch in which it comes, stretch in which it goes)"""
        visits: dict[int, list[tuple[int, int]]] = {}
        for place, stretch in enumerate(self.stretches):
            begin = self._before(place, 1) if away.ahead else place
            for row in away.weights.intersection(stretch.rows):
                known = visits.setdefault(row, [])
                if known and known[-1][1] >= begin - 1 and self.stretches[known[-1][1]].step == stretch.step:
                    begin = known.pop()[0]  # it has not gone yet, or goes and comes at once
                known.append((begin, place))
        for row, known in visits.items():
            for come, go in known:
                yield from ((storage, come, go) for storage in self.owned[row].weights)

    def _before(self, place: int, count: int) -> int:
        """So many stretches earlier in the same step."""
        step = self.stretches[place].step
        return next(at for at in range(max(place - count, 0), place + 1) if self.stretches[at].step == step)

    def _gradients(self, away: Away) -> Iterator[tuple[int, int | None, int]]:
        for (step, micro_batch), passes in self._passes.items():
            turn = next((place for place in passes if self.stretches[place].turning), passes[0])
            backward = {row: place for place in passes if self.stretches[place].backward for row in self.stretches[place].rows}
            for row in away.gradients:
                trace = self.rows[row]
                begin = turn if trace.last else backward.get(row, passes[-1])
                end = passes[-1] if trace.first else begin
                come = None if micro_batch == 0 else max(begin - away.ahead, turn)
                go = min(end + away.ahead, passes[-1])
                yield from ((storage, come, go) for storage in self.owned[row].gradients.get(step, ()))

    def _activations(self, away: Away) -> Iterator[tuple[int, int, int]]:
        for step, micro_batch in self._passes:
            for _, storage, leave, back in self._leaving(away, step, micro_batch):
                yield storage, back, leave

    def _leaving(self, away: Away, step: int, micro_batch: int) -> Iterator[tuple[int, int, int, int]]:
        """(row, storage, stretch at whose end it goes, stretch at whose start it is back) of what a forward pass keeps for the
        backward pass."""
        if not away.activations:
            return
        passes = self._passes[step, micro_batch]
        backward = {row: place for place in passes if self.stretches[place].backward for row in self.stretches[place].rows}
        leaving: list[tuple[int, int, int, int]] = []
        for place in passes:
            stretch = self.stretches[place]
            if stretch.backward or len(stretch.rows) != 1 or stretch.rows[0] not in away.activations:
                continue
            back = backward.get(stretch.rows[0], OUTSIDE) - 2
            kept = [storage for storage in self._made_in(stretch) if back >= 0 and self._lives_at(storage, back)]
            leaving += [(stretch.rows[0], storage, place, back) for storage in kept]
        turn = next((place for place in passes if self.stretches[place].turning), passes[-1])
        behind_L = np.cumsum([self._bytes(storage) for _, storage, _, _ in leaving])
        for (row, storage, place, back), behind in zip(leaving, behind_L, strict=True):
            by = int(np.searchsorted(behind_L, behind + away.in_flight_bytes))  # when so much left after it, it has gone
            leave = max(place + 1, leaving[by][2] if by < len(leaving) else turn)
            if leave + 1 < back:
                yield row, storage, leave, back

    def _lives_at(self, storage: int, place: int) -> bool:
        """Whether it is still there when a stretch begins."""
        return self._gone.get(storage, 0) >= self.stretches[place].start

    def _made_in(self, stretch: Stretch) -> Iterable[int]:
        """Activations that came to life in a stretch."""
        for event in self.ledger.events[stretch.start : stretch.end]:
            if event.size_bytes > 0 and event.storage not in self.ledger.kinds:
                yield event.storage
