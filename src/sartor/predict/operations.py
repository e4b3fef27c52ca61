"""Operations: what a traced training step computes, how many bytes it moves, and in which block and pass.

The tracker notes every operator that does work. Equal ones (same operator, shapes and formats) are one entry of a table, so that
a step of ten thousand operators is a few hundred entries and how often each occurs. A segment is a stretch of the step in which
one block is at work in one pass; layers that were left out of the trace are segments that count several times.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from sartor.model.regions import Reduction

PASSES = ("forward", "backward", "recompute", "update")
"""`update` is everything after the gradients: clipping and the optimizer."""


@dataclass(frozen=True, slots=True)
class Group:
    """The ranks that take part in a collective: how many, and how far one is from the next."""

    size: int
    stride: int
    overlaps: bool = False
    """Whether it runs beside the computation (FSDP2's do); of others the next operator waits for the result."""

    def spans_nodes(self, devices_per_node: int) -> bool:
        """Whether they lie on several nodes, where ranks are numbered node by node."""
        return self.size * self.stride > devices_per_node


@dataclass(frozen=True, slots=True)
class Operation:
    """One operator on tensors of known shapes."""

    name: str
    """ATen's name, without overload."""
    family: str
    """One of `sartor.predict.operators.FAMILIES`."""
    dtype: str
    """Format of the computation, which is that of the operands: autocast has been at work already."""
    flops: int
    """Of matrix products, attention and convolutions; 0 elsewhere."""
    read_bytes: int
    written_bytes: int
    made_bytes: int
    """Of those written, in tensors that the operator allocates."""
    sizes: tuple[int, ...] = ()
    """(batch, M, N, K) of a product of M x K with K x N; (batch x heads, queries, keys, width) of attention; of others the
    elements of the largest operand."""
    form: str = ""
    """Of a product nn, nt, tn or tt: which operands are transposed in memory. Of attention causal (half of the scores are
    skipped; `flops` counts all of them, as is usual), masked or full."""
    dense: bool = True
    """Whether all operands lie in memory in the order of the result."""
    group: Group | None = None
    """Of a collective."""
    called: bool = True
    """Whether somebody asked for it; else it is a part of the operator before it."""

    @property
    def bytes(self) -> int:
        return self.read_bytes + self.written_bytes


VIEW = Operation(name="view", family="view", dtype="", flops=0, read_bytes=0, written_bytes=0, made_bytes=0)
"""All views: they move nothing, but on a CPU asking for one takes as long as a small operator."""


@dataclass(kw_only=True)
class Segment:
    """A stretch of the step: one unit (or what lies outside of units) in one pass."""

    phase: str
    kind: str
    """One of PASSES."""
    unit: int
    micro_batch: int
    """Number within the phase, from 0."""
    times: int = 1
    """How many units of the whole model it stands for, one after the other."""
    counts: Counter[int] = field(default_factory=Counter)
    """Place in the table of operations → how often."""
    recorded: int = 0
    """Operators, views among them, for which autograd made a node."""


@dataclass(kw_only=True)
class Operations:
    """The table and the segments, in the order of execution."""

    table: list[Operation] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)

    def __iter__(self) -> Iterator[tuple[Segment, Operation, int]]:
        """Every segment's operations, and how often each occurs in the whole model."""
        for segment in self.segments:
            for place, count in segment.counts.items():
                yield segment, self.table[place], count * segment.times

    def total(self, of: str | Callable[[Operation], int], *, kind: str | None = None, family: str | None = None) -> int:
        """The sum of a quantity (`flops`, `bytes` …) over the whole model, of one pass or family where they are given."""
        value = of if callable(of) else lambda operation: getattr(operation, of)
        return sum(
            count * value(operation)
            for segment, operation, count in self
            if kind in (None, segment.kind) and family in (None, operation.family)
        )

    def footprint(self) -> int:
        """Bytes that the forward pass of a micro-batch makes: what lies between a tensor's first and its last use, or so."""
        return sum(
            count * operation.made_bytes for part, operation, count in self if part.kind == "forward" and not part.micro_batch
        )

    def nodes(self, kind: str) -> int:
        """Autograd's nodes that a pass made."""
        return sum(part.recorded * part.times for part in self.segments if part.kind == kind)

    def calls(self) -> int:
        """Operators that do work."""
        return sum(count for _, operation, count in self if operation.family != VIEW.family)

    def step(self, number: int | None = None) -> Operations:
        """Those of one of the traced optimizer steps; by default the last, which is like all that follow."""
        if number is None:
            number = max(
                (int(part.phase[5:].partition(":")[0]) for part in self.segments if part.phase[:5] == "step "), default=1
            )
        return Operations(
            table=self.table, segments=[part for part in self.segments if part.phase.startswith(f"step {number}: ")]
        )

    def repeated(self, reduction: Reduction) -> Operations:
        """Those of the whole model, from those of a shortened one."""
        segments = [dataclasses.replace(part, times=part.times * reduction.times(part.unit)) for part in self.segments]
        return Operations(table=self.table, segments=segments)

    def per_unit(self, unit: int) -> Counter[tuple[str, str, Operation]]:
        """What a unit does, by phase and pass: to compare units with each other."""
        done: Counter[tuple[str, str, Operation]] = Counter()
        for segment, operation, count in self:
            if segment.unit == unit:
                done[segment.phase, segment.kind, operation] += count
        return done

    def alike(self, units: Iterable[int]) -> bool:
        """Whether these units do the same."""
        first, *others = (self.per_unit(unit) for unit in units)
        return all(other == first for other in others)

    def seconds(self, seconds_of: Callable[[Operation, str], float]) -> np.ndarray:
        """Seconds of every segment (one of its `times`), from those of an operation in a pass."""
        places, counts, owners = self._flat
        kinds = np.array([PASSES.index(part.kind) for part in self.segments], dtype=np.int64)[owners]
        each = np.zeros((len(PASSES), len(self.table)))
        for kind, place in set(zip(kinds.tolist(), places.tolist(), strict=True)):
            each[kind, place] = seconds_of(self.table[place], PASSES[kind])
        return np.bincount(owners, weights=each[kinds, places] * counts, minlength=len(self.segments))

    @cached_property
    def _flat(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Place in the table, count, and segment of every entry."""
        entries = [
            (place, count, owner) for owner, part in enumerate(self.segments) for place, count in part.counts.items()
        ] or np.zeros((0, 3))
        places, counts, owners = np.array(entries, dtype=np.int64).T
        return places, counts, owners
