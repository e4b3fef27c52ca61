"""The plan as one self-contained page: no script, no network, light and dark, printable."""

from __future__ import annotations

from pathlib import Path

from sartor.job.units import format_bytes, format_count
from sartor.plan import Plan
from sartor.predict import MemoryForecast
from sartor.report import facts
from sartor.report.page import (
    Bar,
    Headline,
    available_words,
    forecast_bar,
    legend,
    render,
    step_picture,
    title_of,
    write_page,
)

Row = tuple[str, str, float]
"""Name, size, and share of the largest in percent."""


def write_plan(plan: Plan, path: Path) -> None:
    """Write the page at `path`, whole or not at all. Raises UsageError where that cannot be."""
    forecast = plan.forecast
    parts = facts.memory_parts(forecast)
    page = render(
        "plan.html.jinja",
        plan=plan,
        title=title_of(plan.job.model.path),
        sentence=plan.strategy.describe(),
        available=available_words(forecast),
        headlines=_headlines(plan),
        numbers=_numbers(plan),
        bars=_bars(forecast, parts),
        tiers=facts.tiers(forecast),
        legend=legend(parts),
        **step_picture(forecast),
        by_kind=_rows({part.name: part.size_bytes for part in parts}),
        by_module=_rows({} if forecast.peak is None else forecast.peak.by_module),
        facts=facts.plan_facts(plan),
        machine=facts.machine_facts(plan.machine),
        rejected=[(facts.differences(plan.strategy, other.strategy), other.reason) for other in plan.rejected],
        notes=[*plan.notes, *plan.data.notes],
    )
    write_page(path, page)


def _headlines(plan: Plan) -> list[Headline]:
    """The numbers at the top."""
    forecast = plan.forecast
    shown = []
    if forecast.process_bytes is not None:
        there = format_bytes(forecast.available_bytes)
        shown.append(Headline(label="memory", value=format_bytes(forecast.process_bytes), note=f"of {there} available"))
        margin = forecast.available_bytes - forecast.process_bytes
        share = facts.percent(abs(margin), forecast.available_bytes)
        left = "left free" if margin >= 0 else "too little"
        shown.append(Headline(label="margin", value=format_bytes(abs(margin)), note=f"{share} {left}"))
    trained = format_count(plan.trained_parameters)
    shown.append(Headline(label="trained", value=trained, note=f"of {format_count(plan.anatomy.parameters)} parameters"))
    steps = f"of {plan.job.training.global_batch} examples; {facts.epochs_words(plan)}"
    shown.append(Headline(label="steps", value=f"{plan.total_steps:,}", note=steps))
    return shown


def _numbers(plan: Plan) -> list[tuple[str, tuple[str, ...]]]:
    """Each device with allocated, active, reserved, process, and what there is; a dash where a number does not apply."""
    forecast = plan.forecast
    sizes = (forecast.allocated_bytes, forecast.active_bytes, forecast.reserved_bytes, forecast.process_bytes)
    cells = tuple("–" if size is None else format_bytes(size) for size in (*sizes, forecast.available_bytes))
    return [(f"{plan.machine.device.torch_name} ({plan.machine.device.name})", cells)]


def _bars(forecast: MemoryForecast, parts: tuple[facts.Part, ...]) -> list[Bar]:
    """The forecast to the scale of what there is."""
    needed = sum(part.size_bytes for part in parts)
    return [forecast_bar("forecast", parts, max(needed, forecast.available_bytes))] if parts else []


def _rows(sizes: dict[str, int]) -> list[Row]:
    """Sizes, largest first."""
    largest = max([1, *sizes.values()])
    ordered = sorted(sizes.items(), key=lambda entry: -entry[1])
    return [(facts.visible(name), format_bytes(size), round(100 * size / largest, 2)) for name, size in ordered]
