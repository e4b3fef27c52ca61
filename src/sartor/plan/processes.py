"""Several processes on a CPU: how many, and what of the machine and of the work each of them has."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from sartor.errors import JobError
from sartor.job import Job
from sartor.machine import Machine
from sartor.machine.probe import usable_cpus
from sartor.machine.topology import clusters
from sartor.predict.time import TimeForecast
from sartor.step.blockwise import is_blockwise


def possible_processes(job: Job, machine: Machine, usable: Collection[int] | None = None) -> list[int]:
    """Numbers of processes to consider, the wanted one first: what the job pins; else one a NUMA cluster, and one alone, which
    needs less memory. `usable`: processors that this process may use. Raises JobError."""
    wanted = job.strategy.processes
    most = min(job.training.global_batch, machine.threads)
    if wanted == "auto":
        alone = is_blockwise(job.training.optimizer) or job.precision.rounding == "stochastic"
        if machine.device.kind != "cpu" or machine.elsewhere or alone:
            return [1]
        several = min(len(clusters(machine.topology, usable_cpus() if usable is None else usable)), most)
        return [several, 1] if several > 1 else [1]
    if wanted > 1 and machine.device.kind != "cpu":
        raise JobError(
            f"`strategy.processes` is {wanted}, and the job computes on {machine.device.torch_name}",
            why="several processes of one machine share a step on its CPU only",
            remedy="strategy.processes=1, or machine.device=cpu",
        )
    if wanted > most:
        short = "threads" if machine.threads == most else "examples a step"
        raise JobError(
            f"`strategy.processes` is {wanted}, and there are {most} {short}",
            why="every process needs a thread and an example",
            remedy=f"strategy.processes={most}" + ("" if short == "threads" else ", or a larger training.global_batch"),
        )
    return [wanted]


def part_of(machine: Machine, processes: int) -> Machine:
    """The machine as one of so many equal processes has it: its share of memory. All of them fit where this one fits."""
    if processes == 1:
        return machine
    device, host = machine.device, machine.host
    return dataclasses.replace(
        machine,
        device=dataclasses.replace(
            device, total_bytes=device.total_bytes // processes, available_bytes=device.available_bytes // processes
        ),
        host=dataclasses.replace(
            host, total_bytes=host.total_bytes // processes, available_bytes=host.available_bytes // processes
        ),
    )


def shared_traffic_bytes(gradient_bytes: int, processes: int) -> int:
    """What the processes of a machine read and write to have the sum of their gradients and the same new weights, beside what the
    trace of one of them has: the others' copies of gradients, the sums, and new weights, which are as large (`step.shared`)."""
    copies, sums, weights = 2 * (processes - 1), processes + 1, 2 * processes
    return gradient_bytes * (copies + sums + weights)


def with_sums(time: TimeForecast, processes: int, sent: float) -> TimeForecast:
    """The forecast of all the work on the whole machine, as so many processes do it: each has a part of the update, and `sent`
    seconds go into gradients and weights on their way."""
    updates = (processes - 1) * time.breakdown["optimizer"]
    seconds = time.step_seconds + updates + sent
    parts = {**time.breakdown, "optimizer": time.breakdown["optimizer"] + updates, "communication": sent}
    return time.taking(seconds, breakdown=parts)
