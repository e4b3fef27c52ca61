"""The page: well-formed, self-contained, escaped, and whole whatever is missing."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sartor.plan import Plan
from sartor.report import write_report
from sartor.train import Answer, MemoryOutcome, Run
from support import PageChecker


def written(tmp_path: Path, plan: Plan, run: Run, metrics: list[dict[str, Any]]) -> tuple[str, PageChecker]:
    path = tmp_path / "new" / "report.html"
    write_report(plan, run, metrics, path)
    html = path.read_text(encoding="utf-8")
    checker = PageChecker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    assert not re.search(r"https?://|//[a-z]+\.|url\(|@import|\bnan\b|\binf\b", html, re.IGNORECASE)
    return html, checker


def test_a_report_says_what_happened(tmp_path: Path, plan: Plan, run: Run, make: SimpleNamespace) -> None:
    html, checker = written(tmp_path, plan, run, make.metrics())
    text = " ".join(" ".join(checker.text).split())
    for words in ("4.512 →", "0.513", "67%", "5,151", "−2.2%", "9.20 GiB", "2.2% too low", "activations 2.00 GiB", "✓ exact"):
        assert words in text
    for words in ("does not fit: needs 14.2 GiB", "sartor chat runs/first", "AutoPeftModelForCausalLM", "torch", "12 truncated"):
        assert words in text
    assert checker.tags.count("svg") == 3, "loss, memory over a step, speed"
    assert "peak in loss and backward, near model.layers.*.mlp; most of it weights" in text
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "report.html"]


def test_a_full_model_is_loaded_by_transformers(tmp_path: Path, plan: Plan, run: Run, make: SimpleNamespace) -> None:
    full = dataclasses.replace(plan, traits=dataclasses.replace(plan.traits, adapter=False))
    html, _ = written(tmp_path, full, run, make.metrics())
    assert "from transformers import AutoModelForCausalLM, AutoTokenizer" in html
    assert "peft" not in html


def test_what_the_data_says_is_text(tmp_path: Path, plan: Plan, make: SimpleNamespace) -> None:
    evil = "<script>alert(1)</script> & \x1b[31m \ud800 </td>"
    answers = (Answer(prompt=evil, reference="", before=evil * 100, after="<b>"),)
    strange = make.run(answers=answers, folder="runs/<i>&'\"", versions={"<u>": "<s>"})
    html, checker = written(tmp_path, make.plan(notes=(evil,), forecast=make.forecast("cannot say")), strange, make.metrics(9))
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "\x1b" not in html
    assert checker.tags.count("details") == 1, "the long answer is folded"


@pytest.mark.parametrize(
    "metrics",
    [
        [],
        [{"step": 1, "loss": 2.0, "tokens_per_second": 10.0}],
        [{"step": 0, "eval_loss": 2.0}],
        [{"step": 1, "loss": math.nan, "tokens_per_second": math.inf}, {"step": 2, "loss": 1.0, "tokens_per_second": 0.0}],
        [{"step": 1, "loss": None, "eval_loss": "odd"}, {"loss": 1.0}],
        [{"step": n, "loss": 0.0, "tokens_per_second": 5.0} for n in range(1, 40)],
        [{"step": n, "loss": 1e9 * n, "tokens_per_second": 1e-7} for n in range(1, 4)],
    ],
)
def test_little_or_odd_metrics(tmp_path: Path, plan: Plan, metrics: list[dict[str, Any]], make: SimpleNamespace) -> None:
    memory = MemoryOutcome(forecast_bytes=None, measured_bytes=0, measured_name="peak", error_percent=None)
    empty: dict[str, Any] = dict.fromkeys(("first_loss", "last_loss", "first_eval_loss", "last_eval_loss", "exact_match_after"))
    bare = make.run(**empty, memory=memory, answers=(), versions={}, steps=0, seconds=0.0, tokens_per_second=0.0)
    html, _ = written(tmp_path, make.plan(forecast=make.forecast("cannot say"), rejected=(), notes=()), bare, metrics)
    assert "no forecast" in html
    if not metrics:
        assert "No step was recorded." in html


def test_a_long_run_is_thinned(tmp_path: Path, plan: Plan, run: Run, make: SimpleNamespace) -> None:
    metrics = make.metrics(50_000, every=20)
    html, checker = written(tmp_path, plan, run, metrics)
    assert len(html) < 150_000
    for points in re.findall(r'points="([^"]*)"', html):
        assert len(points.split()) <= 600
    assert checker.tags.count("circle") <= 61, "sixty of the held-out loss, and the peak"


def test_many_answers_are_folded(tmp_path: Path, plan: Plan, make: SimpleNamespace) -> None:
    answers = tuple(Answer(prompt=str(n), reference="a", before="b", after="a") for n in range(30))
    html, _ = written(tmp_path, plan, make.run(answers=answers), [])
    assert "22 more" in html
