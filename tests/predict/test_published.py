"""Figures that others measured on a T4 and published: the forecast is held to them."""

from __future__ import annotations

import csv
import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.shared
@pytest.mark.slow
def test_published_runs_are_forecast_within_a_percent(shared: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    published = importlib.import_module("memory_published")
    path = shared("measured/published.csv")
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if not published.left_out(row)]
    small = [row for row in rows if row["model"] in ("SmolLM2-135M", "Qwen2.5-0.5B")]
    assert len(small) == 5
    for row in small:
        result = published.score(row, path.parents[1])
        assert abs(result["error_percent"]) < 0.5, (row["model"], result)
    quantised = [row for row in rows if row["method"] == "qlora"]
    assert len(quantised) == 10
    for row in quantised[1:2] + quantised[7:10:2]:
        result = published.score(row, path.parents[1])
        assert abs(result["error_percent"]) < 1, (row["model"], result)
    sys.modules.pop("memory_published")
    sys.modules.pop("common")
