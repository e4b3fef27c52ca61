"""A plan and a run on the terminal; without colours everything is said in words and letters as well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from sartor.job.units import format_bytes, format_seconds
from sartor.plan import Plan
from sartor.predict import MemoryForecast
from sartor.report import facts
from sartor.report.picture import timeline_picture

if TYPE_CHECKING:
    from sartor.train.record import Answer, Run

VERDICT_STYLES = {"fits": "bold green", "tight": "bold yellow", "does not fit": "bold red", "cannot say": "bold magenta"}
_PART_STYLES = {
    facts.BASELINE: ("P", "grey62"),
    facts.ALLOCATOR: ("L", "grey42"),
    "weights": ("W", "dodger_blue2"),
    "gradients": ("G", "dark_orange"),
    "optimizer": ("O", "medium_purple"),
    "activations": ("A", "dark_cyan"),
    "cache": ("C", "gold3"),
}
_PART_STYLES |= {verdict: ("#", style) for verdict, style in VERDICT_STYLES.items()}
_FREE, _FREE_STYLE = "·", "grey42"
_WIDEST = 110
_MOST_REJECTED = 5
_MOST_ANSWERS = 3
_ANSWER_LENGTH = 280
_SMALL_SHARE = 0.3
"""Below this share of the bar its parts cannot be told apart: they get a bar of their own."""


def show_plan(plan: Plan, console: Console) -> None:
    """What will run, whether it fits and why, and what else was considered."""
    rows: list[tuple[str, RenderableType]] = [(name, Text(value)) for name, value in facts.plan_facts(plan)]
    room = _width(console) - max(len(name) for name, _ in rows) - 4
    rows.append(("memory", _memory(plan.forecast, room, colours=_colours(console))))
    if plan.rejected:
        shown = [
            Text(f"{facts.differences(plan.strategy, other.strategy)}: {facts.visible(other.reason)}", style="dim")
            for other in plan.rejected[:_MOST_REJECTED]
        ]
        if len(plan.rejected) > _MOST_REJECTED:
            shown.append(Text(f"and {len(plan.rejected) - _MOST_REJECTED} more", style="dim"))
        rows.append(("rejected", Group(*shown)))
    rows += [("note", Text(facts.visible(note), style="yellow")) for note in (*plan.notes, *plan.data.notes)]
    _print(console, Text("Plan", style="bold"), _table(rows))


def show_run(run: Run, console: Console) -> None:
    """What came of a run: the result, the forecast beside the measurement, and where everything is."""
    done = run.status == "finished"
    title = Text.assemble(
        (facts.visible(run.status).capitalize(), "bold green" if done else "bold yellow"),
        f" {run.steps:,} of {run.total_steps:,} steps in {format_seconds(run.seconds)}",
    )
    rows: list[tuple[str, RenderableType]] = []
    if held_out := facts.change(run.first_eval_loss, run.last_eval_loss):
        rows.append(("held-out loss", _after_arrow(held_out)))
    elif losses := facts.change(run.first_loss, run.last_loss):
        rows.append(("training loss", _after_arrow(losses)))
    if matches := facts.change(run.exact_match_before, run.exact_match_after, ".0%"):
        rows.append(("exact match", _after_arrow(matches)))
    rows.append(("speed", Text(f"{run.tokens_per_second:,.0f} tokens/s, {run.tokens:,} tokens")))
    rows.append(("memory", Text(facts.visible(facts.memory_words(run.memory)))))
    if run.time is not None:
        rows.append(("time", Text(facts.run_time_words(run.time))))
    rows.append(("result", Text(facts.visible(f"{run.folder} ({run.checkpoint})"), overflow="fold")))
    _print(console, title, _table(rows))
    for number, answer in enumerate(run.answers[:_MOST_ANSWERS], 1):
        _print(console, Text(f"Answer {number}", style="bold"), _answer(answer))
    if done:
        tries = Text("\n").join(Text(command, style="cyan", overflow="fold") for command in facts.commands(run))
        _print(console, Text("Try it", style="bold"), tries)


def _print(console: Console, title: Text, body: RenderableType) -> None:
    console.print(title, Padding(body, (0, 0, 1, 2)), width=_width(console), highlight=False)


def _table(rows: Sequence[tuple[str, RenderableType]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def _width(console: Console) -> int:
    return min(console.width, _WIDEST)


def _colours(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


def _memory(forecast: MemoryForecast, width: int, *, colours: bool) -> RenderableType:
    """Verdict, bar of the available memory, and the parts with their sizes."""
    verdict = Text.assemble((forecast.verdict, VERDICT_STYLES[forecast.verdict]), f": {facts.visible(forecast.reason)}")
    parts, needed = facts.memory_parts(forecast), forecast.process_bytes
    if needed is None or not parts:
        return verdict
    share = facts.percent(needed, forecast.available_bytes)
    moment = facts.peak_moment(forecast)
    verdict.append(f" ({share})" + (f", {moment}" if moment else ""))
    lines: list[RenderableType] = [verdict]
    if needed < _SMALL_SHARE * forecast.available_bytes:
        used = facts.Part(key=forecast.verdict, name="used", size_bytes=needed)
        lines += [_bar([used], forecast.available_bytes, width, colours=colours), Text("of which", style="dim")]
        lines += [_bar(parts, needed, width, colours=colours)]
    else:
        lines += [_bar(parts, max(needed, forecast.available_bytes), width, colours=colours)]
    lines.append(_legend(parts, colours=colours))
    if tiers := facts.tiers(forecast):
        lines.append(Text("; ".join(f"{name} {size}" for name, size in tiers)))
    if makers := facts.owners(forecast):
        lines.append(Text(f"made by {makers}", style="dim"))
    if forecast.timeline is not None:
        room = facts.tensor_room(forecast)
        lines += [Text(), timeline_picture(forecast.timeline, room, width, _PART_STYLES, colours=colours)]
    return Group(*lines)


def _bar(parts: Sequence[facts.Part], whole_bytes: int, width: int, *, colours: bool) -> Text:
    """The parts drawn to scale on a bar that stands for `whole_bytes`; letters where there are no colours."""
    scale = width / max(whole_bytes, 1)
    filled = max(round(scale * sum(part.size_bytes for part in parts)), len(parts))
    # What there is is never invisible; the largest part pays for what rounding adds.
    cells = [max(round(scale * part.size_bytes), 1) for part in parts]
    cells[cells.index(max(cells))] -= sum(cells) - filled
    bar = Text(no_wrap=True, overflow="crop")
    for part, count in zip(parts, cells, strict=True):
        letter, style = _PART_STYLES.get(part.key, ("?", "white"))
        bar.append(("█" if colours else letter) * count, style=style)
    return bar.append(_FREE * (width - filled), style=_FREE_STYLE)


def _legend(parts: Sequence[facts.Part], *, colours: bool) -> Columns:
    labels = []
    for part in parts:
        letter, style = _PART_STYLES.get(part.key, ("?", "white"))
        words = f" {part.name} {format_bytes(part.size_bytes)}"
        labels.append(Text.assemble(("■" if colours else letter, style), words, no_wrap=True))
    return Columns(labels, padding=(0, 2))


def _after_arrow(text: str) -> Text:
    """`before → after` with the outcome in bold."""
    before, arrow, after = text.rpartition("→")
    return Text.assemble(before + arrow, (after, "bold"))


def _answer(answer: Answer) -> Table:
    exact = facts.is_exact(answer.after, answer.reference)
    after = Text.assemble((_short(answer.after), "green" if exact else ""), (" (exact)" if exact else "", "bold green"))
    return _table(
        [
            ("prompt", Text(_short(answer.prompt), style="dim")),
            ("expected", Text(_short(answer.reference))),
            ("before", Text(_short(answer.before))),
            ("after", after),
        ]
    )


def _short(text: str) -> str:
    text = facts.visible(" ".join(text.split()))
    return text if len(text) <= _ANSWER_LENGTH else text[: _ANSWER_LENGTH - 1] + "…"
