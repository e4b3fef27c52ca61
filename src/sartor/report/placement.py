"""What a step of a placed model did when: memory of every tier, and the streams side by side."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from sartor.placement.timeline import STREAMS, Timeline
from sartor.report.svg import Lane, Series, area_chart, lane_chart

_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("bytes", 1))
_COLOURS = {"compute": "weights", "update": "optimizer", "fetch": "activations", "write back": "gradients"}
MOST_MARKS = 400
"""Of a stream; copies that follow one another closely are drawn as one."""


def placement_picture(timeline: Timeline | None) -> dict[str, Any]:
    """What the template shows: charts (empty where nothing was placed), their keys, and the same in words."""
    if timeline is None or not timeline.levels:
        return {"placement_memory": Markup(), "placement_streams": Markup(), "placement_keys": (), "placement_words": ""}
    lower = f"lives on {' and '.join(timeline.tiers)}"
    keys = [("weights", "stays in memory"), ("gradients", "brought into memory"), ("measured", lower)]
    return {
        "placement_memory": _memory(timeline, lower),
        "placement_streams": lane_chart(_lanes(timeline), title="Streams over a step", x_label="seconds", end=timeline.seconds),
        "placement_keys": keys,
        "placement_words": timeline.describe(),
    }


def _memory(timeline: Timeline, lower: str) -> Markup:
    most = max(timeline.kept_bytes + level.device + level.lower for level in timeline.levels)
    unit, size = next(entry for entry in _UNITS if most >= entry[1] or entry[1] == 1)
    moments: list[tuple[float, int, int]] = []
    for level in timeline.levels:  # what was before holds until then
        if moments:
            moments.append((level.seconds, *moments[-1][1:]))
        moments.append((level.seconds, level.device, level.lower))
    moments.append((timeline.seconds, *moments[-1][1:]))
    kept = [(seconds, timeline.kept_bytes / size) for seconds, _, _ in moments]
    areas = [
        Series(name="stays in memory", css="weights", points=kept),
        Series(name="brought into memory", css="gradients", points=[(seconds, device / size) for seconds, device, _ in moments]),
        Series(name=lower, css="measured", points=[(seconds, away / size) for seconds, _, away in moments]),
    ]
    update = min((span.start for span in timeline.spans if span.stream == "update"), default=timeline.seconds)
    first = moments[0][0]
    sections = [("forward and backward", first, update), ("update", update, timeline.seconds)]
    return area_chart(areas, title="Memory of every tier over a step", y_label=unit, sections=sections, height=260)


def _lanes(timeline: Timeline) -> list[Lane]:
    lanes = []
    for stream in STREAMS:
        marks: list[tuple[float, float, str]] = []
        apart = timeline.seconds / MOST_MARKS
        for span in sorted((span for span in timeline.spans if span.stream == stream), key=lambda span: span.start):
            if marks and span.start - marks[-1][1] < apart and (not span.name or len(marks) > MOST_MARKS):
                marks[-1] = (marks[-1][0], max(marks[-1][1], span.end), marks[-1][2])
            else:
                marks.append((span.start, span.end, span.name or stream))
        lanes.append(Lane(name=stream, css=_COLOURS[stream], marks=marks))
    return lanes
