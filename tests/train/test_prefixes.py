"""Beginnings that examples share, computed once: the same run, forecast with less, and refused where it cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import sartor
from sartor.errors import JobError
from sartor.train import read_metrics


@pytest.fixture
def tree(job_tree: dict[str, Any]) -> dict[str, Any]:
    """Every conversation begins with the same system message."""
    data = {**job_tree["data"], "system": "Answer in one short sentence and say nothing else, whatever you are asked."}
    return {**job_tree, "data": data, "precision": "float32", "evaluation": {"fraction": 0.2, "generate": 0}}


def test_the_run_is_the_plain_one(tree: dict[str, Any], tmp_path: Path) -> None:
    runs, needed = [], []
    for share in (False, True):
        output = tmp_path / f"run-{share}"
        plan = sartor.plan({**tree, "strategy": {"micro_batch": 4, "share_prefixes": share}, "output": str(output)})
        assert ("beginnings computed once" in plan.strategy.describe()) == share
        assert plan.forecast.peak is not None
        needed.append(plan.forecast.peak.total_bytes)
        sartor.train(plan)
        runs.append(read_metrics(output))
    for ours, other in zip(*runs, strict=True):
        assert ours.get("tokens") == other.get("tokens")
        for name in ("loss", "grad_norm", "eval_loss"):
            assert ours.get(name, 0) == pytest.approx(other.get(name, 0), rel=1e-4)
    assert needed[1] < 0.95 * needed[0]  # weights, gradients and optimizer state are most of it


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"data": {"packing": False}}, r"data\.packing"),
        ({"method": "lora", "lora": {"dropout": 0.1}}, r"lora\.dropout"),
        ({"method": "prefix"}, "virtual tokens"),
        ({"strategy": {"attention": "sdpa"}}, "attention by segments"),
    ],
)
def test_jobs_that_cannot_share(tree: dict[str, Any], changes: dict[str, Any], why: str) -> None:
    data, strategy = {**tree["data"], **changes.get("data", {})}, {"share_prefixes": True, **changes.get("strategy", {})}
    with pytest.raises(JobError, match=rf"share_prefixes[\s\S]*{why}"):
        sartor.plan({**tree, **changes, "data": data, "strategy": strategy})
