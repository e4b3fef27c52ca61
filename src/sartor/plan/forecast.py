"""The memory forecast of a job under one strategy."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from sartor.model.weights import WeightFiles
from sartor.plan.drift import with_drift
from sartor.plan.processes import part_of
from sartor.plan.setting import Setting, largest_steps
from sartor.plan.strategy import Strategy
from sartor.predict import MemoryForecast, forecast_memory
from sartor.predict.heap import LOADED_BYTES
from sartor.predict.whole import Traces


def forecast_of(setting: Setting, strategy: Strategy, *, known: Traces | None = None, brief: bool = False) -> MemoryForecast:
    """Of the run's largest steps and, where the allocator's segments do not expand, of the order of all of them. `known`: traces
    for strategies that differ from this one in how many blocks recompute only. `brief`: as in `forecast_memory`."""
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
        brief=brief,
    )
    forecast = with_loading(setting, forecast)
    return with_drift(setting, strategy, forecast) if strategy.layout.devices == 1 else forecast


def with_loading(setting: Setting, forecast: MemoryForecast) -> MemoryForecast:
    """Resident memory on a CPU is at least what loading takes: weights, and their files where these are in another format. Pages
    of files give way where memory is short, so the verdict does not depend on them."""
    source, path = setting.source, Path(setting.source.path)
    if setting.machine.device.kind != "cpu" or forecast.process_bytes is None or setting.job.quantise is not None:
        return forecast
    if not source.has_weights or not path.is_dir():
        return forecast
    dtype = setting.precision.load_dtype(adapter=setting.method.adapter)
    loading = forecast.baseline_bytes - LOADED_BYTES + WeightFiles(path).resident_bytes(dtype)
    return dataclasses.replace(forecast, process_bytes=max(forecast.process_bytes, loading))
