"""The run as one self-contained page: no script, no network, light and dark, printable."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from sartor.job.units import format_bytes, format_seconds
from sartor.placement.timeline import Timeline
from sartor.plan import Plan
from sartor.report import facts
from sartor.report.curves import Point, finite, smooth, thin
from sartor.report.page import Bar, Headline, Segment, available_words, forecast_bar, legend, render, step_picture, title_of
from sartor.report.placement import placement_picture
from sartor.report.svg import Series, line_chart
from sartor.train.folder import write_text
from sartor.train.record import Run

_LONG_TEXT = 360
_OPEN_ANSWERS = 8
_MOST_ANSWERS = 200
_FEWEST_SMOOTHED = 12


def write_report(
    plan: Plan, run: Run, metrics: Sequence[dict[str, Any]], path: Path, *, timeline: Timeline | None = None
) -> None:
    """Write `report.html` at `path`, whole or not at all. `metrics`: the lines of metrics.jsonl; `timeline`: of a step of a
    placed model. Raises RunError."""
    losses, held_out = _column(metrics, "loss"), _column(metrics, "eval_loss")
    parts = facts.memory_parts(plan.forecast)
    page = render(
        "report.html.jinja",
        plan=plan,
        run=run,
        title=title_of(plan.job.model.path),
        headlines=_headlines(plan, run),
        loss_chart=_loss_chart(losses, held_out),
        smoothed=len(losses) >= _FEWEST_SMOOTHED,
        has_losses=bool(losses),
        has_held_out=bool(held_out),
        speed_chart=_speed_chart(_column(metrics, "tokens_per_second")),
        bars=_memory_bars(plan, run),
        legend=legend(parts),
        **step_picture(plan.forecast),
        **placement_picture(timeline),
        memory_words=facts.memory_words(run.memory),
        run_time_words=None if run.time is None else facts.run_time_words(run.time),
        available=available_words(plan.forecast),
        facts=facts.plan_facts(plan),
        machine=facts.machine_facts(plan.machine),
        rejected=[(facts.differences(plan.strategy, other.strategy), other.reason) for other in plan.rejected],
        notes=[*plan.notes, *plan.data.notes],
        answers=run.answers[:_MOST_ANSWERS],
        open_answers=_OPEN_ANSWERS,
        is_exact=facts.is_exact,
        long_text=_LONG_TEXT,
        commands=facts.commands(run),
        snippet=facts.snippet(plan, run),
        duration=format_seconds(run.seconds),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)


def _column(metrics: Sequence[dict[str, Any]], name: str) -> list[Point]:
    return finite((line.get("step"), line[name]) for line in metrics if name in line)


def _headlines(plan: Plan, run: Run) -> list[Headline]:
    """What a reader wants to know first; what is not known has no place here."""
    shown = []
    if run.last_eval_loss is not None:
        shown.append(_number("held-out loss", run.first_eval_loss, run.last_eval_loss, ".3f", "nats per token"))
    elif run.last_loss is not None:
        shown.append(_number("training loss", run.first_loss, run.last_loss, ".3f", "nats per token, first and last step"))
    if run.exact_match_after is not None:
        prompts = "held-out prompts" if plan.data.held_out_samples else "training prompts"
        note = f"of {len(run.answers):,} {prompts}" if run.answers else prompts
        shown.append(_number("exact match", run.exact_match_before, run.exact_match_after, ".0%", note))
    shown.append(Headline(label="speed", value=f"{run.tokens_per_second:,.0f}", note="tokens per second"))
    shown.append(
        Headline(label="duration", value=format_seconds(run.seconds), note=f"{run.steps:,} of {run.total_steps:,} steps")
    )
    memory = run.memory
    if memory.error_percent is not None:
        sign = "−" if memory.error_percent < 0 else "+"
        value = f"{sign}{abs(memory.error_percent):.1f}%"
        shown.append(
            Headline(label="memory forecast", value=value, note=f"against {format_bytes(memory.measured_bytes)} measured")
        )
    else:
        shown.append(Headline(label="memory", value=format_bytes(memory.measured_bytes), note="measured; no forecast"))
    return shown


def _number(label: str, before: float | None, after: float, form: str, note: str) -> Headline:
    return Headline(label=label, before="" if before is None else f"{before:{form}}", value=f"{after:{form}}", note=note)


def _span(points: Sequence[Point]) -> int:
    return max(7, len(points) // 25)


def _loss_chart(losses: list[Point], held_out: list[Point]) -> Markup:
    enough = len(losses) >= _FEWEST_SMOOTHED
    line = smooth(losses, _span(losses)) if enough else []
    series = [
        Series(name="training loss", css="raw" if enough else "line", points=thin(losses)),
        Series(name="smoothed", css="line", points=thin(line)),
        Series(name="held-out loss", css="held", points=thin(held_out)),
        Series(name="held-out loss", css="held", points=thin(held_out, 60), mark="dots"),
    ]
    return line_chart(series, title="Loss by step", x_label="step", y_label="loss, nats per token")


def _speed_chart(speeds: list[Point]) -> Markup:
    enough = len(speeds) >= _FEWEST_SMOOTHED
    series = [
        Series(name="tokens per second", css="raw" if enough else "line", points=thin(speeds)),
        Series(name="smoothed", css="line", points=thin(smooth(speeds, _span(speeds)) if enough else [])),
    ]
    return line_chart(series, title="Speed by step", x_label="step", y_label="tokens per second", height=210, from_zero=True)


def _memory_bars(plan: Plan, run: Run) -> list[Bar]:
    """Forecast above measurement, on one scale."""
    measured, parts = run.memory.measured_bytes, facts.memory_parts(plan.forecast)
    scale = max(sum(part.size_bytes for part in parts), measured, 1)
    share = round(100 * measured / scale, 2)
    one = Segment(css="measured", name=run.memory.measured_name, size=format_bytes(measured), share=share)
    bars = [forecast_bar("forecast", parts, scale)] if parts else []
    return [*bars, Bar(name="measured", total=format_bytes(measured), segments=(one,))]
