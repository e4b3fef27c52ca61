"""The plan: resolved, honest about what does not fit, and the same however it is asked for."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import sartor
from sartor.errors import DoesNotFit, JobError
from sartor.plan import make


def test_a_plan_resolves_what_the_job_leaves_open(job_tree: dict[str, Any]) -> None:
    plan = sartor.plan(job_tree)
    assert plan.job.data.max_length == 128
    assert plan.strategy.packing is True
    assert plan.job.training.learning_rate == 1e-3
    assert plan.total_steps == 6
    assert plan.forecast.verdict == "fits"
    assert plan.forecast.peak is not None
    assert plan.forecast.process_bytes == plan.forecast.baseline_bytes + plan.forecast.peak.total_bytes
    assert plan.anatomy.parameters == plan.trained_parameters


def test_plans_need_no_weights(job_tree: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    """A config.json alone is enough."""
    job_tree["model"] = {"path": str(tiny / "config.json"), "tokenizer": str(tiny)}
    plan = sartor.plan(job_tree)
    assert plan.forecast.verdict == "fits"
    run = sartor.train(plan)  # and trains from random weights
    assert run.steps == 6


def test_smaller_micro_batches_then_recomputation_where_memory_is_short(job_tree: dict[str, Any]) -> None:
    job_tree["data"]["packing"] = False
    job_tree["training"]["global_batch"] = 24
    roomy = sartor.plan(job_tree)
    assert (roomy.strategy.micro_batch, roomy.strategy.recompute) == (24, False)
    peak, baseline = roomy.forecast.peak, roomy.forecast.baseline_bytes
    assert peak is not None
    machine = roomy.machine
    limit = baseline + peak.total_bytes // 2
    device = dataclasses.replace(machine.device, total_bytes=limit, available_bytes=limit)
    short = make(roomy.job, dataclasses.replace(machine, device=device))
    assert short.strategy.micro_batch < 24
    assert short.forecast.peak is not None
    assert short.forecast.peak.total_bytes < peak.total_bytes
    assert short.rejected
    assert "needs" in short.rejected[0].reason


def test_what_cannot_fit_is_refused_with_what_would_help(job_tree: dict[str, Any]) -> None:
    job_tree["machine"]["host_memory"] = "60MiB"
    with pytest.raises(DoesNotFit, match="does not fit") as refused:
        sartor.plan(job_tree)
    assert "lora" in str(refused.value)


def test_pinned_parts_are_kept(job_tree: dict[str, Any]) -> None:
    job_tree["strategy"] = {"micro_batch": 3, "recompute": "full", "attention": "eager"}
    strategy = sartor.plan(job_tree).strategy
    assert (strategy.micro_batch, strategy.recompute, strategy.attention) == (3, True, "eager")


def test_packing_is_refused_where_it_would_be_wrong(job_tree: dict[str, Any]) -> None:
    job_tree |= {"method": "prefix", "prefix": {"length": 4}}
    plan = sartor.plan(job_tree)
    assert plan.strategy.packing is False
    assert plan.job.data.max_length == 124
    assert any("not packed" in note for note in plan.notes)
    job_tree["data"]["packing"] = True
    with pytest.raises(JobError, match="cannot be packed"):
        sartor.plan(job_tree)


def test_lengths_beyond_the_model_are_refused(job_tree: dict[str, Any]) -> None:
    job_tree["data"]["max_length"] = 4096
    with pytest.raises(JobError, match=r"at most data\.max_length=128"):
        sartor.plan(job_tree)


def test_a_plan_is_plain_data(job_tree: dict[str, Any]) -> None:
    plan = sartor.plan(job_tree)
    tree = json.loads(json.dumps(plan.to_mapping()))
    assert yaml.safe_load(plan.to_yaml()) == tree
    assert tree["job"]["training"]["global_batch"] == 8
    assert tree["forecast"]["peak"]["by_kind"]["weights"] > 0
