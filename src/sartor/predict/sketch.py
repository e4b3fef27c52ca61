"""A step at any number of rows, from traces at two: enough to rank strategies before the best one is traced itself.

What a tensor takes is linear in the rows of a micro-batch, and so is what an operator computes; two traces say how. Workspaces
that are not linear say themselves how large they are (`Ledger.workspaces`). A second micro-batch is like the first one, beside
gradients that are there already.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from sartor.kernels.loss import Extent
from sartor.predict.ledger import Event, Ledger
from sartor.predict.operations import Operation, Operations
from sartor.predict.shapes import NotComparable, settled

ROWS = (5, 7)
"""Of the two traces: few, and neither a power of two, as a model's own sizes are."""
_LINEAR = ("flops", "read_bytes", "written_bytes", "made_bytes")
_STATES = ("weights", "gradients", "optimizer")


class Sketch:
    """The second step of a job with a single micro-batch, as a function of its rows."""

    def __init__(self, traces: Sequence[Ledger]) -> None:
        """`traces`: of one micro-batch of `ROWS` rows each. Raises NotComparable where the two did not do the same."""
        events = [settled(ledger.events) for ledger in traces]
        if _story(events[0]) != _story(events[1]):
            raise NotComparable("what is allocated depends on the number of rows")
        low_E, high_E = (np.array([event.size_bytes for event in trace], dtype=np.int64) for trace in events)
        self._per_row_E = (high_E - low_E) // (ROWS[1] - ROWS[0])
        self._fixed_E = low_E - ROWS[0] * self._per_row_E
        last = {phase for phase in (event.phase for event in events[0]) if phase.startswith("step 2")}
        self._last_E = np.array([event.phase in last for event in events[0]])
        passes = np.array([event.phase.endswith("backward") for event in events[0]])
        self._passes_L = passes[self._last_E]
        self._signs_E = np.sign(low_E)
        self._workspaces = self._found(traces, events[0])
        self._kinds_E = np.array([traces[0].kinds.get(event.storage, "activations") for event in events[0]])
        low, high = (ledger.operations.step() for ledger in traces)
        if [o.name for o in low.table] != [o.name for o in high.table] or len(low.segments) != len(high.segments):
            raise NotComparable("what is computed depends on the number of rows")
        self._operations = low, high
        self._tables: dict[float, list[Operation]] = {}

    def _found(self, traces: Sequence[Ledger], events: Sequence[Event]) -> list[tuple[Extent, Extent, np.ndarray]]:
        """Every workspace's extents in both traces, and where it lives in the last step. It is taken out of what is linear."""
        found = []
        storages_E = np.array([event.storage for event in events])
        for storage, low in traces[0].workspaces.items():
            mask_E = storages_E == storage
            self._per_row_E[mask_E] = self._fixed_E[mask_E] = 0
            found.append((low, traces[1].workspaces[storage], np.where(mask_E, self._signs_E, 0).cumsum()[self._last_E]))
        return found

    @cached_property
    def _curves(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Live bytes of each kind after every event of the last step: the fixed part, and what a row adds."""
        masks = {name: self._kinds_E == name for name in _STATES}
        masks["activations"] = ~np.logical_or.reduce(list(masks.values()))
        return {
            name: (
                np.where(mask, self._fixed_E, 0).cumsum()[self._last_E],
                np.where(mask, self._per_row_E, 0).cumsum()[self._last_E],
            )
            for name, mask in masks.items()
        }

    def live(self, kind: str, rows: int) -> np.ndarray:
        """Bytes of a kind after every event of a step."""
        fixed_L, per_row_L = self._curves[kind]
        live_L: np.ndarray = fixed_L + rows * per_row_L
        if kind == "activations":
            for low, high, alive_L in self._workspaces:
                extent = dataclasses.replace(low, rows=max(_at(low.rows, high.rows, rows), 0))
                live_L = live_L + extent.workspace_bytes * alive_L
        return live_L

    def activation_peaks(self, rows: int) -> tuple[int, int]:
        """The most bytes of what is no weight, gradient or optimizer state: in the passes, and in the update."""
        live_L = self.live("activations", rows)
        return int(live_L[self._passes_L].max(initial=0)), int(live_L[~self._passes_L].max(initial=0))

    def peak_bytes(self, rows: int, *, accumulated: bool) -> int:
        """Allocated bytes at the fullest moment, on one device. `accumulated`: a step has several micro-batches."""
        gradients_L = self.live("gradients", rows)
        if accumulated:
            new_L = np.maximum(np.diff(gradients_L, prepend=0), 0)  # until it is added to what is there
            gradients_L = np.where(self._passes_L, gradients_L.max(initial=0) + new_L, gradients_L)
        others_L = sum(self.live(kind, rows) for kind in ("weights", "optimizer", "activations"))
        return int((gradients_L + others_L).max())

    def operations(self, rows: float) -> Operations:
        """What one micro-batch of so many rows computes, and the update. A part of a row is a narrower micro-batch's."""
        low, high = self._operations
        if rows not in self._tables:  # many strategies have micro-batches of a few sizes
            self._tables[rows] = [_between(one, other, rows) for one, other in zip(low.table, high.table, strict=True)]
        return Operations(table=list(self._tables[rows]), segments=list(low.segments))


def _story(events: Sequence[Event]) -> list[tuple[int, str, bool]]:
    """Everything but sizes and names."""
    return [(event.storage, event.phase, event.size_bytes > 0) for event in events]


def _between(low: Operation, high: Operation, rows: float) -> Operation:
    changed: dict[str, Any] = {name: max(_at(getattr(low, name), getattr(high, name), rows), 0) for name in _LINEAR}
    sizes = tuple(max(_at(one, other, rows), 0) for one, other in zip(low.sizes, high.sizes, strict=True))
    return dataclasses.replace(low, **changed, sizes=sizes)


def _at(low: int, high: int, rows: float) -> int:
    """On the line through what there is at `ROWS`."""
    return low + round((high - low) * (rows - ROWS[0]) / (ROWS[1] - ROWS[0]))
