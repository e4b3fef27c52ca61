"""Ticks, thinning and smoothing."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sartor.report.curves import finite, smooth, thin
from sartor.report.svg import Series, area_chart, line_chart, nice_ticks, tick_label

numbers = st.floats(-1e12, 1e12, allow_nan=False).filter(lambda value: value == 0 or abs(value) > 1e-9)


@given(numbers, numbers)
def test_ticks_are_round_and_enclose(a: float, b: float) -> None:
    low, high = sorted((a, b))
    ticks = nice_ticks(low, high)
    slack = 1e-6 * max(abs(low), abs(high), 1e-9)
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= 12


def test_ticks_people_would_choose() -> None:
    assert nice_ticks(0.3, 4.6) == [0, 1, 2, 3, 4, 5]
    assert [tick_label(tick, 0.2) for tick in nice_ticks(1.05, 1.9)] == ["1.0", "1.2", "1.4", "1.6", "1.8", "2.0"]
    assert tick_label(20_000, 5_000) == "20K"


def test_thinning_keeps_spikes_ends_and_order() -> None:
    points = [(float(x), math.sin(x)) for x in range(100_000)]
    points[54_321] = (54_321.0, 99.0)
    kept = thin(points)
    assert len(kept) <= 600
    assert (54_321.0, 99.0) in kept
    assert kept == sorted(kept)
    assert thin(points[:600]) == points[:600]


def test_smoothing_keeps_lines_straight() -> None:
    line = [(float(x), 3.0 * x) for x in range(50)]
    assert [y for _, y in smooth(line, 9)] == pytest.approx([y for _, y in line])
    assert smooth([], 9) == []
    assert smooth([(1.0, 2.0)], 9) == [(1.0, 2.0)]


def test_only_finite_numbers_are_drawn() -> None:
    assert finite([(1, 2.0), (2, math.nan), (None, 1.0), (3, math.inf), (4, "x")]) == [(1.0, 2.0)]


def test_steps_are_whole_on_the_axis() -> None:
    chart = line_chart([Series(name="a", css="line", points=[(1.0, 1.0), (2.0, 3.0)])], title="<t>", x_label="step", y_label="y")
    assert ">1</text>" in chart
    assert ">1.2</text>" not in chart
    assert "&lt;t&gt;" in chart
    assert line_chart([], title="", x_label="", y_label="") == ""


def test_areas_stand_on_each_other_and_a_narrow_section_stays_nameless() -> None:
    chart = area_chart(
        [
            Series(name="a", css="weights", points=[(0.0, 1.0), (1.0, 1.0)]),
            Series(name="b", css="activations", points=[(0.0, 0.0), (1.0, 3.0)]),
        ],
        title="<t>",
        y_label="GiB",
        sections=[("forward", 0.0, 0.99), ("update", 0.99, 1.0)],
        peak=((1.0, 4.0), "peak 4 <GiB>"),
    )
    lower, upper = (
        [tuple(map(float, pair.split(","))) for pair in points.split()]
        for points in re.findall(r'<polygon.*?points="([^"]*)"', chart)
    )
    assert lower[:2] == upper[3:1:-1], "the upper area begins where the lower ends"
    (_, floor), (_, top) = lower[-1], upper[1]
    assert (floor - lower[0][1]) * 4 == pytest.approx(floor - top, abs=0.5)
    assert ">forward</text>" in chart
    assert ">update</text>" not in chart
    assert "peak 4 &lt;GiB&gt;" in chart
    assert "&lt;t&gt;" in chart
