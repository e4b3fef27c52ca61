"""What the average step of a run consists of: memory is for the worst micro-batch, time is the sum of all."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sartor.data import TokenSet
from sartor.data.order import BatchOrder
from sartor.data.pack import fill_rows, group_width, micro_batches, shares
from sartor.predict.contents import Contents, Scores

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
    average: Contents
    """Of a micro-batch."""
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
    counts, lengths, tokens, trained, sequences = [], [], 0, 0, 0
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
        trained += int(samples.trained_counts[indices].sum())
        lengths.append(samples.lengths[indices])
    rows, widths = np.array([(len(group), group_width(samples, group, packing=packing, share=share)) for group in groups]).T
    positions = rows * widths
    nearest = int(np.abs(positions - positions.mean()).argmin())
    return Workload(
        micro_batches=float(np.mean(counts)),
        tokens=tokens / len(steps),
        sequences=sequences / len(steps),
        total_steps=order.total_steps,
        average=Contents(
            positions=float(positions.mean()),
            trained=trained / len(groups),
            in_examples=Scores.of(np.concatenate(lengths), len(groups)),
            in_rows=Scores.of(np.repeat(widths, rows), len(groups)),
        ),
        typical=tuple(tuple(row) for row in groups[nearest]),
    )
