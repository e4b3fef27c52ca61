"""Small charts as inline SVG, lines and stacked areas: colours and type come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup, escape

from sartor.report.curves import Point

_WIDTH, _LEFT, _RIGHT, _TOP = 960, 58, 946, 24
_LETTER = 6.5
"""About how wide a letter is."""


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
        return _LEFT + across * (_RIGHT - _LEFT), self.height - 42 - up * (self.height - 42 - _TOP)


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


def area_chart(
    areas: Sequence[Series],
    *,
    title: str,
    y_label: str,
    sections: Sequence[tuple[str, float, float]],
    lines: Sequence[Series] = (),
    peak: tuple[Point, str] | None = None,
    height: int = 340,
) -> Markup:
    """Areas stacked from the bottom up, all over the same xs; what runs when (name, from, to) below; lines and a peak above."""
    xs = [x for x, _ in areas[0].points]
    stacks = [[0.0] * len(xs)]
    for area in areas:
        stacks.append([below + y for below, (_, y) in zip(stacks[-1], area.points, strict=True)])
    highest = max([*stacks[-1], *(y for line in lines for _, y in line.points)])
    frame = _Frame(xs[0], xs[-1], nice_ticks(0.0, highest), height)
    svg = [f'<svg class="chart" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title)}">']
    svg += [*_levels(frame), f'<text class="label" x="{_LEFT - 48}" y="12">{escape(y_label)}</text>']
    for area, lower, upper in zip(areas, stacks, stacks[1:], strict=False):
        edge = [*zip(xs, upper, strict=True), *reversed(list(zip(xs, lower, strict=True)))]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(frame.place, edge))
        svg.append(f'<polygon class="{escape(area.css)}" points="{path}"><title>{escape(area.name)}</title></polygon>')
    svg += [_drawn(line, [frame.place(point) for point in line.points]) for line in lines if line.points]
    svg += _spans(frame, sections)
    if peak is not None:
        x, y = frame.place(peak[0])
        side, anchor = (-10, "end") if x > _WIDTH / 2 else (10, "start")
        svg.append(f'<circle class="peak" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>')
        svg.append(f'<text class="peak" x="{x + side:.1f}" y="{y + 4:.1f}" text-anchor="{anchor}">{escape(peak[1])}</text>')
    return Markup("\n".join([*svg, "</svg>"]))


@dataclass(frozen=True, kw_only=True)
class Lane:
    """What one stream did: from, to, and what it was."""

    name: str
    css: str
    marks: Sequence[tuple[float, float, str]]


def lane_chart(lanes: Sequence[Lane], *, title: str, x_label: str, end: float) -> Markup:
    """Streams one below the other, from 0 to `end`."""
    left, high = 104, 34
    floor = _TOP + high * len(lanes)
    scale = (_RIGHT - left) / (end or 1.0)
    svg = [f'<svg class="chart" viewBox="0 0 {_WIDTH} {floor + 40}" role="img" aria-label="{escape(title)}">']
    for number, lane in enumerate(lanes):
        top = _TOP + high * number
        svg.append(f'<text class="label" x="{left - 10}" y="{top + 18}" text-anchor="end">{escape(lane.name)}</text>')
        svg += [
            f'<rect class="{escape(lane.css)}" x="{left + scale * first:.1f}" width="{max(scale * (last - first), 0.5):.1f}" '
            f'y="{top + 4}" height="{high - 10}"><title>{escape(what)}, {last - first:.4g} s</title></rect>'
            for first, last, what in lane.marks
        ]
    svg.append(f'<line class="axis" x1="{left}" x2="{_RIGHT}" y1="{floor}" y2="{floor}"/>')
    ticks = nice_ticks(0.0, end, 8)
    for tick in ticks:
        if tick <= end:
            x = left + scale * tick
            svg.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{floor}" y2="{floor + 5}"/>')
            label = tick_label(tick, ticks[1] - ticks[0])
            svg.append(f'<text class="tick" x="{x:.1f}" y="{floor + 19}" text-anchor="middle">{label}</text>')
    svg.append(f'<text class="label" x="{_RIGHT}" y="{floor + 35}" text-anchor="end">{escape(x_label)}</text>')
    return Markup("\n".join([*svg, "</svg>"]))


def _spans(frame: _Frame, sections: Sequence[tuple[str, float, float]]) -> list[str]:
    """Where each section begins, and its name where it has room."""
    floor, out = frame.height - 42, []
    for name, first, end in sections:
        left, right = (frame.place((x, frame.y_ticks[0]))[0] for x in (first, end))
        out.append(f'<line class="section" x1="{left:.1f}" x2="{left:.1f}" y1="{_TOP}" y2="{floor + 5}"/>')
        if right - left > _LETTER * len(name):
            middle = (left + right) / 2
            out.append(f'<text class="label" x="{middle:.1f}" y="{floor + 19}" text-anchor="middle">{escape(name)}</text>')
    out.append(f'<line class="axis" x1="{_LEFT}" x2="{_RIGHT}" y1="{floor}" y2="{floor}"/>')
    return out


def _levels(frame: _Frame) -> list[str]:
    """A line and a number for every tick upwards."""
    step, out = frame.y_ticks[1] - frame.y_ticks[0], []
    for tick in frame.y_ticks:
        y = frame.place((frame.x_low, tick))[1]
        out.append(f'<line class="grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text class="tick" x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick_label(tick, step)}</text>')
    return out


def _axes(frame: _Frame, x_label: str, y_label: str, *, whole: bool) -> list[str]:
    low, high, floor = frame.x_low, frame.x_high, frame.height - 42
    x_ticks = nice_ticks(low, high, 8) if low < high else [low, low + 1]
    x_step = max(x_ticks[1] - x_ticks[0], float(whole))
    out = _levels(frame)
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
