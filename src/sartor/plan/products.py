"""Products with frozen weights in int8: where a job may have them, and what the plan says of it."""

from __future__ import annotations

from sartor.errors import JobError
from sartor.job import Job
from sartor.kernels.int8 import FAST_INT8
from sartor.machine import Machine


def frozen_products(job: Job, machine: Machine) -> str:
    """What a plan says of inexact products; nothing where they are exact. Raises JobError where the job cannot have them."""
    if job.strategy.frozen_products == "exact":
        return ""
    if machine.device.kind != "cpu":
        why = f"they are for CPUs, and the job computes on {machine.device.torch_name}"
    elif job.method != "lora" or job.quantise is not None:
        why = f"they are for method lora without `quantise`: the method is {job.method}"
    elif not any(name in FAST_INT8 for name in machine.instruction_sets):
        why = f"this CPU has none of the instructions that make them fast and safe ({', '.join(FAST_INT8)})"
    else:
        return (
            "not exact: products with frozen weights are computed in int8, forward and backward (strategy.frozen_products=exact)"
        )
    raise JobError(
        "`strategy.frozen_products` is int8, which this job cannot have", why=why, remedy="strategy.frozen_products=exact"
    )
