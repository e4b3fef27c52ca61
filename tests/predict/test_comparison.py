"""docs/comparison.md is what the newest result file says."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_page_is_made_from_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    estimators = importlib.import_module("estimators")

    newest = max((ROOT / "benchmarks/results").glob("*-estimators.json"))
    record = json.loads(newest.read_text(encoding="utf-8"))
    assert (ROOT / "docs/comparison.md").read_text(encoding="utf-8") == estimators.page(record)
    rows = record["results"]["rows"]
    for name, figures in record["results"]["summary"].items():
        assert figures == estimators.summary(rows, name)
    for name in ("estimators", "memory_published", "common"):
        sys.modules.pop(name)
