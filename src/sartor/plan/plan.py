"""The plan: what will run, what it will need, and what else was considered. Data only."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import yaml

from sartor.data import DataSummary
from sartor.job import Job, to_mapping
from sartor.machine import Machine
from sartor.methods import MethodTraits
from sartor.model import Anatomy
from sartor.plan.strategy import Strategy
from sartor.predict import MemoryForecast
from sartor.predict.time import TimeForecast

SCHEMA_VERSION = 1
"""Of `plan.yaml` and `sartor plan --json`; raised when a key changes its meaning or goes."""


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A strategy that was considered, and why it was not taken."""

    strategy: Strategy
    reason: str
    process_bytes: int | None = None
    """Forecast; None where an estimate was enough."""
    step_seconds: float | None = None
    """Estimated."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Job + machine + strategy + forecast. Made by `sartor.plan.make`; the job in it is resolved:
    what model and method decide is filled in; what is free to change without changing the result is in `strategy`."""

    job: Job
    machine: Machine
    strategy: Strategy
    forecast: MemoryForecast
    traits: MethodTraits
    anatomy: Anatomy
    trained_parameters: int
    data: DataSummary
    total_steps: int
    rejected: tuple[Rejected, ...]
    notes: tuple[str, ...]
    time: TimeForecast | None = None
    """None where nothing is known of the machine's speed."""

    def to_mapping(self) -> dict[str, Any]:
        """Plain nested mappings, as `plan.yaml` and `sartor plan --json` hold them."""
        tree = _plain(self)
        assert isinstance(tree, dict), "a dataclass becomes a mapping"
        forecast = self.forecast.to_mapping()
        time = None if self.time is None else self.time.to_mapping()
        changed = {"job": to_mapping(self.job), "forecast": forecast, "time": time}
        return {"schema_version": SCHEMA_VERSION, "verdict": forecast["verdict"], **tree, **changed}

    def to_yaml(self) -> str:
        dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # libyaml's, seven times as fast, where there is one
        return str(yaml.dump(self.to_mapping(), Dumper=dumper, sort_keys=False, allow_unicode=True))


def _plain(value: Any) -> Any:
    """Dataclasses, tuples and numpy scalars as what YAML and JSON know."""
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.item() if hasattr(value, "item") else value
