"""The time forecast of a strategy: rates of the machine, links between its devices, and what the run's average step holds."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from sartor.data.pack import fill_rows, micro_batches
from sartor.machine import Machine
from sartor.machine.calibration import load_calibration
from sartor.plan.setting import Setting, worst_micro_batches
from sartor.plan.strategy import Strategy
from sartor.predict.operations import Operations
from sartor.predict.rates import CalibratedRates, CatalogueRates, Rates
from sartor.predict.streams import Link, Network
from sartor.predict.time import Expenses, TimeForecast, Work, forecast_time

MESSAGE_SECONDS = {"inside": 10e-6, "between": 20e-6}
"""What a message takes before its first byte: of the order that NCCL's own tests show over NVLink and over InfiniBand; no
measurement of ours backs it."""
MOST_STEPS = 64
"""Steps over which lengths are averaged."""


def rates_of(machine: Machine) -> Rates | None:
    """Measured rates where this machine is calibrated, published ones where its device is known, else nothing."""
    calibration = None if machine.elsewhere else load_calibration(machine)
    if calibration is not None:
        return CalibratedRates(calibration)
    try:
        return None if machine.rates is None else CatalogueRates(machine.rates)
    except ValueError:  # a device whose rates are not published
        return None


def network_of(machine: Machine) -> Network:
    """Links between the machine's devices, as they are published."""
    peer = machine.rates.peer_link_bytes_per_second if machine.rates else None
    host = machine.rates.host_link_bytes_per_second if machine.rates else None
    inside, between = peer or host, machine.network_bytes_per_second
    return Network(
        devices_per_node=machine.devices_per_node,
        inside=Link(alpha_seconds=MESSAGE_SECONDS["inside"], bytes_per_second=inside) if inside else None,
        between=Link(alpha_seconds=MESSAGE_SECONDS["between"], bytes_per_second=between) if between else None,
    )


def expenses_of(machine: Machine) -> Expenses:
    """What an hour of the whole machine takes."""
    watts = machine.rates.tdp_watts if machine.rates else None
    return Expenses(
        usd_per_hour=machine.price_usd_per_hour,
        watts=None if watts is None else watts * machine.devices,
    )


class Timing:
    """Time forecasts of one setting's strategies."""

    def __init__(self, setting: Setting, rates: Rates) -> None:
        self.setting, self.rates = setting, rates
        self.network, self.expenses = network_of(setting.machine), expenses_of(setting.machine)
        self._work = cache(self._average)

    def forecast(self, strategy: Strategy, stages: Mapping[int, Operations], *, traced_positions: int) -> TimeForecast:
        """`stages`: what a rank of each traced pipeline stage computes for micro-batches of so many positions."""
        layout = strategy.layout
        work = self._work(strategy.micro_batch, strategy.packing, strategy.row_capacity, layout.data, traced_positions)
        return forecast_time(stages, rates=self.rates, layout=layout, network=self.network, work=work, expenses=self.expenses)

    def _average(self, micro_batch: int, packing: bool, row_capacity: int, ranks: int, traced_positions: int) -> Work:
        """Over steps that lie evenly in the run."""
        samples, order = self.setting.sets.train, self.setting.order
        steps = sorted({number * order.total_steps // MOST_STEPS for number in range(MOST_STEPS)})
        groups = tokens = sequences = positions = 0
        for step in steps:
            indices = order.indices(step)
            rows = fill_rows(indices, samples.lengths, capacity=row_capacity, packing=packing)
            cut = micro_batches(rows, micro_batch)
            groups += len(cut)
            tokens += sum(int(samples.lengths[index]) for index in indices)
            sequences += len(indices)
            positions += sum(len(group) * max(sum(int(samples.lengths[at]) for at in row) for row in group) for group in cut)
        return Work(
            micro_batches=max(round(groups / len(steps) / ranks), 1),
            tokens=tokens / len(steps),
            sequences=sequences / len(steps),
            total_steps=order.total_steps,
            scale=positions / groups / traced_positions,
        )


def traced_positions(setting: Setting, strategy: Strategy) -> int:
    """Positions of the micro-batch that is traced for a strategy: the largest of the run."""
    return int(worst_micro_batches(setting.sets.train, setting.order, strategy)[0].input_ids_RT.size)
