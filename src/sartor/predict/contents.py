"""What the time of a micro-batch depends on, and a traced one's operators for the average micro-batch of a run.

Most of a step grows with positions. The head and the loss grow with those that have a target, attention with the squares of
lengths: where examples differ, neither is in proportion to positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from sartor.data.pack import Batch
from sartor.predict.fused import CROSS_ENTROPY, HEAD
from sartor.predict.operations import Operation, Operations


@dataclass(frozen=True)
class Scores:
    """What attention computes."""

    count: float
    """Pairs of positions: squares of lengths, added up."""
    length: float
    """That of most of its work: a length counts as often as it has scores."""

    @classmethod
    def of(cls, lengths: Sequence[int] | np.ndarray, micro_batches: float = 1.0) -> Self:
        """On average."""
        lengths = np.asarray(lengths, dtype=float)
        squares = lengths**2
        return cls(float(squares.sum() / micro_batches), float((squares * lengths).sum() / squares.sum()))


@dataclass(frozen=True)
class Contents:
    """Of a micro-batch, or of several on average."""

    positions: float
    """Rows times width."""
    trained: float
    """Positions that have a target."""
    in_examples: Scores
    """Of attention that computes every example by itself."""
    in_rows: Scores
    """Of attention that computes rows, padding and all."""

    @classmethod
    def of(cls, batch: Batch, lengths: np.ndarray) -> Self:
        """`lengths`: of all examples."""
        rows, width = batch.input_ids_RT.shape
        examples = Scores.of(lengths[list(batch.examples)])
        return cls(rows * width, batch.trained_tokens, examples, Scores.of([width] * rows))

    @classmethod
    def mean(cls, one: Self, other: Self, share: float) -> Self:
        """`share`: of the first."""

        def between(a: float, b: float) -> float:
            return share * a + (1 - share) * b

        def scores(a: Scores, b: Scores) -> Scores:
            return Scores(between(a.count, b.count), between(a.length, b.length))

        return cls(
            between(one.positions, other.positions),
            between(one.trained, other.trained),
            scores(one.in_examples, other.in_examples),
            scores(one.in_rows, other.in_rows),
        )


def in_proportion(operations: Operations, traced: Contents, average: Contents) -> Operations:
    """Operators of the traced micro-batch such that, with all of them in proportion to positions, the average one's result."""
    scale = average.positions / traced.positions
    trained = average.trained / max(traced.trained, 1) / scale

    def changed(operation: Operation) -> Operation:
        if operation.family == "attention" and len(operation.sizes) == 4:
            return _attending(operation, traced, average, scale)
        return _times(operation, trained) if operation.name in (HEAD, CROSS_ENTROPY) else operation

    return dataclasses.replace(operations, table=[changed(operation) for operation in operations.table])


def _attending(operation: Operation, traced: Contents, average: Contents, scale: float) -> Operation:
    calls, queries, keys, size = operation.sizes
    more = keys - queries  # such as a prefix
    was, will = (some.in_examples if operation.form == "examples" else some.in_rows for some in (traced, average))
    length = round(queries * will.length / was.length)
    scores = (will.count + more * average.positions) / (was.count + more * traced.positions)
    return dataclasses.replace(
        operation, flops=round(operation.flops * scores / scale), sizes=(calls, length, length + more, size)
    )


def _times(operation: Operation, share: float) -> Operation:
    values = {name: round(getattr(operation, name) * share) for name in ("flops", "read_bytes", "written_bytes")}
    return dataclasses.replace(operation, **values)
