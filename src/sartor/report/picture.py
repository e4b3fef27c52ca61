"""Memory over the step on the terminal: a few lines of stacked blocks, or of letters where there are no colours."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, groupby, pairwise
from operator import itemgetter

from rich.console import Group, RenderableType
from rich.text import Text

from sartor.job.units import format_bytes
from sartor.predict.timeline import Section, Timeline
from sartor.report import facts

ROWS = 7
FEWEST_COLUMNS = 24
Styles = dict[str, tuple[str, str]]
"""Letter and colour of a kind."""

_EIGHTHS = " ▁▂▃▄▅▆▇█"
_GUTTER = 10
_LIMIT, _LIMIT_STYLE = "╌", "red"
_SHORT = {"loss and backward": "backward"}


def timeline_picture(timeline: Timeline, room_bytes: int, width: int, styles: Styles, *, colours: bool) -> RenderableType:
    """The chart, `width` wide; nothing where that is too narrow. `room_bytes`: what there is for tensors."""
    count = width - _GUTTER
    if count < FEWEST_COLUMNS:
        return Text()
    limit = facts.limit_in_range(timeline, room_bytes)
    top = max(timeline.peak_bytes, limit or 0, 1)
    columns = timeline.columns(count)
    stacks = [list(accumulate(size * ROWS / top for size in column)) for column in columns]
    limit_row = None if limit is None else min(int(limit * ROWS / top), ROWS - 1)
    kinds = [styles.get(kind, ("?", "white")) for kind in timeline.kinds]
    lines = [_marker(timeline, columns)]
    for row in reversed(range(ROWS)):
        label = format_bytes(limit) if limit is not None and row == limit_row else "0" if row == 0 else ""
        line = Text.assemble((f"{label:>{_GUTTER - 2}} │", "dim"), no_wrap=True, overflow="crop")
        empty = (_LIMIT, _LIMIT_STYLE) if row == limit_row else (" ", "")
        cells = [_cell(stack, row, kinds, colours=colours) or empty for stack in stacks]
        for style, run in groupby(cells, key=itemgetter(1)):
            line.append("".join(letter for letter, _ in run), style=style)
        lines.append(line)
    lines += [*_axis(timeline, count), Text(facts.timeline_words(timeline, limit), style="dim")]
    return Group(*lines)


def _cell(stack: Sequence[float], row: int, styles: Sequence[tuple[str, str]], *, colours: bool) -> tuple[str, str] | None:
    """One character and its style: with colours, the kind at its bottom, to an eighth, over the one that fills most of the
    rest; without, the letter of the kind in its middle. None where it is empty."""
    if not colours:
        kind = next((kind for kind, edge in enumerate(stack) if edge >= row + 0.5 - 1e-9), None)
        return None if kind is None else (styles[kind][0], "")
    edges = [0, *(min(max(round(8 * (edge - row)), 0), 8) for edge in stack), 8]
    filled = [high - low for low, high in pairwise(edges)]  # the last one is what stays empty
    bottom = next(kind for kind, size in enumerate(filled) if size)
    if bottom == len(styles):
        return None
    upper = max(range(bottom + 1, len(filled)), key=filled.__getitem__)
    size = filled[bottom]
    behind = f" on {styles[upper][1]}" if size < 8 and upper < len(styles) else ""
    return _EIGHTHS[size], styles[bottom][1] + behind


def _marker(timeline: Timeline, columns: Sequence[Sequence[float]]) -> Text:
    """Where the peak is, and how high."""
    totals = [sum(column) for column in columns]
    at = totals.index(max(totals))
    words = f"peak {format_bytes(timeline.peak_bytes)}"
    left = at > len(columns) - len(words) - 2
    text = " " * (at - len(words) - 1) + words + " ▼" if left else " " * at + "▼ " + words
    return Text(" " * _GUTTER + text, style="bold", no_wrap=True, overflow="crop")


def _axis(timeline: Timeline, count: int) -> list[Text]:
    """Where each section begins, and its name where there is room for it."""
    marks, names = ["─"] * count, [" "] * count

    def places(section: Section) -> range:
        return range(min(round(section.first * count), count - 1), max(round(section.end * count), 1))

    for section in timeline.sections:
        span = places(section)
        marks[span.start] = "┴"
        fitting = (name for name in (section.name, _SHORT.get(section.name, "")) if 0 < len(name) < len(span))
        for place, letter in enumerate(next(fitting, ""), span.start):
            names[place] = letter
    gutter = " " * (_GUTTER - 1)
    return [Text(f"{gutter}└{''.join(marks)}", style="dim"), Text(f"{gutter} {''.join(names)}".rstrip(), style="dim")]
