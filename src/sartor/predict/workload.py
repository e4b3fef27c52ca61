"""What the average step of a run consists of: memory is for the worst micro-batch, time is the sum of all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sartor.data import TokenSet
from sartor.data.order import BatchOrder
from sartor.data.pack import Batch, collate, fill_rows, micro_batches

SAMPLED_STEPS = 64
"""Evenly spread over the run; steps are random draws of the same data."""
_UNEVEN = 1.2
"""Largest micro-batch over the smallest from which on one of average size does not speak for all."""
_SHARES = (0.05, 0.35, 0.65, 0.95)


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Of the steps looked at."""

    micro_batches: float
    """Of a rank in a step, on average."""
    tokens: float
    """Of a step, padding not counted."""
    sequences: float
    total_steps: int
    positions: np.ndarray
    """Of every micro-batch: rows times width."""
    typical: tuple[Batch, ...]
    """To trace: the micro-batch nearest to the average first; where sizes vary, others from the smallest to the largest."""


def sample_workload(
    samples: TokenSet, order: BatchOrder, *, capacity: int, packing: bool, micro_batch: int, data_ranks: int = 1
) -> Workload:
    """Look at steps of the run, in its own order, cut into micro-batches as a strategy does."""
    steps = np.unique(np.linspace(0, order.total_steps - 1, SAMPLED_STEPS).astype(int))
    groups: list[list[list[int]]] = []
    counts, tokens, sequences = [], 0, 0
    for step in steps:
        indices = order.indices(int(step))
        cut = micro_batches(fill_rows(indices, samples.lengths, capacity=capacity, packing=packing), micro_batch)
        groups += cut
        counts.append(-(-len(cut) // data_ranks))
        tokens += int(samples.lengths[indices].sum())
        sequences += len(indices)
    positions = np.array([_positions(group, samples.lengths) for group in groups])
    return Workload(
        micro_batches=float(np.mean(counts)),
        tokens=tokens / len(steps),
        sequences=sequences / len(steps),
        total_steps=order.total_steps,
        positions=positions,
        typical=tuple(collate(samples, groups[place], pad_id=0, packing=packing) for place in _typical(positions)),
    )


def scale(workload: Workload, seconds: Sequence[float]) -> float:
    """How long the average micro-batch takes for one second of the first typical one, from the `seconds` of all typical ones:
    on straight lines between them, in proportion to the positions beyond."""
    at = np.array([batch.input_ids_RT.size for batch in workload.typical], dtype=float)
    taken = np.array(seconds)
    by_size = np.argsort(at)
    at_sorted, taken_sorted = at[by_size], taken[by_size]
    between = np.interp(workload.positions, at_sorted, taken_sorted)
    below, above = workload.positions < at_sorted[0], workload.positions > at_sorted[-1]
    between[below] = taken_sorted[0] * workload.positions[below] / at_sorted[0]
    between[above] = taken_sorted[-1] * workload.positions[above] / at_sorted[-1]
    return float(between.mean() / taken[0])


def _positions(group: Sequence[Sequence[int]], lengths: np.ndarray) -> int:
    return len(group) * max(sum(int(lengths[index]) for index in row) for row in group)


def _typical(positions: np.ndarray) -> list[int]:
    mean = int(np.abs(positions - positions.mean()).argmin())
    if positions.max() <= _UNEVEN * positions.min():
        return [mean]
    order = np.argsort(positions)
    others = [int(order[round(share * (len(order) - 1))]) for share in _SHARES]
    seen = {int(positions[mean])}
    chosen = [mean]
    for place in others:
        if int(positions[place]) not in seen:
            seen.add(int(positions[place]))
            chosen.append(place)
    return chosen
