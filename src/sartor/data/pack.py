"""Rows and micro-batches: examples side by side in a row (packed) or one a row (padded), and the tensors of both.

Shapes: R rows, T positions, K positions with a target.

A step's loss is a sum over its trained tokens divided by their number, so neither packing, nor the order of rows, nor
micro-batches change it: they only decide how fast it is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sartor.data.prefix import branches, spared_tokens
from sartor.data.tokens import TokenSet

IGNORE = -100
"""Target of a position that does not count in the loss."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch. `targets[r, t]` is the token that position t should predict, or IGNORE."""

    input_ids_RT: np.ndarray
    targets_RT: np.ndarray
    position_ids_RT: np.ndarray | None
    """Positions that start again with every example; None where a row holds one example from its start."""
    kept_K: np.ndarray
    """Columns that hold a target in some row: the head is computed for these only."""
    trained_tokens: int
    tokens: int
    """Tokens of its examples: padding does not count, and what examples share counts for each of them."""
    examples: tuple[int, ...]
    """Indices of the examples in their TokenSet."""
    segments: tuple[tuple[int, ...], ...] = ()
    """Of every row, the lengths of its segments from its start on: its examples, or beginnings that examples share and what is
    left of these; nothing where it is not known."""
    continues: tuple[tuple[int, ...], ...] = ()
    """Of every segment, the number of the one in its row that it continues, or -1; nothing where none does."""


def shares(indices: Sequence[int] | np.ndarray, lengths: np.ndarray, ranks: int) -> list[list[int]]:
    """A step's examples distributed over `ranks`: as many tokens each as can be, and none more than its part of the examples,
    rounded up. The longest first, each to the rank that has least."""
    if ranks == 1:
        return [[int(index) for index in indices]]
    most = -(-len(indices) // ranks)
    found: list[list[int]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for index in sorted((int(index) for index in indices), key=lambda index: (-int(lengths[index]), index)):
        rank = min((rank for rank in range(ranks) if len(found[rank]) < most), key=lambda rank: (tokens[rank], rank))
        found[rank].append(index)
        tokens[rank] += int(lengths[index])
    return found


def fill_rows(indices: Sequence[int] | np.ndarray, lengths: np.ndarray, *, capacity: int, packing: bool) -> list[list[int]]:
    """Distribute examples over rows: first fit decreasing when packing, else one a row; longest rows first."""
    by_length = sorted((int(index) for index in indices), key=lambda index: (-int(lengths[index]), index))
    if not packing:
        return [[index] for index in by_length]
    rows: list[list[int]] = []
    room: list[int] = []
    for index in by_length:
        length = int(lengths[index])
        place = next((row for row, free in enumerate(room) if free >= length), None)
        if place is None:
            rows.append([])
            room.append(max(capacity, length))
            place = len(rows) - 1
        rows[place].append(index)
        room[place] -= length
    return [row for _, row in sorted(zip(room, rows, strict=True), key=lambda pair: pair[0])]


def micro_batches(rows: list[list[int]], micro_batch: int, *, joined: bool = False) -> list[list[list[int]]]:
    """Groups of at most `micro_batch` rows; joined, the rows of a group become one, which has next to no padding."""
    groups = [rows[first : first + micro_batch] for first in range(0, len(rows), micro_batch)]
    return [[[index for row in group for index in row]] for group in groups] if joined else groups


def rounded(width: int) -> int:
    """Up to one of 32 widths in each octave: at most 3 % more. Matrix products are compiled for their sizes on a CPU, and memory
    is used again for the same sizes; widths that never come again would make both anew."""
    step = max(1 << max(width.bit_length() - 6, 0), 1)
    return -(-width // step) * step


def row_width(samples: TokenSet, row: Sequence[int], *, share: bool = False) -> int:
    """Tokens that lie in a row. `share`: what its examples begin with lies there once (`sartor.data.prefix`)."""
    return sum(int(samples.lengths[index]) for index in row) - (spared_tokens(samples, row) if share else 0)


def group_width(samples: TokenSet, rows: Sequence[Sequence[int]], *, packing: bool, share: bool = False) -> int:
    """Positions of each row of a micro-batch, as `collate` lays it."""
    width = max(row_width(samples, row, share=share) for row in rows)
    return rounded(width) if packing and len(rows) == 1 else width


def _segments(samples: TokenSet, row: Sequence[int], *, share: bool) -> Iterator[tuple[int, int, int, int]]:
    """What lies in a row, one after the other: the example it is of, its first and last token there, and the number of the
    segment that it continues, or -1."""
    if not share:
        yield from ((index, 0, int(samples.lengths[index]), -1) for index in row)
        return
    count = 0
    for branch in branches(samples, row):
        if branch.length:
            yield branch.members[0], 0, branch.length, -1
        for index in branch.members:
            yield index, branch.length, int(samples.lengths[index]), count if branch.length else -1
        count += len(branch.members) + (branch.length > 0)


def collate(samples: TokenSet, rows: list[list[int]], *, pad_id: int, packing: bool, share: bool = False) -> Batch:
    """The arrays of one micro-batch, padded on the right to its longest row; a single packed row to one of few widths. `share`:
    what the examples of a row begin with lies there once."""
    laid = [list(_segments(samples, row, share=share)) for row in rows]
    width = max(sum(last - first for _, first, last, _ in row) for row in laid)
    if packing and len(rows) == 1:
        width = rounded(width)
    input_ids_RT = np.full((len(rows), width), pad_id, dtype=np.int64)
    targets_RT = np.full((len(rows), width), IGNORE, dtype=np.int64)
    position_ids_RT = np.zeros((len(rows), width), dtype=np.int64)
    for r, row in enumerate(laid):
        t = 0
        for index, first, last, _ in row:
            sample, end = samples[index], t + last - first
            input_ids_RT[r, t:end] = sample.input_ids[first:last]
            # Position t predicts token t + 1 of the same example: the shift never crosses into the neighbour. A shared beginning
            # predicts nothing that counts.
            following = slice(first + 1, last + 1)
            targets = np.where(sample.trained[following], sample.input_ids[following], IGNORE)
            targets_RT[r, t : t + len(targets)] = targets
            position_ids_RT[r, t:end] = np.arange(first, last)
            t = end
        position_ids_RT[r, t:] = np.arange(width - t)  # padding is a segment of its own
    counted_RT = targets_RT != IGNORE
    return Batch(
        input_ids_RT=input_ids_RT,
        targets_RT=targets_RT,
        position_ids_RT=position_ids_RT if packing else None,
        kept_K=np.flatnonzero(counted_RT.any(axis=0)),
        trained_tokens=int(counted_RT.sum()),
        tokens=sum(int(samples.lengths[index]) for row in rows for index in row),
        examples=tuple(index for row in rows for index in row),
        segments=tuple(tuple(last - first for _, first, last, _ in row) for row in laid),
        continues=tuple(tuple(parent for *_, parent in row) for row in laid) if share else (),
    )


def step_batches(
    samples: TokenSet,
    indices: Sequence[int] | np.ndarray,
    *,
    capacity: int,
    packing: bool,
    micro_batch: int,
    pad_id: int,
    joined: bool = False,
    share: bool = False,
) -> list[Batch]:
    """All micro-batches of one optimizer step; `share` as in `collate`."""
    rows = fill_rows(indices, samples.lengths, capacity=capacity, packing=packing)
    groups = micro_batches(rows, micro_batch, joined=joined)
    return [collate(samples, group, pad_id=pad_id, packing=packing, share=share) for group in groups]
