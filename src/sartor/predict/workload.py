"""What the average step of a run consists of: memory is for the worst micro-batch, time is the sum of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sartor.data import TokenSet
from sartor.data.order import BatchOrder
from sartor.data.pack import fill_rows, micro_batches, row_width, shares

SAMPLED_STEPS = 64
"""Evenly spread over the run; steps are random draws of the same data."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Of the steps looked at."""

    micro_batches: float
    """Of a rank in a step, on average; of all processes of a CPU."""
    tokens: float
    """Of a step, padding not counted."""
    sequences: float
    total_steps: int
    positions: float
    """Of a micro-batch (rows times width), on average."""
    typical: tuple[tuple[int, ...], ...]
    """The rows of the micro-batch that is nearest to the average: examples by their number."""


def sample_workload(
    samples: TokenSet,
    order: BatchOrder,
    *,
    capacity: int,
    packing: bool,
    micro_batch: int,
    joined: bool = False,
    data_ranks: int = 1,
    processes: int = 1,
    share: bool = False,
) -> Workload:
    """Look at steps of the run, in its own order, cut into micro-batches as a strategy does: those of all `processes` together,
    which share a machine and its rates. `share`: what a row's examples begin with lies there once."""
    steps = np.unique(np.linspace(0, order.total_steps - 1, SAMPLED_STEPS).astype(int))
    groups: list[list[list[int]]] = []
    counts, tokens, sequences = [], 0, 0
    for step in steps:
        indices = order.indices(int(step))
        parts = [
            fill_rows(part, samples.lengths, capacity=capacity, packing=packing)
            for part in shares(indices, samples.lengths, processes)
        ]
        cut = [group for rows in parts for group in micro_batches(rows, micro_batch, joined=joined)]
        groups += cut
        counts.append(-(-len(cut) // data_ranks))
        tokens += int(samples.lengths[indices].sum())
        sequences += len(indices)
    positions = np.array([_positions(samples, group, share=share) for group in groups])
    nearest = int(np.abs(positions - positions.mean()).argmin())
    return Workload(
        micro_batches=float(np.mean(counts)),
        tokens=tokens / len(steps),
        sequences=sequences / len(steps),
        total_steps=order.total_steps,
        positions=float(positions.mean()),
        typical=tuple(tuple(row) for row in groups[nearest]),
    )


def _positions(samples: TokenSet, group: Sequence[Sequence[int]], *, share: bool) -> int:
    return len(group) * max(row_width(samples, row, share=share) for row in group)
