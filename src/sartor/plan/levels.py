"""Tables of a run on an accelerator, from everything on the device to everything elsewhere: what leaves first, and for where.

What the engine takes on each tier stands in `sartor.placement.streams`; this is its arithmetic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sartor.plan.table import DEVICE_BUFFER_BYTES, KINDS, Place, RowPlaces, Sizes, Table, uniform
from sartor.predict.offload import Away


@dataclass(frozen=True, kw_only=True)
class Level:
    """A table, and what it keeps on the device."""

    table: Table
    kept_bytes: int
    """Of weights, gradients and state, in forward and backward passes and in the update."""
    moving_bytes: int
    """Of what lives elsewhere, at most so much is on the device."""


def levels(sizes: Sequence[Sizes], *, place: Place = "host", blocks: Sequence[str] = ()) -> list[Level]:
    """Less and less on the device: first optimizer state and gradients, which move least, row by row from the last one; then
    weights; then activations of `blocks`, from the first one, which keeps its own the longest. The host updates what it has the
    state of, so gradients go where the state goes."""
    return [
        Level(table=table, kept_bytes=table.kept_bytes(sizes), moving_bytes=table.pass_bytes(sizes))
        for table in _tables(sizes, place, blocks)
    ]


def _tables(sizes: Sequence[Sizes], place: Place, blocks: Sequence[str]) -> Iterator[Table]:
    places = {size.name: RowPlaces(name=size.name) for size in sizes}
    yield _table(places)
    for kinds in (("state", "gradients"), ("weights",)):
        for size in reversed(sizes):
            if any(getattr(size, kind) for kind in kinds):
                places[size.name] = dataclasses.replace(places[size.name], **dict.fromkeys(kinds, place))
                yield _table(places)
    for name in blocks:
        places[name] = dataclasses.replace(places[name], activations=place)
        yield _table(places)


def _table(places: dict[str, RowPlaces]) -> Table:
    return Table(rows=tuple(places.values()))


def everything(sizes: Sequence[Sizes], place: Place) -> list[Level]:
    """All weights, gradients and state on a lower tier."""
    table = uniform(sizes, place)
    return [Level(table=table, kept_bytes=0, moving_bytes=table.pass_bytes(sizes))]


def host_bytes(table: Table, sizes: Sequence[Sizes]) -> int:
    """Of weights, gradients and state in main memory. Weights that stay on the device have a copy there where the host updates
    them; what is on disk comes for its row's update, while that of the last one is written."""
    total, visits = table.tier_bytes(sizes, "host"), [0, 0]
    for size in sizes:
        places = table.row(size.name)
        if places.weights == "device" and places.state != "device":
            total += size.trained_bytes
        visits.append(sum(getattr(size, kind) for kind in KINDS if getattr(places, kind) == "disk"))
    if not any(visits):
        return total
    return total + sum(sorted(visits)[-2:]) + DEVICE_BUFFER_BYTES


def spilled(table: Table, sizes: Sequence[Sizes], room: int) -> Table | None:
    """With as little as possible on disk instead of in main memory, so that what is there takes `room`; None where even
    everything on disk takes more. State goes first, of the last rows."""
    places = {row.name: row for row in table.rows}
    order = [(size.name, kind) for kind in KINDS for size in reversed(sizes) if getattr(places[size.name], kind) == "host"]
    if host_bytes(table, sizes) <= room:
        return table
    low, high = 1, len(order)
    if host_bytes(_spill(places, order), sizes) > room:
        return None
    while low < high:
        middle = (low + high) // 2
        if host_bytes(_spill(places, order[:middle]), sizes) <= room:
            high = middle
        else:
            low = middle + 1
    return _spill(places, order[:low])


def _spill(places: dict[str, RowPlaces], moved: Sequence[tuple[str, str]]) -> Table:
    changed = dict(places)
    disk: Place = "disk"
    for name, kind in moved:
        changed[name] = dataclasses.replace(changed[name], **{kind: disk})
    return _table(changed)


def away(table: Table, names: Sequence[str], *, ahead: bool, in_flight_bytes: int) -> Away:
    """What of the rows `names` is not on the device, by number."""
    rows = [table.row(name) for name in names]
    return Away(
        **{
            kind: frozenset(number for number, row in enumerate(rows) if getattr(row, kind) != "device")
            for kind in (*KINDS, "activations")
        },
        ahead=ahead,
        in_flight_bytes=in_flight_bytes,
    )
