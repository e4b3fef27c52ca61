"""How much of a strategy has to leave its accelerator: the trace with less and less on it, replayed by the device's allocator."""

from __future__ import annotations

import dataclasses
import math
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from sartor.job.units import format_bytes
from sartor.plan.levels import away, host_bytes
from sartor.plan.offload_ground import Ground, Missing
from sartor.plan.partial import FITS
from sartor.plan.setting import largest_steps
from sartor.plan.strategy import Placement, Strategy
from sartor.plan.table import ACTIVATIONS_IN_FLIGHT, Table
from sartor.predict import MemoryForecast
from sartor.predict.memory import Tier, collector_paused, forecast_ledger
from sartor.predict.offload import Away, PlacedTrace
from sartor.predict.rows import made_in_order, rows_of
from sartor.predict.target import Target
from sartor.predict.verdict import TIGHT_SHARE
from sartor.predict.whole import trace_job


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A placed strategy and its memory."""

    strategy: Strategy
    forecast: MemoryForecast
    ahead: bool
    """Whether there is room to fetch the next row while one computes."""
    activations: tuple[int, ...]
    """Bytes of each row's that leave in a forward pass."""


def fit(ground: Ground, strategy: Strategy) -> Fitted | Missing:
    """With the least elsewhere that lets it fit. Raises NotPlaceable."""
    start = time.perf_counter()
    with collector_paused():
        fitting = Fitting(ground, strategy)
        found = fitting.search()
    if isinstance(found, Missing):
        return found
    seconds = found.forecast.trace_seconds + time.perf_counter() - start
    return dataclasses.replace(found, forecast=dataclasses.replace(found.forecast, trace_seconds=seconds))


class Fitting:
    """The levels of one strategy, on its trace."""

    def __init__(self, ground: Ground, strategy: Strategy) -> None:
        self._ground, self._strategy = ground, strategy
        self._accumulated = ground.accumulates(strategy)
        self._sizes = ground.sizes(self._accumulated)
        self.tables = [level.table for level in ground.levels(self._accumulated)]
        """Less and less on the device."""
        self._names = [row.name for row in ground.rows]
        self._trace = _trace(ground, strategy)

    def search(self) -> Fitted | Missing:
        """With room to fetch ahead if that can be, else without."""
        for ahead in (True, False):
            found = self._first(ahead)
            if found is not None:
                return self._below(*found, ahead)
        least = self.forecast(self.tables[-1], ahead=False)
        return Missing(device_bytes=math.ceil((least.process_bytes or 0) / TIGHT_SHARE))

    def _first(self, ahead: bool) -> tuple[Table, MemoryForecast] | None:
        """The first level that fits: guessed from the tensors, and found by replays, which know how full the allocator gets."""
        tables = self.tables
        peaks = _Lazily(lambda place: -self._trace.peak_bytes(self._away(tables[place], ahead)), len(tables))
        place = bisect_left(peaks, -self._ground.tensor_room)
        failed, last = place - 1, len(tables) - 1
        found: tuple[Table, MemoryForecast] | None = None
        while place <= last:
            forecast = self.forecast(tables[place], ahead=ahead)
            if forecast.verdict in FITS:
                found, last = (tables[place], forecast), place - 1
                place = (failed + place) // 2 if place - failed > 1 else place
            else:
                over = (forecast.process_bytes or 0) - int(TIGHT_SHARE * forecast.available_bytes)
                failed, place = place, max(place + 1, min(bisect_left(peaks, peaks[place] + over, lo=place), last))
        return found

    def forecast(self, table: Table, *, ahead: bool) -> MemoryForecast:
        """Of the device."""
        ledger = self._trace.placed(self._away(table, ahead))
        expandable = self._strategy.expandable_segments
        return forecast_ledger(ledger, self._ground.setting.machine, expandable_segments=expandable)

    def _away(self, table: Table, ahead: bool) -> Away:
        return away(table, self._names, ahead=ahead, in_flight_bytes=ACTIVATIONS_IN_FLIGHT)

    def _below(self, table: Table, forecast: MemoryForecast, ahead: bool) -> Fitted | Missing:
        """On the host, and on disk what it cannot take."""
        ground, sizes = self._ground, self._sizes
        kept = self._trace.offloaded_bytes(self._away(table, ahead))
        activations = tuple(kept.get(number, 0) for number in range(len(self._names)))
        lower = ground.spilled(table, accumulated=self._accumulated, activations=sum(activations))
        if lower is None:
            needed = ground.host_base + host_bytes(table, sizes) + sum(activations)
            return Missing(host_bytes=math.ceil(needed / TIGHT_SHARE))
        limit = lower.pass_bytes(sizes) if ahead else lower.row_bytes(sizes)
        placement = Placement(
            table=lower,
            limit_bytes=limit,
            update_limit_bytes=limit,
            disk_bytes=lower.tier_bytes(sizes, "disk"),
            host_bytes=host_bytes(lower, sizes) + sum(activations),
        )
        strategy = dataclasses.replace(self._strategy, placement=placement)
        return Fitted(strategy=strategy, forecast=self._with_tiers(forecast, placement), ahead=ahead, activations=activations)

    def _with_tiers(self, forecast: MemoryForecast, placement: Placement) -> MemoryForecast:
        host = self._ground.setting.machine.host.available_bytes
        needed = self._ground.host_base + placement.host_bytes
        tiers = [
            Tier(name="device", peak_bytes=forecast.process_bytes or 0, capacity_bytes=forecast.available_bytes),
            Tier(name="host", peak_bytes=needed, capacity_bytes=host),
        ]
        if placement.disk_bytes:
            tiers.append(Tier(name="disk", peak_bytes=placement.disk_bytes, capacity_bytes=None))
        words = f"{forecast.reason}, and {format_bytes(needed)} of {format_bytes(host)} of main memory"
        return dataclasses.replace(forecast, reason=words, host_bytes=needed, tiers=tuple(tiers))


class _Lazily:
    """A sequence whose members are made when they are asked for."""

    def __init__(self, make: Callable[[int], int], count: int) -> None:
        self._make, self._count = cache(make), count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: int) -> int:
        return self._make(place)


def _trace(ground: Ground, strategy: Strategy) -> PlacedTrace:
    setting = ground.setting
    steps = largest_steps(setting.sets.train, setting.order, strategy)
    ledger = trace_job(
        setting.job,
        setting.source,
        steps.first,
        Target.of(setting.machine.device),
        precision=setting.precision,
        recompute=strategy.recompute,
        attention=strategy.attention,
        later=steps.later,
        layers=True,
    )
    units = ground.units(1 + max(event.unit for event in ledger.events))
    return PlacedTrace(ledger, rows_of(ground.model, ground.rows, units), made_in_order(ground.model, ground.rows))
