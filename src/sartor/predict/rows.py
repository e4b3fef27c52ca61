"""The rows of a model in a trace of its step: whose a storage is, and when which row is at work."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from torch import nn

from sartor.model.blocks import dissect
from sartor.model.rows import Row
from sartor.predict.ledger import OUTSIDE, Event, Ledger
from sartor.predict.trace import PASSES

_WIDTHS = (4, 2)
"""Bytes of an element of gradients and of what optimizers keep."""
_MOST_STATE = 3
"""Tensors that an optimizer keeps of a parameter, at most: two moments, and a master's residual."""


class NotPlaceable(Exception):
    """The rows of a model cannot be told apart in its trace."""


@dataclass(frozen=True, kw_only=True)
class RowTrace:
    """What a trace has to do with a row."""

    name: str
    unit: int
    """Place of the unit that the block is in; OUTSIDE for embeddings and head."""
    trained: tuple[int, ...]
    """Elements of each tensor that trains."""
    first: bool = False
    """Whether it is at work before the first block."""
    last: bool = False
    """Whether it is at work after the last block. Embeddings that share their weight with the head are both."""


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Events from `start` to before `end`, in which these rows are at work."""

    start: int
    end: int
    rows: tuple[int, ...]
    backward: bool
    turning: bool
    """Whether it lies between the forward passes of blocks and their backward passes."""
    step: int
    micro_batch: int
    """Number within the step."""


@dataclass(frozen=True, kw_only=True)
class Owned:
    """Storages of a row."""

    weights: list[int] = field(default_factory=list)
    gradients: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    """By step."""
    state: list[int] = field(default_factory=list)


def rows_of(model: nn.Module, rows: Sequence[Row], units: Sequence[int]) -> list[RowTrace]:
    """`units`: how many blocks each unit of the trace has (`Reduction.blocks`)."""
    paths = {id(module): path for path, module in model.named_modules()}
    blocks = [path for stack in dissect(model).stacks for path in stack.block_paths()]
    unit_of = dict(zip(blocks, (unit for unit, count in enumerate(units) for _ in range(count)), strict=True))
    begun, made = False, []
    for row in rows:
        inside = [unit_of[path] for module in row.modules if (path := paths[id(module)]) in unit_of]
        begun = begun or bool(inside)
        made.append(
            RowTrace(
                name=row.name,
                unit=min(inside, default=OUTSIDE),
                trained=tuple(parameter.numel() for parameter in row.trained.values()),
                first=not begun,
                last=not inside and (begun or len(row.modules) > 1),
            )
        )
    return made


def made_in_order(model: nn.Module, rows: Sequence[Row]) -> list[tuple[int, int]]:
    """(bytes, number of the row or OUTSIDE) of every parameter and buffer, in the order in which a trace makes them."""
    row_of = {id(parameter): number for number, row in enumerate(rows) for parameter in row.parameters.values()}
    made: dict[int, tuple[int, int]] = {}
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                made.setdefault(id(tensor), (tensor.numel() * tensor.element_size(), row_of.get(id(tensor), OUTSIDE)))
    return list(made.values())


def find_owned(ledger: Ledger, rows: Sequence[RowTrace], made: Sequence[tuple[int, int]]) -> list[Owned]:
    """The storages of each row. Raises NotPlaceable."""
    owned = [Owned() for _ in rows]
    claims: dict[tuple[str, str], _Claims] = defaultdict(lambda: _Claims(rows))
    built: list[Event] = []
    for event in ledger.events:
        kind = ledger.kinds.get(event.storage)
        if event.size_bytes < 0:
            continue
        if kind == "weights" and event.phase == "build":
            built.append(event)
        elif kind == "gradients" and (row := claims[kind, event.phase].take(event, each=1, evenly=False)) is not None:
            owned[row].gradients[step_of(event)].append(event.storage)
        elif kind == "optimizer" and (row := claims[kind, ""].take(event, each=_MOST_STATE, evenly=True)) is not None:
            owned[row].state.append(event.storage)
    if [event.size_bytes for event in built] != [size for size, _ in made]:
        raise NotPlaceable("the weights of its trace are not those of the model")
    for event, (_, row) in zip(built, made, strict=True):
        if row != OUTSIDE:
            owned[row].weights.append(event.storage)
    return owned


class _Claims:
    """Storages given to the rows that have a tensor of that size."""

    def __init__(self, rows: Sequence[RowTrace]) -> None:
        self._given: Counter[tuple[int, int]] = Counter()
        self._members: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
        for number, row in enumerate(rows):
            for elements, count in Counter(row.trained).items():
                self._members[row.unit, elements].append((number, count))

    def take(self, event: Event, *, each: int, evenly: bool) -> int | None:
        """The row that gets the event's storage, of those in its unit, else outside of units. A tensor has `each` at most.
        The last row first, as a backward pass goes, or `evenly` all of them."""
        for unit in dict.fromkeys((event.unit, OUTSIDE)):
            for width in _WIDTHS:
                elements, rest = divmod(event.size_bytes, width)
                open_ = [
                    (self._given[number, elements] / count if evenly else 0.0, -number)
                    for number, count in self._members.get((unit, elements), ())
                    if not rest and self._given[number, elements] < each * count
                ]
                if open_:
                    number = -min(open_)[1]
                    self._given[number, elements] += 1
                    return number
        return None


def step_of(event: Event) -> int:
    """Number of the step that an event is in."""
    return int(event.phase[5:].partition(":")[0])


def find_stretches(ledger: Ledger, rows: Sequence[RowTrace]) -> list[Stretch]:
    """Of all forward and backward passes, in order: every event of them is in one."""
    events = ledger.events
    starts = [place for place, event in enumerate(events) if not place or event.phase != events[place - 1].phase]
    found: list[Stretch] = []
    for first, end in pairwise([*starts, len(events)]):
        if events[first].phase.endswith(PASSES):
            found += _Cutter(rows, step_of(events[first])).cut(events, first, end)
    return found


class _Cutter:
    """Cuts the passes of a step."""

    def __init__(self, rows: Sequence[RowTrace], step: int) -> None:
        self._rows, self._step = rows, step
        self._blocks: dict[int, list[int]] = defaultdict(list)
        for number, row in enumerate(rows):
            self._blocks[row.unit].append(number)

    def cut(self, events: Sequence[Event], first: int, end: int) -> Iterator[Stretch]:
        """What is made says whose turn it is; what is freed does not."""
        cuts, units = [first], [OUTSIDE]
        for place in range(first, end):
            event = events[place]
            if event.size_bytes > 0 and event.unit != units[-1]:
                cuts.append(place)
                units.append(event.unit)
        opening = units[1] if len(units) > 1 else OUTSIDE
        seen: Counter[int] = Counter()
        micro_batch = 0
        for number, (unit, (start, stop)) in enumerate(zip(units, pairwise([*cuts, end]), strict=True)):
            if unit == OUTSIDE:
                if seen[opening] > 1:  # the first unit's backward pass is over
                    micro_batch, seen = micro_batch + 1, Counter()
                follower = units[number + 1] if number + 1 < len(units) else OUTSIDE
                turning, backward = seen[follower] > 0, False
            else:
                turning, backward = False, seen[unit] > 0
                seen[unit] += 1
            parts = self._parts(unit, not seen.total(), turning, backward)
            borders = [start + (stop - start) * part // len(parts) for part in range(len(parts) + 1)]
            for part, (left, right) in zip(parts, pairwise(borders), strict=True):
                yield Stretch(
                    start=left,
                    end=right,
                    rows=part,
                    backward=backward,
                    turning=turning,
                    step=self._step,
                    micro_batch=micro_batch,
                )

    def _parts(self, unit: int, opening: bool, turning: bool, backward: bool) -> list[tuple[int, ...]]:
        """Who is at work; a unit of several blocks is as many parts, of as many events each."""
        members = self._blocks[unit]
        if unit != OUTSIDE:
            return [(row,) for row in (reversed(members) if backward else members)]
        return [tuple(row for row in members if (self._rows[row].first and opening) or (self._rows[row].last and turning))]
