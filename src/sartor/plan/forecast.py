"""The memory forecast of a job under one strategy."""

from __future__ import annotations

from sartor.plan.drift import with_drift
from sartor.plan.processes import part_of
from sartor.plan.setting import Setting, largest_steps
from sartor.plan.strategy import Strategy
from sartor.predict import MemoryForecast, forecast_memory
from sartor.predict.whole import Traces


def forecast_of(setting: Setting, strategy: Strategy, *, known: Traces | None = None) -> MemoryForecast:
    """Of the run's largest steps and, where the allocator's segments do not expand, of the order of all of them. `known`: traces
    for strategies that differ from this one in how many blocks recompute only."""
    forecast = forecast_memory(
        setting.job,
        setting.source,
        part_of(setting.machine, strategy.processes),
        largest_steps(setting.sets.train, setting.order, strategy),
        precision=setting.precision,
        recompute=strategy.recompute,
        recomputed=strategy.recomputed,
        attention=strategy.attention,
        layout=strategy.layout,
        expandable_segments=strategy.expandable_segments,
        processes=strategy.processes,
        known=known,
    )
    return with_drift(setting, strategy, forecast) if strategy.layout.devices == 1 else forecast
