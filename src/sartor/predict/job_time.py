"""The time forecast of a job under one strategy: traces of average micro-batches, rates of the machine, what there is to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sartor.data import TokenSet
from sartor.data.order import BatchOrder
from sartor.data.pack import Batch
from sartor.job.schema import Job
from sartor.machine import Calibration, Machine
from sartor.model import ModelSource
from sartor.parallel import Layout
from sartor.predict.operations import Operations
from sartor.predict.rates import CalibratedRates, CatalogueRates, Rates
from sartor.predict.streams import Link, Network
from sartor.predict.target import Target
from sartor.predict.time import (
    BETWEEN_ALPHA_SECONDS,
    INSIDE_ALPHA_SECONDS,
    Expenses,
    TimeForecast,
    Work,
    forecast_time,
    pass_seconds,
)
from sartor.predict.whole import trace_job
from sartor.predict.workload import Workload, sample_workload, scale
from sartor.step import Precision

Traced = Callable[[Sequence[Batch]], Mapping[int, Operations]]
"""Micro-batches → what each pipeline stage computes for them (`sartor.predict.time.forecast_time`)."""


def rates_of(machine: Machine, calibration: Calibration | None) -> Rates | None:
    """Measured here where there is a calibration, else published; None where there is neither."""
    if calibration is not None and calibration.device.matmul and calibration.device.memory:
        return CalibratedRates(calibration)
    device = machine.rates
    if device is None or not device.peak_flops_per_second or not device.memory_bandwidth_bytes_per_second:
        return None
    return CatalogueRates(device)


def network_of_machine(machine: Machine) -> Network:
    """The links between its devices, as published."""
    device, between = machine.rates, machine.network_bytes_per_second
    inside = device and (device.peer_link_bytes_per_second or device.host_link_bytes_per_second)
    return Network(
        devices_per_node=machine.devices_per_node,
        inside=Link(alpha_seconds=INSIDE_ALPHA_SECONDS, bytes_per_second=inside) if inside else None,
        between=Link(alpha_seconds=BETWEEN_ALPHA_SECONDS, bytes_per_second=between) if between else None,
    )


def expenses_of_machine(machine: Machine) -> Expenses:
    """An hour of it: on demand, at the power that its devices may draw."""
    watts = machine.rates.tdp_watts if machine.rates else None
    return Expenses(usd_per_hour=machine.price_usd_per_hour, watts=None if watts is None else watts * machine.devices)


def forecast_job_time(
    machine: Machine,
    rates: Rates,
    layout: Layout,
    workload: Workload,
    traced: Traced,
    *,
    known: Mapping[int, Operations] | None = None,
) -> TimeForecast:
    """The average step of the run. `traced` is asked for typical micro-batches, unless the first one's operations are `known`
    (in a pipeline, of all micro-batches of a step)."""
    first, *others = workload.typical
    count = max(round(workload.micro_batches), 1) if layout.pipeline > 1 else 1
    stages = known or traced([first] * count)
    seconds = [sum(pass_seconds(operations, rates) for operations in stages.values())]
    seconds += [sum(pass_seconds(operations, rates) for operations in traced([other] * count).values()) for other in others]
    return forecast_time(
        stages,
        rates=rates,
        layout=layout,
        network=network_of_machine(machine),
        expenses=expenses_of_machine(machine),
        work=Work(
            micro_batches=workload.micro_batches if layout.pipeline == 1 else count,
            tokens=workload.tokens,
            sequences=workload.sequences,
            total_steps=workload.total_steps,
            scale=scale(workload, seconds),
        ),
    )


def time_of_strategy(
    job: Job,
    source: ModelSource,
    machine: Machine,
    samples: TokenSet,
    order: BatchOrder,
    *,
    calibration: Calibration | None,
    precision: Precision,
    recompute: bool,
    attention: str | None,
    layout: Layout,
    capacity: int,
    packing: bool,
    micro_batch: int,
) -> TimeForecast | None:
    """All of the above for one strategy; None where nothing is known of the machine's speed."""
    rates = rates_of(machine, calibration)
    if rates is None:
        return None
    options: dict[str, Any] = {"precision": precision, "recompute": recompute, "attention": attention, "layout": layout}
    target = Target.of(machine.device)

    def traced(batches: Sequence[Batch]) -> Mapping[int, Operations]:
        if layout.pipeline == 1:
            return {0: trace_job(job, source, batches, target, **options).operations}
        from sartor.predict.stages import trace_stages

        per_stage = layout.devices // layout.pipeline
        ledgers = trace_stages(job, source, batches, target, **options)
        return {rank // per_stage: ledger.operations for rank, ledger in ledgers}

    workload = sample_workload(
        samples, order, capacity=capacity, packing=packing, micro_batch=micro_batch, data_ranks=layout.data
    )
    return forecast_job_time(machine, rates, layout, workload, traced)
