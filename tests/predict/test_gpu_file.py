"""Measurements on accelerators (benchmarks/gpu): forecasts are made again from the file and held to what was measured."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FILES = sorted((BENCHMARKS / "results").glob("*gpu-memory.json"))

MOST_PERCENT = {"allocated_bytes": 1.0, "reserved_bytes": 2.0}
"""Median error that is allowed."""


@pytest.fixture
def scoring(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """benchmarks/gpu/memory_score.py."""
    monkeypatch.syspath_prepend(str(BENCHMARKS / "gpu"))
    yield importlib.import_module("memory_score")
    for name in ("memory_score", "memory_cases"):
        sys.modules.pop(name, None)


def hold(scoring: Any, cases: list[dict[str, Any]], forecasts: dict[str, dict[str, Any]]) -> None:
    """Fails where the forecasts are not good enough."""
    result = scoring.score(cases, forecasts)
    assert not result.called_fits, result.called_fits
    assert not result.not_forecast, result.not_forecast
    for figure, most in MOST_PERCENT.items():
        assert result.medians[figure] <= most, (figure, result.errors)


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES or [None], ids=lambda path: path.stem if path else "none")
def test_what_was_measured_is_forecast(path: Path | None, scoring: Any, tmp_path: Path) -> None:
    if path is None:
        pytest.skip("no GPU run is on file (benchmarks/results/*gpu-memory.json)")
    cases = json.loads(path.read_text(encoding="utf-8"))["results"]
    ran = [case for case in cases if case["status"] in ("measured", "out of memory")]
    assert len(ran) >= 30
    hold(scoring, ran, {case["name"]: scoring.make_forecast(case, tmp_path) for case in ran})


def made_up(scoring: Any, folder: Path) -> list[dict[str, Any]]:
    """A file's worth of cases: what was 'measured' is what is forecast now, less half a percent; the second ran out of memory."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    job = {
        "model": "config.json",
        "data": {"synthetic": {"length": 64, "examples": 4}, "packing": False, "max_length": 64},
        "method": "full",
        "precision": "bf16",
        "training": {"max_steps": 2, "global_batch": 4},
        "strategy": {"micro_batch": 4, "recompute": "none", "attention": "sdpa", "expandable_segments": True},
    }
    card = {"kind": "cuda", "index": 0, "name": "a card", "total_bytes": 2**34, "available_bytes": 2**34, "sm": 80}
    good = {"name": "good", "config": config, "job": job, "device": card, "capacity_bytes": None, "status": "measured"}
    forecast = scoring.make_forecast(good, folder)
    good["measured"] = {figure: round(forecast[figure] / 1.005) for figure in scoring.FIGURES}
    short = {**good, "name": "short", "capacity_bytes": 2**20, "status": "out of memory", "measured": {}}
    written = folder / "file.json"
    written.write_text(json.dumps([good, short]), encoding="utf-8")
    return json.loads(written.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def test_a_good_file_passes(scoring: Any, tmp_path: Path) -> None:
    cases = made_up(scoring, tmp_path)
    forecasts = {case["name"]: scoring.make_forecast(case, tmp_path) for case in cases}
    assert forecasts["short"]["verdict"] == "does not fit"
    hold(scoring, cases, forecasts)
    result = scoring.score(cases, forecasts)
    assert set(result.errors) == {"good"}
    assert result.medians["allocated_bytes"] == pytest.approx(0.5, abs=0.01)


def test_bad_files_fail(scoring: Any, tmp_path: Path) -> None:
    cases = made_up(scoring, tmp_path)
    forecasts = {case["name"]: scoring.make_forecast(case, tmp_path) for case in cases}
    for figure, factor in (("allocated_bytes", 0.98), ("reserved_bytes", 1.04)):
        wrong = {**cases[0], "measured": {**cases[0]["measured"], figure: cases[0]["measured"][figure] * factor}}
        with pytest.raises(AssertionError, match=figure):
            hold(scoring, [wrong], forecasts)
    surprised = {**cases[1], "capacity_bytes": None}
    with pytest.raises(AssertionError, match="short"):
        hold(scoring, [cases[0], surprised], {**forecasts, "short": scoring.make_forecast(surprised, tmp_path)})
    unable = {**forecasts, "good": {"verdict": "cannot say"}}
    with pytest.raises(AssertionError, match="good"):
        hold(scoring, cases[:1], unable)
    alarmed = scoring.score(cases[:1], {"good": {**forecasts["good"], "verdict": "does not fit"}})
    assert alarmed.false_alarms == ("good",)
