"""Layouts that a job may have on a machine's devices."""

from __future__ import annotations

from sartor.errors import JobError
from sartor.job.schema import StrategyJob
from sartor.machine import Machine
from sartor.parallel import Layout


def possible_layouts(wanted: StrategyJob, machine: Machine, *, global_batch: int) -> list[Layout]:
    """Layouts over all of the machine's devices that honour what the job pins, the faster one first. Raises JobError."""
    fixed = wanted.replicate * wanted.tensor * wanted.pipeline
    shard = machine.devices // fixed if wanted.shard == "auto" else wanted.shard
    asked = fixed * shard
    if asked != machine.devices:
        raise JobError(
            f"`strategy` lays the job out over {max(asked, fixed)} devices, and the machine has {machine.devices}",
            why=f"shard {wanted.shard} x replicate {wanted.replicate} x tensor {wanted.tensor} x pipeline {wanted.pipeline}",
            remedy="sizes whose product is the number of devices, or another machine, such as machine=8xA100-80GB",
        )
    if shard * wanted.replicate > global_batch:
        raise JobError(
            f"{shard * wanted.replicate} data parallel ranks share {global_batch} examples a step",
            why="every rank needs at least one",
            remedy=f"training.global_batch={shard * wanted.replicate}, or more tensor or pipeline parallelism",
        )
    zeros = (2, 3) if wanted.zero == "auto" and shard > 1 else (3 if wanted.zero == "auto" else wanted.zero,)
    return [
        Layout(
            pipeline=wanted.pipeline,
            replicate=wanted.replicate,
            shard=shard,
            tensor=wanted.tensor,
            zero=zero,
            sequence=wanted.sequence,
            schedule=wanted.schedule,
        )
        for zero in zeros
    ]
