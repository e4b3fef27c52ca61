"""A step's events at any size of micro-batch, from traces at three sizes.

Every event is one tensor, so its bytes are a constant times a product of the micro-batch's measures: rows R, width T, columns K
that the loss keeps. Three traces say which product it is, exactly, or that there is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby, pairwise

import numpy as np

from sartor.data.pack import IGNORE, Batch
from sartor.predict.ledger import Event

TILES = (64, 128)
"""Rows to which attention kernels round the width in their scratch memory (`sartor.predict.cuda`)."""


class NotComparable(Exception):
    """The step allocates differently at different sizes."""


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    """A micro-batch as far as memory is concerned."""

    rows: int
    width: int
    kept: int
    """Columns with a target in some row."""


def pieces(width: int, *, packing: bool, longest: int | None = None) -> int:
    """Examples that a row of a blank micro-batch holds."""
    return max(2, -(-width // longest) if longest else 0) if packing else 1


def blank_batch(shape: Shape, *, packing: bool, longest: int | None = None) -> Batch:
    """A micro-batch of this shape, to trace: packed rows hold two examples, or as many as it takes for none to be longer than
    `longest`."""
    targets_RT = np.full((shape.rows, shape.width), IGNORE, dtype=np.int64)
    kept_K = np.arange(shape.width - 1 - shape.kept, shape.width - 1)
    targets_RT[:, kept_K] = 0
    count = pieces(shape.width, packing=packing, longest=longest)
    ends = [shape.width * number // count for number in range(count + 1)]
    examples = tuple(end - start for start, end in pairwise(ends))
    positions_T = np.concatenate([np.arange(length) for length in examples])
    return Batch(
        input_ids_RT=np.zeros_like(targets_RT),
        targets_RT=targets_RT,
        position_ids_RT=np.tile(positions_T, (shape.rows, 1)) if packing else None,
        kept_K=kept_K,
        trained_tokens=shape.rows * shape.kept,
        tokens=shape.rows * shape.width,
        examples=(),
        segments=(examples,) * shape.rows,
    )


def _measures(shape: Shape, virtual_tokens: int) -> list[int]:
    """What an event's bytes may be a multiple of, at this shape."""
    lengths = [1, shape.kept]
    for extra in sorted({0, virtual_tokens}):
        width = shape.width + extra
        lengths += [width, width + 1, *(-(-width // tile) * tile for tile in TILES), width * width, shape.width * width]
    return [*lengths, *(shape.rows * length for length in lengths)]


Formula = tuple[tuple[Fraction, int], ...]
"""Terms: a factor and the number of the measure it multiplies."""


class Family:
    """The events of a trace, at any shape. All traces must be the same but for sizes. Raises NotComparable."""

    def __init__(
        self, traces: Sequence[tuple[Shape, Sequence[Event]]], kinds: Mapping[int, str], *, virtual_tokens: int = 0
    ) -> None:
        """`kinds`: what storages are, as in a ledger. `virtual_tokens`: what the method puts before every row."""
        ordered = [settled(events) for _, events in traces]
        first = ordered[0]
        if any(len(events) != len(first) for events in ordered):
            raise NotComparable("the number of allocations depends on the size of the micro-batch")
        for events in ordered[1:]:
            for one, other in zip(first, events, strict=True):
                if (one.storage, one.phase, one.size_bytes > 0) != (other.storage, other.phase, other.size_bytes > 0):
                    raise NotComparable("the order of allocations depends on the size of the micro-batch")
        self.events = first
        self.kinds = kinds
        self._virtual_tokens = virtual_tokens
        values = [_measures(shape, virtual_tokens) for shape, _ in traces]
        known: dict[tuple[int, ...], int] = {}
        self._formulas: list[Formula] = []
        self._formula_of = np.empty(len(first), dtype=np.int64)
        for place, alike in enumerate(zip(*ordered, strict=True)):
            sizes = tuple(abs(event.size_bytes) for event in alike)
            if sizes not in known:
                known[sizes] = len(self._formulas)
                self._formulas.append(_formula(sizes, values))
            self._formula_of[place] = known[sizes]

    def sizes(self, shape: Shape) -> list[int]:
        """Bytes of every event at this shape, without sign."""
        values = _measures(shape, self._virtual_tokens)
        by_formula = np.array([int(sum(factor * values[which] for factor, which in terms)) for terms in self._formulas])
        return [int(size) for size in by_formula[self._formula_of]]


def _formula(sizes: Sequence[int], values: Sequence[Sequence[int]]) -> Formula:
    """The first measure, else sum of two, that gives all three sizes exactly. Raises NotComparable."""
    count = len(values[0])
    for which in range(count):
        factor = Fraction(sizes[0], values[0][which])
        if all(factor * row[which] == size for size, row in zip(sizes, values, strict=True)):
            return ((factor, which),)
    for one in range(count):
        for other in range(one + 1, count):
            # An attention kernel's scratch is such a sum: one part by width, one by the rounded width.
            (a, b), (c, d) = ((row[one], row[other]) for row in values[:2])
            determinant = a * d - b * c
            if not determinant:
                continue
            factors = Fraction(sizes[0] * d - sizes[1] * b, determinant), Fraction(a * sizes[1] - c * sizes[0], determinant)
            if min(factors) > 0 and all(
                factors[0] * row[one] + factors[1] * row[other] == size for size, row in zip(sizes, values, strict=True)
            ):
                return (factors[0], one), (factors[1], other)
    raise NotComparable("an allocation grows with the micro-batch in a way that is not known")


def settled(events: Sequence[Event]) -> list[Event]:
    """The events, with releases that follow each other in the order of their storages: what is let go at one go comes in the
    order of some table."""
    settled: list[Event] = []
    for _, group in groupby(events, key=lambda event: (event.size_bytes < 0, event.phase)):
        settled += sorted(group, key=lambda event: event.storage if event.size_bytes < 0 else 0)
    return settled
