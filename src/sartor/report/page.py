"""What the pages share: the template engine, the forecast's bars, tables and picture, and one way to write a page."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from sartor.errors import writing
from sartor.job.units import format_bytes
from sartor.predict import MemoryForecast
from sartor.report import facts
from sartor.report.svg import Series, area_chart

_TEMPLATES = Path(__file__).parent / "templates"
_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


@dataclass(frozen=True, kw_only=True)
class Headline:
    """A number at the top of the page. `before` is where it came from, `note` what it means."""

    label: str
    value: str
    before: str = ""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A part of a bar: its share of the width in percent."""

    css: str
    name: str
    size: str
    share: float


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A named bar of a memory chart."""

    name: str
    total: str
    segments: tuple[Segment, ...]


def render(template: str, **values: Any) -> str:
    """A page of `templates/`, with everything escaped and control characters shown as symbols where it asks for that."""
    return _environment().get_template(template).render(**values).encode("utf-8", "replace").decode("utf-8")


@functools.cache
def _environment() -> jinja2.Environment:
    """One for all pages: it keeps what it compiled."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["visible"] = facts.visible
    return environment


def write_page(path: Path, page: str) -> None:
    """Write a page that the user asked for, whole or not at all. Raises UsageError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(page, encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def title_of(model: str) -> str:
    """A short name of the model: the last part of its path or hub id that says something."""
    return next((part for part in reversed(Path(model).parts) if part != "config.json"), model)


def forecast_bar(name: str, parts: Sequence[facts.Part], scale_bytes: int) -> Bar:
    """The forecast's parts on a bar as wide as `scale_bytes`."""
    scale = max(scale_bytes, 1) / 100
    segments = [
        Segment(css=part.key, name=part.name, size=format_bytes(part.size_bytes), share=round(part.size_bytes / scale, 2))
        for part in parts
    ]
    return Bar(name=name, total=format_bytes(sum(part.size_bytes for part in parts)), segments=tuple(segments))


def legend(parts: Sequence[facts.Part]) -> list[tuple[str, str, str]]:
    """Key, name and size of each part."""
    return [(part.key, part.name, format_bytes(part.size_bytes)) for part in parts]


def available_words(forecast: MemoryForecast) -> str:
    """The forecast's verdict in a sentence."""
    if forecast.process_bytes is None:
        return forecast.reason
    share = facts.percent(forecast.process_bytes, forecast.available_bytes)
    moment = facts.peak_moment(forecast)
    makers = facts.owners(forecast)
    return (
        f"{forecast.reason} ({share})" + (f", {moment}" if moment else "") + (f"; most of it made by {makers}" if makers else "")
    )


def step_picture(forecast: MemoryForecast) -> dict[str, Any]:
    """What the templates show of memory over a step: the chart with its peak marked (empty where nothing was traced), the same
    in words, and whether the chart has a line for what there is."""
    timeline = forecast.timeline
    if timeline is None:
        return {"step_chart": Markup(), "step_words": "", "step_limited": False}
    limit = facts.limit_in_range(timeline, facts.tensor_room(forecast))
    unit, unit_bytes = next((entry for entry in _UNITS if timeline.peak_bytes >= entry[1]), ("bytes", 1))
    sizes = [[size / unit_bytes for size in column] for column in zip(*timeline.live_bytes, strict=True)]
    areas = [
        Series(name=kind, css=kind, points=list(zip(timeline.moments, column, strict=True)))
        for kind, column in zip(timeline.kinds, sizes, strict=True)
    ]
    reserved = [(moment, size / unit_bytes) for moment, size in timeline.reserved]
    lines = [Series(name="reserved", css="reserved", points=reserved)] if reserved else []
    if limit is not None:
        lines.append(Series(name="limit", css="limit", points=[(x, limit / unit_bytes) for x in (0.0, 1.0)]))
    at = (timeline.moments[timeline.peak], timeline.peak_bytes / unit_bytes)
    chart = area_chart(
        areas,
        title="Memory over a step",
        y_label=unit,
        sections=[(section.name, section.first, section.end) for section in timeline.sections],
        lines=lines,
        peak=(at, f"peak {format_bytes(timeline.peak_bytes)}"),
    )
    return {"step_chart": chart, "step_words": facts.timeline_words(timeline, limit), "step_limited": limit is not None}
