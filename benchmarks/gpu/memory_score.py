"""Forecasts of measured runs made again, from a result file alone; and how well they do.

`make_forecast` is what benchmarks/gpu/memory.py calls before it measures, and what tests/predict/test_gpu_file.py calls on any
machine later. A case carries the model's configuration, the job, the device, and what was measured.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

from sartor.errors import DoesNotFit
from sartor.job import from_mapping
from sartor.job.schema import MachineJob
from sartor.machine import Device, Machine, probe
from sartor.plan import Plan, make
from sartor.predict.target import Target

FIGURES = ("allocated_bytes", "active_bytes", "reserved_bytes", "process_bytes")
NO_LIMIT = 2**50


def machine_of(case: dict[str, Any], *, limited: bool = True) -> Machine:
    """The device that the case names, in place of this machine's own. `limited`: with the memory it has, or is let have."""
    device = Device(**case["device"])
    if device.kind != "cuda":
        return probe(MachineJob(device=device.kind))
    capacity = case["capacity_bytes"]
    total = NO_LIMIT if not limited else device.total_bytes
    if limited and capacity is not None:
        total = capacity + Target.of(device).context_bytes
    device = dataclasses.replace(device, total_bytes=total, available_bytes=total)
    return dataclasses.replace(probe(MachineJob(device="cpu")), device=device, accelerators=(device,))


def make_plan(case: dict[str, Any], folder: Path) -> tuple[Plan, str]:
    """What `sartor plan` makes of the case, and its verdict. What does not fit is planned for a device without limit."""
    (folder / "config.json").write_text(json.dumps(case["config"]), encoding="utf-8")
    job = from_mapping(case["job"] | {"model": str(folder / "config.json")})
    try:
        plan = make(job, machine_of(case))
    except DoesNotFit:
        return make(job, machine_of(case, limited=False)), "does not fit"
    return plan, plan.forecast.verdict


def figures(plan: Plan, verdict: str) -> dict[str, Any]:
    """The forecast as the file holds it."""
    forecast = plan.forecast
    peak = forecast.peak
    return {
        "verdict": verdict,
        "reason": forecast.reason,
        **{name: getattr(forecast, name) for name in FIGURES},
        "baseline_bytes": forecast.baseline_bytes,
        "tensors_bytes": None if peak is None else peak.total_bytes,
        "peak": None if peak is None else {"phase": peak.phase, "module": peak.module, **peak.by_kind},
        "trace_seconds": round(forecast.trace_seconds, 2),
    }


def make_forecast(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The forecast of a case; `folder` is for scratch."""
    return figures(*make_plan(case, folder))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """How forecasts compare with what was measured; medians of absolute errors in percent."""

    errors: dict[str, dict[str, float]]
    """Case → figure → error in percent."""
    medians: dict[str, float]
    called_fits: tuple[str, ...]
    """Cases that ran out of memory though the forecast says `fits`."""
    false_alarms: tuple[str, ...]
    """Cases that ran though the forecast says `does not fit`."""
    not_forecast: tuple[str, ...]


def score(cases: list[dict[str, Any]], forecasts: dict[str, dict[str, Any]]) -> Score:
    """Of cases as the file holds them, with forecasts by name. What was neither measured nor out of memory does not count."""
    errors: dict[str, dict[str, float]] = {}
    fits, alarms, missing = [], [], []
    for case in cases:
        name, forecast = case["name"], forecasts[case["name"]]
        if case["status"] == "out of memory" and forecast["verdict"] == "fits":
            fits.append(name)
        if case["status"] != "measured":
            continue
        if forecast["verdict"] == "does not fit":
            alarms.append(name)
        measured = case["measured"]
        known = [figure for figure in FIGURES if measured.get(figure) and forecast.get(figure) is not None]
        if not known:
            missing.append(name)
        errors[name] = {figure: (forecast[figure] / measured[figure] - 1) * 100 for figure in known}
    medians = {
        figure: statistics.median(values)
        for figure in FIGURES
        if (values := [abs(row[figure]) for row in errors.values() if figure in row])
    }
    return Score(
        errors=errors,
        medians=medians,
        called_fits=tuple(fits),
        false_alarms=tuple(alarms),
        not_forecast=tuple(missing),
    )
