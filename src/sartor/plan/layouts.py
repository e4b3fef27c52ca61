"""Layouts that a job may have on a machine's devices."""

from __future__ import annotations

import math

from sartor.errors import JobError
from sartor.job.schema import StrategyJob
from sartor.machine import Machine
from sartor.parallel import Layout


def possible_layouts(wanted: StrategyJob, machine: Machine, *, global_batch: int) -> list[Layout]:
    """Layouts over all of the machine's devices that honour what the job pins, plain sharding first. Raises JobError."""
    sizes = [
        (tensor, replicate, machine.devices // fixed if wanted.shard == "auto" else wanted.shard)
        for tensor in _tensors(wanted, machine)
        for replicate in _replicas(wanted, machine)
        if (fixed := wanted.pipeline * wanted.context * tensor * replicate)
    ]
    pinned = wanted.pipeline * wanted.context
    fitting = [size for size in sizes if math.prod(size) * pinned == machine.devices]
    if not fitting:
        asked = max(math.prod(sizes[0]), sizes[0][0] * sizes[0][1]) * pinned
        raise JobError(
            f"`strategy` lays the job out over {asked} devices, and the machine has {machine.devices}",
            why=f"shard {wanted.shard} x replicate {wanted.replicate} x context {wanted.context} x tensor {wanted.tensor} x "
            f"pipeline {wanted.pipeline}",
            remedy="sizes whose product is the number of devices, or another machine, such as machine=8xA100-80GB",
        )
    busy = [size for size in fitting if size[1] * size[2] <= global_batch]
    if not busy:
        ranks = min(replicate * shard for _, replicate, shard in fitting)
        raise JobError(
            f"{ranks} data parallel ranks share {global_batch} examples a step",
            why="every rank needs at least one",
            remedy=f"training.global_batch={ranks}, or more context, tensor or pipeline parallelism",
        )
    return [
        Layout(
            pipeline=wanted.pipeline,
            replicate=replicate,
            shard=shard,
            context=wanted.context,
            tensor=tensor,
            zero=zero,
            sequence=(tensor > 1 and wanted.tensor == "auto") if wanted.sequence == "auto" else wanted.sequence,
            schedule=wanted.schedule,
        )
        for tensor, replicate, shard in busy
        for zero in _zeros(wanted, shard * wanted.context)
    ]


def _tensors(wanted: StrategyJob, machine: Machine) -> list[int]:
    """Powers of two within a node."""
    if wanted.tensor != "auto":
        return [wanted.tensor]
    return [size for size in (1, 2, 4, 8, 16) if machine.devices_per_node % size == 0]


def _replicas(wanted: StrategyJob, machine: Machine) -> list[int]:
    """One copy over everything, or one a node."""
    if wanted.replicate != "auto":
        return [wanted.replicate]
    return [1, machine.nodes] if machine.nodes > 1 and wanted.pipeline == 1 else [1]


def _zeros(wanted: StrategyJob, ranks: int) -> tuple[int, ...]:
    if wanted.zero != "auto":
        return (wanted.zero,)
    return (2, 3) if ranks > 1 else (3,)
