"""Points of a curve: those that can be drawn, few of them, and their trend."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

Point = tuple[float, float]

_LARGEST = 1e100


def finite(points: Iterable[tuple[object, object]]) -> list[Point]:
    """The points that can be drawn: numbers, neither infinite nor NaN."""
    numbers = [(float(x), float(y)) for x, y in points if isinstance(x, int | float) and isinstance(y, int | float)]
    return [(x, y) for x, y in numbers if abs(x) < _LARGEST and abs(y) < _LARGEST]


def thin(points: Sequence[Point], most: int = 600) -> list[Point]:
    """At most `most` (an even number) points that keep every spike: the lowest and highest of equally many neighbours."""
    if len(points) <= most:
        return list(points)
    kept: list[Point] = []
    buckets = most // 2
    for bucket in range(buckets):
        part = points[bucket * len(points) // buckets : (bucket + 1) * len(points) // buckets]
        kept += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return kept


def smooth(points: Sequence[Point], span: int) -> list[Point]:
    """Mean over `span` neighbours, as many before as after; narrower at the ends, so that no end is pulled inwards."""
    sums = list(accumulate((y for _, y in points), initial=0.0))
    line = []
    for place, (x, _) in enumerate(points):
        reach = min(span // 2, place, len(points) - 1 - place)
        line.append((x, (sums[place + reach + 1] - sums[place - reach]) / (2 * reach + 1)))
    return line
