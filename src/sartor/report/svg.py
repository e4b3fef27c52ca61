"""A small line chart as inline SVG: colours and type come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup, escape

from sartor.report.curves import Point

_WIDTH, _LEFT, _RIGHT = 960, 58, 946


@dataclass(frozen=True, kw_only=True)
class Series:
    """Points in order of x. `css` is the class that colours it; dots carry their value as a tooltip."""

    name: str
    css: str
    points: Sequence[Point]
    mark: Literal["line", "dots"] = "line"


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, from at or below `low` to at or above `high`."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def tick_label(value: float, step: float) -> str:
    """As many digits as the step between ticks needs: `0.25`, `1,500`, `20K`."""
    if abs(step) >= 1000:
        return f"{value / 1000:,.0f}K" if value else "0"
    digits = max(0, -math.floor(math.log10(abs(step)) + 1e-9)) if step else 0
    return f"{value:,.{min(digits, 8)}f}"


@dataclass(frozen=True)
class _Frame:
    """Where the data lies on the paper."""

    x_low: float
    x_high: float
    y_ticks: Sequence[float]
    height: int

    def place(self, point: Point) -> Point:
        span = self.x_high - self.x_low
        across = (point[0] - self.x_low) / span if span else 0.5
        up = (point[1] - self.y_ticks[0]) / (self.y_ticks[-1] - self.y_ticks[0])
        return _LEFT + across * (_RIGHT - _LEFT), self.height - 42 - up * (self.height - 66)


def line_chart(
    series: Sequence[Series], *, title: str, x_label: str, y_label: str, height: int = 340, from_zero: bool = False
) -> Markup:
    """The chart, or an empty string where no series has a point. All points must be finite."""
    points = [point for one in series for point in one.points]
    if not points:
        return Markup("")
    xs, ys = [x for x, _ in points], [y for _, y in points]
    frame = _Frame(min(xs), max(xs), nice_ticks(0.0 if from_zero else min(ys), max(ys)), height)
    svg = [f'<svg class="chart" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">']
    svg += _axes(frame, escape(x_label), escape(y_label), whole=all(x.is_integer() for x in xs))
    svg += [_drawn(one, [frame.place(point) for point in one.points]) for one in series if one.points]
    return Markup("\n".join([*svg, "</svg>"]))


def _axes(frame: _Frame, x_label: str, y_label: str, *, whole: bool) -> list[str]:
    low, high, floor = frame.x_low, frame.x_high, frame.height - 42
    x_ticks = nice_ticks(low, high, 8) if low < high else [low, low + 1]
    x_step, y_step = max(x_ticks[1] - x_ticks[0], float(whole)), frame.y_ticks[1] - frame.y_ticks[0]
    out = []
    for tick in frame.y_ticks:
        y = frame.place((low, tick))[1]
        out.append(f'<line class="grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick_label(tick, y_step)}</text>')
    for tick in x_ticks:
        if low <= tick <= high and (tick.is_integer() or not whole):
            x = frame.place((tick, frame.y_ticks[0]))[0]
            out.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 5}"/>')
            out.append(f'<text class="tick" x="{x:.1f}" y="{floor + 19}" text-anchor="middle">{tick_label(tick, x_step)}</text>')
    out.append(f'<line class="axis" x1="{_LEFT}" x2="{_RIGHT}" y1="{floor}" y2="{floor}"/>')
    out.append(f'<text class="label" x="{_RIGHT}" y="{frame.height - 5}" text-anchor="end">{x_label}</text>')
    out.append(f'<text class="label" x="{_LEFT - 48}" y="12">{y_label}</text>')
    return out


def _drawn(series: Series, places: Sequence[Point]) -> str:
    if series.mark == "line" and len(places) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        return f'<polyline class="{escape(series.css)}" points="{path}"/>'
    dots = zip(series.points, places, strict=True)
    return "\n".join(
        f'<circle class="{escape(series.css)}" cx="{x:.1f}" cy="{y:.1f}" r="3.5">'
        f"<title>{escape(series.name)} {value:,.4g} at {at:,.12g}</title></circle>"
        for (at, value), (x, y) in dots
    )
