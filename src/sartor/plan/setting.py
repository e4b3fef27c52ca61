"""What every strategy for a job has in common, and the largest micro-batch of the run under one of them."""

from __future__ import annotations

from dataclasses import dataclass

from sartor.data import DataSets, TokenSet
from sartor.data.order import BatchOrder
from sartor.data.pack import Batch, collate, fill_rows, micro_batches
from sartor.job import Job
from sartor.machine import Machine
from sartor.methods import MethodTraits
from sartor.model import ModelSource
from sartor.plan.strategy import Strategy
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


def worst_micro_batches(samples: TokenSet, order: BatchOrder, strategy: Strategy) -> list[Batch]:
    """The micro-batch of the run with most positions, twice where steps accumulate (gradients live beside it); in a pipeline as
    often as a step has micro-batches, since several are under way at once."""
    worst: tuple[int, list[list[int]]] = (-1, [])
    most = 1
    for step in range(min(order.total_steps, MOST_STEPS)):
        rows = fill_rows(order.indices(step), samples.lengths, capacity=strategy.row_capacity, packing=strategy.packing)
        groups = micro_batches(rows, strategy.micro_batch)
        most = max(most, -(-len(groups) // strategy.layout.data))
        for group in groups:
            width = max(sum(int(samples.lengths[index]) for index in row) for row in group)
            if len(group) * width > worst[0]:
                worst = (len(group) * width, group)
    batch = collate(samples, worst[1], pad_id=0, packing=strategy.packing)
    return [batch] * (most if strategy.layout.pipeline > 1 else min(most, 2))
