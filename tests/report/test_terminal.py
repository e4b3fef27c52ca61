"""What the terminal says, with colours and without."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from sartor.plan import Plan
from sartor.report import Progress, show_machine, show_plan, show_run
from sartor.train import Answer, EvalRecord, Run, StepRecord


def plain(show: Any, *things: Any, width: int = 80, **options: Any) -> str:
    file = io.StringIO()
    show(*things, Console(file=file, width=width, color_system=None, **options))
    return file.getvalue()


def one_line(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_plan_says_what_matters_and_keeps_the_width(plan: Plan, width: int) -> None:
    text = plain(show_plan, plan, width=width)
    said = one_line(text)
    for words in ("models/small", "1.24B parameters", "11.3M parameters train (0.90%)", "860 samples", "12 truncated at 512"):
        assert words in said
    assert "fits: needs 9.00 GiB of 12.0 GiB (75.0%)" in said
    assert "peak in forward and backward" in said
    assert "micro-batch 16: does not fit: needs 14.2 GiB" in said
    assert "W weights 3.00 GiB" in said
    assert "\x1b" not in text
    assert max(cell_len(line) for line in text.splitlines()) <= width


def test_the_bar_is_to_scale_without_colours(plan: Plan) -> None:
    bar = next(line.strip() for line in plain(show_plan, plan).splitlines() if "PW" in line)
    bar = bar.removeprefix("memory").strip()
    assert [bar.count(letter) / len(bar) for letter in "WGOA·"] == pytest.approx(
        [3 / 12, 1 / 12, 2 / 12, 2 / 12, 3 / 12], abs=0.02
    )


def test_a_bar_much_shorter_than_the_memory_is_enlarged(make: SimpleNamespace) -> None:
    said = one_line(plain(show_plan, make.plan(forecast=make.forecast(available=500 * 2**30))))
    assert "of which P" in said
    assert "#·" in said


def test_more_than_there_is_fills_the_bar(make: SimpleNamespace) -> None:
    text = plain(show_plan, make.plan(forecast=make.forecast("does not fit", available=6 * 2**30)))
    assert "does not fit" in text
    assert "·" not in text


def test_the_smallest_part_is_seen(make: SimpleNamespace) -> None:
    forecast = make.forecast()
    peak = dataclasses.replace(forecast.peak, by_kind={**forecast.peak.by_kind, "gradients": 1})
    lines = plain(show_plan, make.plan(forecast=dataclasses.replace(forecast, peak=peak))).splitlines()
    assert any("WGO" in line for line in lines)


def test_no_forecast_gives_its_reason(make: SimpleNamespace) -> None:
    said = one_line(plain(show_plan, make.plan(forecast=make.forecast("cannot say"))))
    assert "cannot say: this model's step cannot be traced (ValueError: <odd>)" in said


@pytest.mark.parametrize("width", [60, 80, 120])
def test_memory_over_a_step_is_a_picture_to_scale(make: SimpleNamespace, width: int) -> None:
    lines = plain(show_plan, make.plan(forecast=make.forecast(available=500 * 2**30)), width=width).splitlines()
    top = next(number for number, line in enumerate(lines) if "▼ peak 8.00 GiB" in line or "peak 8.00 GiB ▼" in line)
    chart = [line.partition("│")[2] for line in lines[top + 1 : top + 8]]
    assert lines[top + 8].strip().startswith("└┴")
    assert "forward" in lines[top + 9]
    at = lines[top].index("▼") - lines[top + 1].index("│") - 1
    assert 0.6 < at / len(chart[0]) < 0.9, "the peak is three quarters of the way"
    assert "".join(line[at] for line in reversed(chart)) == "WWWGOAA"
    assert chart[0].strip(" A") == ""
    assert set(chart[-1]) <= {"W"}, "weights never leave"
    said = one_line("\n".join(lines))
    assert "peak in loss and backward, near model.layers.*.mlp; most of it weights" in said


def test_the_limit_is_drawn_where_it_is_in_range(make: SimpleNamespace) -> None:
    near, far = make.plan(forecast=make.forecast()), make.plan(forecast=make.forecast(available=500 * 2**30))
    assert "11.0 GiB │╌╌" in plain(show_plan, near)
    assert "there is 11.0 GiB for them" in one_line(plain(show_plan, near))
    assert "╌" not in plain(show_plan, far)
    beyond = plain(show_plan, make.plan(forecast=make.forecast("does not fit", available=6 * 2**30)))
    assert "5.00 GiB │" in beyond


def test_the_picture_in_colours_uses_eighths(plan: Plan) -> None:
    file = io.StringIO()
    show_plan(plan, Console(file=file, width=80, force_terminal=True, color_system="truecolor"))
    assert set("▁▂▃▄▅▆▇") & set(file.getvalue())


def test_there_is_no_picture_where_there_is_no_room(plan: Plan) -> None:
    assert "▼" not in plain(show_plan, plan, width=38)


@pytest.mark.parametrize("verdict", ["fits", "tight", "does not fit", "cannot say"])
def test_verdicts_have_colours(verdict: str, make: SimpleNamespace) -> None:
    file = io.StringIO()
    show_plan(make.plan(forecast=make.forecast(verdict)), Console(file=file, force_terminal=True, color_system="truecolor"))
    assert "\x1b[1;3" in file.getvalue()
    assert verdict in file.getvalue()


def test_a_run_shows_the_forecast_beside_the_measurement(run: Run) -> None:
    said = one_line(plain(show_run, run))
    assert "held-out loss 4.512 → 0.513" in said
    assert "exact match 0% → 67%" in said
    assert "9.00 GiB forecast, 9.20 GiB measured (peak resident memory of the process): 2.2% too low" in said
    assert "sartor chat runs/first" in said
    assert said.count("(exact)") == 2
    assert "Answer 3" in said
    assert "Answer 4" not in said


def test_a_run_without_anything_held_out(run: Run, make: SimpleNamespace) -> None:
    nothing: dict[str, Any] = dict.fromkeys(("first_eval_loss", "last_eval_loss", "exact_match_before", "exact_match_after"))
    said = one_line(plain(show_run, make.run(**nothing, answers=())))
    assert "training loss 4.610 → 0.420" in said
    assert "exact match" not in said
    plain(show_run, make.run(**nothing, answers=(), first_loss=None, last_loss=None))


def test_data_cannot_write_escapes_or_markup(make: SimpleNamespace) -> None:
    answer = Answer(prompt="\x1b[2Jclear [red]me[/red]", reference="[/]", before="\x9b1m", after="[/]")
    text = plain(show_run, make.run(answers=(answer,)))
    assert "\x1b" not in text
    assert "\x9b" not in text
    assert "[red]me[/red]" in text


def test_a_machine_names_its_devices(make: SimpleNamespace) -> None:
    said = one_line(plain(show_machine, make.machine(accelerators=2)))
    assert "8 cores, avx2 avx512f" in said
    assert "cuda:1 NVIDIA H200, 138 GiB available of 139 GiB" in said
    assert "accelerators none" in one_line(plain(show_machine, make.machine()))


def drive(progress: Progress, steps: int, make: SimpleNamespace, *, first: int = 0) -> None:
    progress.said("going [on]")
    progress.started(first, steps)
    progress.evaluated(EvalRecord(step=0, eval_loss=4.5, eval_tokens=9))
    for line in make.metrics(steps):
        if "loss" in line and line["step"] > first:
            record = {"epoch": 0.5, "grad_norm": 1.0, "tokens": 100, "trained_tokens": 50, **line}
            progress.stepped(StepRecord(**record))
    progress.saved(Path("runs/first/checkpoint-9"))
    progress.evaluated(EvalRecord(step=steps, eval_loss=0.5, eval_tokens=9))


@pytest.mark.parametrize("steps", [1, 7, 161, 5000])
def test_a_log_gets_few_plain_lines(steps: int, make: SimpleNamespace) -> None:
    file = io.StringIO()
    with Progress(Console(file=file, width=40)) as progress:
        drive(progress, steps, make)
        progress.finished(make.run())
    lines = file.getvalue().splitlines()
    assert "\x1b" not in file.getvalue()
    assert lines[0] == "going [on]"
    assert "held-out loss before training: 4.500" in lines
    assert f"held-out loss after step {steps}: 0.500" in lines
    told = [line for line in lines if line.startswith("step ")]
    assert min(steps, 20) <= len(told) <= 50
    assert f"step {steps}/{steps}  loss " in told[-1]
    assert "tokens/s" in told[-1]


def test_a_resumed_log_starts_where_it_goes_on(make: SimpleNamespace) -> None:
    file = io.StringIO()
    with Progress(Console(file=file)) as progress:
        drive(progress, 100, make, first=60)
    assert "step 61/100" in file.getvalue()


def test_a_terminal_gets_a_bar_and_its_cursor_back(make: SimpleNamespace) -> None:
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True, legacy_windows=False, _environ={"TERM": "xterm-256color"})
    with contextlib.suppress(KeyboardInterrupt), Progress(console) as progress:
        drive(progress, 50, make)
        raise KeyboardInterrupt
    text = file.getvalue()
    assert "50/50" in text
    assert "4.500" in text
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") >= 0
