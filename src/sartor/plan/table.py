"""The table of a placed run: one row per block, and where its weights, gradients, optimizer state and activations live.

Data and arithmetic only. `sartor.placement` runs what a table says; the forecast adds up what it says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Place = Literal["device", "host", "disk"]
Policy = Literal["device", "host", "disk", "auto"]
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

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.state


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
        return next((row for row in self.rows if row.name == name), RowPlaces(name=name))

    def kept_bytes(self, sizes: Sequence[Sizes]) -> int:
        """What stays on the device."""
        return sum(getattr(size, kind) for size in sizes for kind in KINDS if getattr(self.row(size.name), kind) == "device")

    def tier_bytes(self, sizes: Sequence[Sizes], place: Place) -> int:
        """What lives on a lower tier, activations apart."""
        return sum(getattr(size, kind) for size in sizes for kind in KINDS if getattr(self.row(size.name), kind) == place)

    def moving_bytes(self, sizes: Sequence[Sizes]) -> int:
        """At most so much of what lives elsewhere is on the device at once, where nothing limits it.

        In an update that is the row that is updated, the next one, which is fetched, and the last one, which is written. In a
        backward pass it is the weights and gradients of two rows, and the gradients of one that is written.
        """
        moved = self._moved(sizes)
        largest = {kind: max((entry[kind] for entry in moved), default=0) for kind in KINDS}
        update = max((sum(entry.values()) for entry in moved), default=0)
        return max(3 * update, 2 * largest["weights"] + 3 * largest["gradients"])

    def least_bytes(self, sizes: Sequence[Sizes]) -> int:
        """The same where nothing is fetched ahead, and what is written is waited for: one row and its update."""
        return max((sum(entry.values()) for entry in self._moved(sizes)), default=0)

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


def within(sizes: Sequence[Sizes], budget_bytes: int, place: Place, *, activations: Place = "device") -> Table | None:
    """The table that keeps `budget_bytes` and moves least: of what must go to `place`, the cheapest kinds first, the last rows
    before the first. With room to fetch ahead if that can be, else without. None where even moving everything needs more."""
    candidates = list(_ever_less(sizes, place, activations))
    for ahead in (True, False):
        for table in candidates:
            moving = table.moving_bytes(sizes) if ahead else table.least_bytes(sizes)
            if table.kept_bytes(sizes) + moving <= budget_bytes:
                return table
    return None


def _ever_less(sizes: Sequence[Sizes], place: Place, activations: Place) -> Iterator[Table]:
    """Tables that keep everything, then less and less."""
    gone: dict[str, dict[str, Place]] = {size.name: {} for size in sizes}

    def table() -> Table:
        return Table(rows=tuple(RowPlaces(name=name, activations=activations, **away) for name, away in gone.items()))

    yield table()
    for kind in KINDS:
        for size in reversed(sizes):
            if getattr(size, kind):
                gone[size.name][kind] = place
                yield table()
