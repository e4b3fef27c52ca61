"""What every strategy for a job has in common, and what a run is made of under one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sartor.data import DataSets, TokenSet
from sartor.data.order import BatchOrder
from sartor.data.pack import Batch, collate, fill_rows, group_width, micro_batches, shares
from sartor.job import Job
from sartor.machine import Machine
from sartor.methods import MethodTraits
from sartor.model import ModelSource
from sartor.plan.strategy import Strategy
from sartor.predict import LargestSteps
from sartor.step import Precision

MOST_STEPS = 20_000
"""Steps whose lengths are looked at; more are more of the same data in another order."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every candidate has in common."""

    job: Job
    source: ModelSource
    machine: Machine
    method: MethodTraits
    precision: Precision
    packing: bool
    sets: DataSets
    order: BatchOrder
    expandable_segments: bool
    attention: str | None = None
    """As in `Strategy`."""
    blocks: int = 0
    """Of the model, where each can recompute by itself; else none."""


def batch_order(job: Job, sets: DataSets) -> BatchOrder:
    """The order of the run's steps, from the job alone."""
    training = job.training
    return BatchOrder(
        examples=len(sets.train),
        global_batch=training.global_batch,
        epochs=training.epochs,
        max_steps=training.max_steps,
        seed=training.seed,
    )


def largest_steps(samples: TokenSet, order: BatchOrder, strategy: Strategy) -> LargestSteps:
    """What this run does, for its forecast: the largest micro-batch of its first step and of all others, and where steps
    accumulate, the largest of those that find gradients (rows are sorted by length, so every step begins with its largest).

    The first step finds no optimizer state; where it is not larger than a later one, that one stands for both. In a pipeline
    every micro-batch is of the largest one's shape, and there are as many as a step has, since several are under way at once.
    Of several processes, what each computes of a step counts as one.
    """
    steps = [
        _groups(samples, part, strategy)
        for step in range(min(order.total_steps, MOST_STEPS))
        for part in shares(order.indices(step), samples.lengths, strategy.processes)
        if part
    ]
    if strategy.layout.pipeline > 1:
        most = max(-(-len(groups) // strategy.layout.data) for groups in steps)
        largest = _largest(samples, [groups[0] for groups in steps], strategy)
        batch = collate(samples, largest, pad_id=0, packing=strategy.packing)
        return LargestSteps.alike([batch] * most, steps=order.total_steps)
    first, later = (_standing(samples, some, strategy) for some in (steps[: strategy.processes], steps[strategy.processes :]))
    if len(first) <= len(later) and all(
        _size(samples, one, strategy) <= _size(samples, other, strategy) for one, other in zip(first, later, strict=False)
    ):
        first = later
    made = _collated(samples, first, strategy)
    then = made if first is later else _collated(samples, later, strategy)
    widths = len({_width(samples, group, strategy) for groups in steps for group in groups})
    return LargestSteps(first=made, later=then, steps=order.total_steps, widths=widths)


def _collated(samples: TokenSet, groups: Sequence[_Group], strategy: Strategy) -> list[Batch]:
    """A batch for each; the same one for equal sizes, which are traced once."""
    made: dict[tuple[int, int], Batch] = {}
    sizes = [_size(samples, group, strategy) for group in groups]
    for group, size in zip(groups, sizes, strict=True):
        if size not in made:
            made[size] = collate(samples, group, pad_id=0, packing=strategy.packing, share=strategy.share_prefixes)
    return [made[size] for size in sizes]


_Group = list[list[int]]
"""The rows of a micro-batch, each the examples in it."""


def _groups(samples: TokenSet, indices: Sequence[int], strategy: Strategy) -> list[_Group]:
    """The first micro-batch of these examples of a step, and the others in the order of their rows."""
    rows = fill_rows(indices, samples.lengths, capacity=strategy.row_capacity, packing=strategy.packing)
    return micro_batches(rows, strategy.micro_batch, joined=strategy.joined)


def _standing(samples: TokenSet, steps: Sequence[list[_Group]], strategy: Strategy) -> list[_Group]:
    """One or two micro-batches that stand for all of these steps: the largest that finds no gradients, the largest that does."""
    if not steps:
        return []
    after = [group for groups in steps if -(-len(groups) // strategy.layout.data) > 1 for group in groups[1:]]
    return [
        _largest(samples, [groups[0] for groups in steps], strategy),
        *([_largest(samples, after, strategy)] if after else []),
    ]


def _largest(samples: TokenSet, groups: Sequence[_Group], strategy: Strategy) -> _Group:
    return max(groups, key=lambda group: _size(samples, group, strategy))


def _width(samples: TokenSet, group: _Group, strategy: Strategy) -> int:
    return group_width(samples, group, packing=strategy.packing, share=strategy.share_prefixes)


def _size(samples: TokenSet, group: _Group, strategy: Strategy) -> tuple[int, int]:
    """Positions of a micro-batch; of equals, that with more targets is the larger."""
    return len(group) * _width(samples, group, strategy), sum(
        int(samples.trained_counts[index]) for row in group for index in row
    )
