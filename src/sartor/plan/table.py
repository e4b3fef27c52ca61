"""The table of a placed run: one row per block, and where its weights, gradients, optimizer state and activations live.

Data and arithmetic only. `sartor.placement` runs what a table says; the forecast adds up what it says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal

from torch import Tensor

from sartor.model.rows import Row

Place = Literal["device", "host", "disk"]
Policy = Literal["device", "host", "disk", "auto"]
SPAN = 8 * 2**20
"""Bytes that are copied to or from a tier at once."""
WORKERS = 2
"""Threads that read, and as many that write."""
BUFFER_BYTES = 2 * WORKERS * SPAN
"""What the disk tier takes of memory."""
SLICE = 2**21
"""Elements of a parameter that are updated at once where a row is too large to be in memory with its state. What is kept of them
fills whole pages of 4 KiB, down to a float32 for 256 elements."""
DEVICE_BUFFER_BYTES = 3 * BUFFER_BYTES
"""The same of a disk below an accelerator."""
ACTIVATIONS_IN_FLIGHT = 2**30
"""Bytes of activations that may be on their way to main memory before the accelerator waits."""
KINDS = ("state", "gradients", "weights")
"""What moves, cheapest first: state is moved twice a step, gradients twice and twice more for every further micro-batch, weights
twice a micro-batch and twice for the update."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes of a row of the model."""

    name: str
    weights: int
    gradients: int = 0
    state: int = 0
    part: int | None = None
    """Of the state, what an update by slices has in memory at once; None where the optimizer cannot do that."""
    shared: bool = False
    """Whether several modules use it: embeddings that are the head as well."""
    trained: int | None = None
    """Of the weights, those that train; where it is not said, as many as the gradients."""

    @classmethod
    def of(
        cls,
        row: Row,
        *,
        state_bytes: float | Callable[[Tensor], int] = 8.0,
        gradient_bytes: int | None = None,
        sliced: bool = False,
    ) -> Sizes:
        """`state_bytes` that the optimizer keeps, of an element or told of a parameter, AdamW's two float32 by default, and
        `gradient_bytes` of an element, as many as the parameter's own by default. `sliced`: the optimizer can go by slices."""
        trained = row.trained.values()
        kept = state_bytes if callable(state_bytes) else lambda parameter: int(parameter.numel() * state_bytes)
        return cls(
            name=row.name,
            weights=sum(parameter.numel() * parameter.element_size() for parameter in row.parameters.values()),
            gradients=sum(parameter.numel() * (gradient_bytes or parameter.element_size()) for parameter in trained),
            state=sum(map(kept, trained)),
            shared=len(row.modules) > 1,
            part=max((_part(kept(parameter), parameter.numel()) for parameter in trained), default=0) if sliced else None,
            trained=sum(parameter.numel() * parameter.element_size() for parameter in trained),
        )

    @property
    def trained_bytes(self) -> int:
        return self.gradients if self.trained is None else self.trained

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.state

    @property
    def least_state(self) -> int:
        """What of its state is in memory at once when it is updated, at least."""
        return self.state if self.part is None else self.part

    @property
    def least(self) -> int:
        """What of the row is in memory at once when it is updated, at least."""
        return self.weights + self.gradients + self.least_state


def _threes(rows: Sequence[dict[str, int]]) -> Iterator[tuple[dict[str, int], dict[str, int], dict[str, int]]]:
    """Every row between its neighbours."""
    nothing = dict.fromkeys(KINDS, 0)
    padded = [nothing, *rows, nothing]
    yield from zip(padded[:-2], rows, padded[2:], strict=True)


def slices(count: int) -> list[tuple[int, int]]:
    """A parameter of so many elements in slices: the first element of each, and how many. The last one may be longer."""
    number = max(count // SLICE, 1)
    return [(n * SLICE, SLICE if n < number - 1 else count - n * SLICE) for n in range(number)]


def _part(state: int, count: int) -> int:
    """Bytes of the state of the longest slice."""
    return -(-state * max(size for _, size in slices(count)) // max(count, 1))


@dataclass(frozen=True, kw_only=True)
class RowPlaces:
    """Where the parts of a row live when nothing computes with them."""

    name: str
    weights: Place = "device"
    gradients: Place = "device"
    state: Place = "device"
    activations: Place = "device"

    @property
    def stays(self) -> bool:
        return self.weights == self.gradients == self.state == self.activations == "device"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows in the order of the model's forward pass."""

    rows: tuple[RowPlaces, ...]

    def row(self, name: str) -> RowPlaces:
        return self._by_name.get(name) or RowPlaces(name=name)

    @cached_property
    def _by_name(self) -> dict[str, RowPlaces]:
        return {row.name: row for row in self.rows}

    def kept_bytes(self, sizes: Sequence[Sizes]) -> int:
        """What stays on the device."""
        return sum(getattr(size, kind) for size in sizes for kind in KINDS if getattr(self.row(size.name), kind) == "device")

    def lasting_bytes(self, sizes: Sequence[Sizes]) -> int:
        """The same without gradients, which are not there all the time."""
        kinds = ("weights", "state")
        return sum(getattr(size, kind) for size in sizes for kind in kinds if getattr(self.row(size.name), kind) == "device")

    def away_gradients(self, sizes: Sequence[Sizes]) -> int:
        """Bytes of gradients that live elsewhere."""
        return sum(size.gradients for size in sizes if self.row(size.name).gradients != "device")

    def tier_bytes(self, sizes: Sequence[Sizes], place: Place) -> int:
        """What lives on a lower tier, activations apart."""
        return sum(getattr(size, kind) for size in sizes for kind in KINDS if getattr(self.row(size.name), kind) == place)

    def pass_bytes(self, sizes: Sequence[Sizes], *, accumulated: bool = True) -> int:
        """At most so much of what lives elsewhere is on the device in forward and backward passes, where nothing limits it: the
        weights of a row and of the next one, its gradients, those of the row before, which are written, and, where several
        micro-batches are `accumulated`, those of the next one, which are fetched to be added to."""
        rows = self._moved(sizes)
        if sizes and sizes[0].shared:  # what comes first comes last as well
            rows = [*rows, rows[0]]
        most = 0
        for before, row, after in _threes(rows):
            weights = row["weights"] + max(before["weights"], after["weights"])
            other = before["gradients"] + after["gradients"] if accumulated else max(before["gradients"], after["gradients"])
            most = max(most, weights + row["gradients"] + other)
        return most

    def update_bytes(self, sizes: Sequence[Sizes]) -> int:
        """The same in an update: the row that is updated, the next one, which is fetched, and the last one, which is written."""
        return max((sum(map(sum, (row.values() for row in three))) for three in _threes(self._moved(sizes))), default=0)

    def update_room(self, sizes: Sequence[Sizes]) -> int:
        """The same on a CPU, where a row is written before the one after the next is fetched: two rows."""
        return max((sum(two) for two in self._pairs(sizes)), default=0)

    def _pairs(self, sizes: Sequence[Sizes]) -> list[tuple[int, int]]:
        """Bytes that move of every row of which something moves, and of the next such row."""
        moved = zip(self._moved(sizes), sizes, strict=True)
        totals = [sum(entry.values()) for entry, size in moved if not self.row(size.name).stays]
        return list(pairwise([*totals, 0]))

    def update_peak(self, sizes: Sequence[Sizes], limit_bytes: int) -> int:
        """The most of weights, gradients and state in memory in an update on a CPU, where what moves may take `limit_bytes`.
        Gradients go as their rows are updated: first those of rows of which nothing moves, then the others. That is done before
        the next row has come."""
        here = [size.gradients if self.row(size.name).gradients == "device" else 0 for size in sizes]
        moving = [each for each, size in zip(here, sizes, strict=True) if not self.row(size.name).stays]
        pairs = self._pairs(sizes)
        most, left = sum(here) + (pairs[0][0] if pairs else 0), sum(moving)
        for (row, following), gradients in zip(pairs, moving, strict=True):
            most = max(most, left + row, left - gradients + min(limit_bytes, row + following))
            left -= gradients
        return self.lasting_bytes(sizes) + most

    def moving_bytes(self, sizes: Sequence[Sizes]) -> int:
        """The larger of the two."""
        return max(self.update_bytes(sizes), self.pass_bytes(sizes))

    def row_bytes(self, sizes: Sequence[Sizes]) -> int:
        """The same where nothing is fetched ahead, and what is written is waited for: one row and its update."""
        return max((sum(entry.values()) for entry in self._moved(sizes)), default=0)

    def least_bytes(self, sizes: Sequence[Sizes]) -> int:
        """The same where the update goes by slices, if the optimizer can do that."""
        moved = zip(self._moved(sizes), sizes, strict=True)
        return max((sum(entry.values()) - (entry["state"] and size.state - size.least_state) for entry, size in moved), default=0)

    def _moved(self, sizes: Sequence[Sizes]) -> list[dict[str, int]]:
        return [
            {kind: getattr(size, kind) if getattr(self.row(size.name), kind) != "device" else 0 for kind in KINDS}
            for size in sizes
        ]

    def device_bytes(self, sizes: Sequence[Sizes]) -> int:
        """Peak of weights, gradients and state on the device."""
        return self.kept_bytes(sizes) + self.moving_bytes(sizes)


def uniform(sizes: Sequence[Sizes], place: Place, *, activations: Place = "device") -> Table:
    """Every row on one tier."""
    return Table(
        rows=tuple(
            RowPlaces(name=size.name, weights=place, gradients=place, state=place, activations=activations) for size in sizes
        )
    )


def within(
    sizes: Sequence[Sizes],
    budget_bytes: int,
    place: Place,
    *,
    passes: Callable[[int], int] | None = None,
    update: int = 0,
    released: bool = False,
    accumulated: bool = True,
    activations: Place = "device",
) -> Table | None:
    """The table that keeps `budget_bytes` and moves least: of what must go to `place`, the cheapest kinds first, the last rows
    before the first. With room to fetch ahead if that can be, else for a whole row, else for slices of it. None where even moving
    everything needs more.

    `passes`: bytes of gradients that live elsewhere → the most that gradients which stay and all but rows take in forward and
    backward passes (by default, all gradients that stay); `update`: what else is on the device in the update;
    `released`: gradients that stay go as their rows are updated; `accumulated`: a step may have several micro-batches.
    """
    gradients = sum(size.gradients for size in sizes)
    passes = passes or (lambda away: gradients - away)
    whole = uniform(sizes, "device", activations=activations)
    candidates = [whole, *less_and_less(sizes, place, whole)]
    for table in candidates:
        moving = table.pass_bytes(sizes, accumulated=accumulated)
        pass_peak = table.lasting_bytes(sizes) + passes(table.away_gradients(sizes)) + moving
        room = table.update_room(sizes)
        update_peak = table.update_peak(sizes, room) if released else table.kept_bytes(sizes) + room
        if max(pass_peak, update + update_peak) <= budget_bytes:
            return table
    for largest in (Table.row_bytes, Table.least_bytes):
        for table in candidates:
            others = max(table.lasting_bytes(sizes) + passes(table.away_gradients(sizes)), table.kept_bytes(sizes) + update)
            if others + largest(table, sizes) <= budget_bytes:
                return table
    return None


def less_and_less(sizes: Sequence[Sizes], place: Place, table: Table) -> Iterator[Table]:
    """Tables that keep less than `table` does, and then less and less."""
    gone = {row.name: {kind: getattr(row, kind) for kind in KINDS} for row in table.rows}
    activations = {row.name: row.activations for row in table.rows}
    for kind in KINDS:
        for size in reversed(sizes):
            if getattr(size, kind) and gone[size.name][kind] == "device":
                gone[size.name][kind] = place
                yield Table(
                    rows=tuple(RowPlaces(name=name, activations=activations[name], **places) for name, places in gone.items())
                )
