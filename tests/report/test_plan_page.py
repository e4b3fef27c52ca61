"""The plan's page: everything a plan says, self-contained, whatever is missing."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from sartor.errors import UsageError
from sartor.plan import Plan
from sartor.report import write_plan
from support import PageChecker


def written(tmp_path: Path, plan: Plan) -> tuple[str, PageChecker]:
    path = tmp_path / "new" / "plan.html"
    write_plan(plan, path)
    html = path.read_text(encoding="utf-8")
    checker = PageChecker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    assert not re.search(r"https?://|//[a-z]+\.|url\(|@import|\bnan\b|\binf\b", html, re.IGNORECASE)
    assert list(path.parent.iterdir()) == [path]
    return html, checker


def text_of(checker: PageChecker) -> str:
    return " ".join(" ".join(checker.text).split())


def test_a_page_says_what_the_plan_says(tmp_path: Path, plan: Plan) -> None:
    peak = dataclasses.replace(plan.forecast.peak, by_module={"weights": 3 * 2**30, "model.layers.*.mlp": 2**30})
    html, checker = written(tmp_path, dataclasses.replace(plan, forecast=dataclasses.replace(plan.forecast, peak=peak)))
    text = text_of(checker)
    for words in ("fits", "needs 9.00 GiB of 12.0 GiB (75.0%)", "cpu, float32, packed rows of up to 512 tokens, micro-batch 8"):
        assert words in text
    for words in ("margin 3.00 GiB 25.0% left free", "cpu (A Processor) 8.00 GiB – – 9.00 GiB 12.0 GiB", "peak 8.00 GiB"):
        assert words in text
    for words in ("activations 2.00 GiB", "model.layers.*.mlp 1.00 GiB", "loss and backward", "there is 11.0 GiB for them"):
        assert words in text
    for words in ("does not fit: needs 14.2 GiB", "the tokenizer has no chat template", "11.3M of 1.24B parameters"):
        assert words in text
    assert checker.tags.count("svg") == 1
    assert "prefers-color-scheme: dark" in html
    assert len(html) < 60_000


def test_an_accelerator_shows_four_numbers_and_what_is_reserved(tmp_path: Path, make: SimpleNamespace) -> None:
    gib = 2**30
    timeline = dataclasses.replace(make.timeline(), reserved=((0.0, 8 * gib), (1.0, 9 * gib)))
    forecast = dataclasses.replace(
        make.forecast(available=138 * gib),
        active_bytes=round(8.25 * gib),
        reserved_bytes=round(8.5 * gib),
        timeline=timeline,
    )
    html, checker = written(tmp_path, make.plan(forecast=forecast, machine=make.machine(accelerators=1)))
    assert "cuda:0 (NVIDIA H200) 8.00 GiB 8.25 GiB 8.50 GiB 9.00 GiB 138 GiB" in text_of(checker)
    assert 'polyline class="reserved"' in html
    assert 'polyline class="limit"' not in html, "far above the peak"


def test_nothing_forecast_and_strange_names(tmp_path: Path, make: SimpleNamespace) -> None:
    evil = "<script>alert(1)</script> \x1b[31m \ud800"
    plan = make.plan(forecast=make.forecast("cannot say"), notes=(evil,), rejected=())
    html, checker = written(tmp_path, plan)
    assert "this model's step cannot be traced (ValueError: <odd>)" in text_of(checker)
    assert "<script" not in html
    assert "\x1b" not in html
    assert "svg" not in checker.tags


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path, plan: Plan) -> None:
    with pytest.raises(UsageError, match="cannot write"):
        write_plan(plan, tmp_path)
    assert list(tmp_path.iterdir()) == []
