"""The time forecast of a strategy: rates of the machine, links between its devices, and what the run's average step holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache, cached_property

import torch

from sartor.data.pack import collate
from sartor.kernels import arena
from sartor.kernels.attention import NAME as SEGMENTS
from sartor.machine import Machine
from sartor.machine.calibration import load_calibration
from sartor.plan.processes import shared_traffic_bytes, with_sums
from sartor.plan.setting import Setting, largest_steps
from sartor.plan.strategy import Strategy
from sartor.predict import MemoryForecast, count_trained
from sartor.predict.contents import Contents, in_proportion
from sartor.predict.operations import Operation, Operations
from sartor.predict.rates import KEEPS_UP_TO, CalibratedRates, CatalogueRates, Rates
from sartor.predict.target import Target
from sartor.predict.time import TimeForecast, Work, expenses_of, forecast_time, network_of
from sartor.predict.whole import trace_job
from sartor.predict.workload import Workload, sample_workload

_EVEN = 1.1
"""Positions of the largest step's micro-batches over those of the average one up to which their trace speaks for both."""


def rates_of(machine: Machine) -> Rates | None:
    """Measured rates where this machine is calibrated, published ones where its device is known, else nothing."""
    calibration = None if machine.elsewhere else load_calibration(machine)
    if calibration is not None and calibration.device.matmul and calibration.device.memory:
        return CalibratedRates(calibration, keeps_up_to=None if arena.usable() else KEEPS_UP_TO)
    try:
        return None if machine.rates is None else CatalogueRates(machine.rates)
    except ValueError:  # a device whose rates are not published
        return None


class Timing:
    """Time forecasts of one setting's strategies."""

    def __init__(self, setting: Setting, rates: Rates) -> None:
        machine = setting.machine
        self.setting, self.rates = setting, rates
        self.network = network_of(machine.rates, machine.devices_per_node, machine.network_bytes_per_second)
        self.expenses = expenses_of(machine.rates, machine.devices, machine.price_usd_per_hour)
        self._sampled = cache(self._sample)

    def workload(self, strategy: Strategy) -> Workload:
        """What the run's average step holds under a strategy."""
        return self._sampled(
            strategy.micro_batch,
            strategy.packing,
            strategy.joined,
            strategy.row_capacity,
            strategy.layout.data,
            strategy.processes,
            strategy.share_prefixes,
        )

    def forecast(self, strategy: Strategy, stages: Mapping[int, Operations], *, traced: Contents) -> TimeForecast:
        """`stages`: what a rank of each traced pipeline stage computes for micro-batches that hold so much."""
        workload = self.workload(strategy)
        average = workload.average
        if strategy.attention == SEGMENTS:  # also where another attention stands for it in an estimate
            average = dataclasses.replace(average, in_rows=average.in_examples)
        stages = {stage: in_proportion(operations, traced, average) for stage, operations in stages.items()}
        work = Work(
            micro_batches=workload.micro_batches if strategy.layout.pipeline == 1 else max(round(workload.micro_batches), 1),
            tokens=workload.tokens,
            sequences=workload.sequences,
            total_steps=workload.total_steps,
            scale=average.positions / traced.positions,
        )
        whole = forecast_time(
            stages, rates=self.rates, layout=strategy.layout, network=self.network, work=work, expenses=self.expenses
        )
        return whole if strategy.processes == 1 else with_sums(whole, strategy.processes, self._sum_seconds(strategy.processes))

    @cached_property
    def _gradient_bytes(self) -> int:
        """Of all that trains, in the format of what trains."""
        setting = self.setting
        width = getattr(torch, setting.precision.trained).itemsize
        return int(width * count_trained(setting.job, setting.source, setting.precision))

    def _sum_seconds(self, processes: int) -> float:
        """Of gradients and new weights on their way between processes of this machine: copies in its memory."""
        half = shared_traffic_bytes(self._gradient_bytes, processes) // 2
        copies = Operation(
            name="copy_",
            family="copy",
            dtype=self.setting.precision.trained,
            flops=0,
            read_bytes=half,
            written_bytes=half,
            made_bytes=0,
        )
        return self.rates.seconds(copies, "update")

    def of_forecast(self, strategy: Strategy, forecast: MemoryForecast) -> TimeForecast:
        """The time of what was forecast. Memory is that of the largest step; where the average micro-batch is much smaller, it is
        traced as well, since operators do not get faster in proportion. Over several devices they are taken to: a further trace
        would take seconds there."""
        traced = self._traced(strategy)
        if strategy.layout.devices > 1 or traced.positions <= _EVEN * self.workload(strategy).average.positions:
            return self.forecast(strategy, forecast.stages, traced=traced)
        operations, typical = self._trace_typical(strategy)
        return self.forecast(strategy, {0: operations}, traced=typical)

    def _traced(self, strategy: Strategy) -> Contents:
        """Of a micro-batch of the step whose memory was forecast, on average: its first is larger than the others."""
        samples = self.setting.sets.train
        steps = largest_steps(samples, self.setting.order, strategy)
        first, later = (Contents.of(batch, samples.lengths) for batch in (steps.traced[0], steps.traced[-1]))
        return Contents.mean(first, later, 1 / max(self.workload(strategy).micro_batches, 1.0))

    def _trace_typical(self, strategy: Strategy) -> tuple[Operations, Contents]:
        setting = self.setting
        rows = [list(row) for row in self.workload(strategy).typical]
        batch = collate(setting.sets.train, rows, pad_id=0, packing=strategy.packing, share=strategy.share_prefixes)
        ledger = trace_job(
            setting.job,
            setting.source,
            [batch],
            Target.of(setting.machine.device),
            precision=setting.precision,
            recompute=strategy.recompute,
            recomputed=strategy.recomputed,
            attention=strategy.attention,
            processes=strategy.processes,
        )
        return ledger.operations, Contents.of(batch, setting.sets.train.lengths)

    def _sample(
        self, micro_batch: int, packing: bool, joined: bool, row_capacity: int, ranks: int, processes: int, share: bool
    ) -> Workload:
        return sample_workload(
            self.setting.sets.train,
            self.setting.order,
            capacity=row_capacity,
            packing=packing,
            micro_batch=micro_batch,
            joined=joined,
            data_ranks=ranks,
            processes=processes,
            share=share,
        )
