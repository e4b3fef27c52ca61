"""The plan: resolved, honest about what does not fit, and the same however it is asked for."""

from __future__ import annotations

import dataclasses
import json
import re
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
    assert plan.forecast.process_bytes is not None
    assert plan.forecast.process_bytes >= plan.forecast.baseline_bytes
    assert plan.anatomy.parameters == plan.trained_parameters


def test_plans_need_no_weights(job_tree: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    """A config.json alone is enough."""
    job_tree["model"] = {"path": str(tiny / "config.json"), "tokenizer": str(tiny)}
    plan = sartor.plan(job_tree)
    assert plan.forecast.verdict == "fits"
    run = sartor.train(plan)  # and trains from random weights
    assert run.steps == 6


def test_smaller_micro_batches_then_recomputation_where_memory_is_short(job_tree: dict[str, Any]) -> None:
    """On a card of the catalogue: what a CPU's heap holds free already depends on what this process did before."""
    job_tree["model"] += "/config.json"
    job_tree |= {"data": {"synthetic": {"length": 100, "examples": 16}, "packing": False}, "machine": "L40S-48GB"}
    job_tree["training"]["global_batch"] = 16
    roomy = sartor.plan(job_tree)
    assert (roomy.strategy.micro_batch, roomy.strategy.recompute) == (16, False)
    peak, reserved = roomy.forecast.peak, roomy.forecast.reserved_bytes
    assert peak is not None
    assert reserved is not None
    machine = roomy.machine
    limit = roomy.forecast.baseline_bytes + reserved // 2
    device = dataclasses.replace(machine.device, total_bytes=limit, available_bytes=limit)
    short = make(roomy.job, dataclasses.replace(machine, device=device))
    assert short.strategy.micro_batch < 16
    assert short.forecast.peak is not None
    assert short.forecast.peak.total_bytes < peak.total_bytes
    assert short.rejected
    assert "needs" in short.rejected[0].reason


def test_what_cannot_fit_is_refused_with_what_would_help(job_tree: dict[str, Any]) -> None:
    """Full float32 fine-tuning of a wide model; half the precision, or LoRA, would fit: forecast, not guessed."""
    config = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8}
    path = Path(job_tree["model"]) / "config.json"
    wide = Path(job_tree["output"]).parent / "wide.json"
    wide.write_text(json.dumps({**json.loads(path.read_text()), **config, "head_dim": 64}), encoding="utf-8")
    job_tree |= {"model": str(wide), "data": {"synthetic": {"length": 16, "examples": 4}}, "precision": "float32"}
    job_tree["training"]["global_batch"] = 2
    roomy = sartor.plan({**job_tree, "machine": "L40S-48GB", "strategy": {"micro_batch": 1, "recompute": "full"}})
    limit = roomy.forecast.process_bytes
    assert limit is not None
    machine = {"name": "L40S-48GB", "device_memory": limit - 60 * 2**20}
    with pytest.raises(DoesNotFit, match="does not fit") as refused:
        sartor.plan({**job_tree, "machine": machine, "strategy": {"placement": "device"}})
    said = str(refused.value)
    assert said.index("precision=bf16: ") < said.index("method=lora: "), "the cheapest first"
    assert re.search(r"strategy.placement=auto: .*iB, and .*iB of main memory", said)
    needed = in_mib(re.search(r"it needs (.*?) of", said)[1])
    for change in ("precision=bf16", "method=lora"):
        total, saved = re.search(rf"{change}: (.*?), saves (.*?)(;|$)", said, re.MULTILINE).groups()[:2]
        assert in_mib(total) + in_mib(saved) == pytest.approx(needed, rel=0.01)


def in_mib(text: str) -> float:
    number, unit = text.split()
    return float(number) * {"MiB": 1, "GiB": 1024}[unit]


def test_what_is_tight_says_what_leaves_more_room(job_tree: dict[str, Any]) -> None:
    job_tree["model"] += "/config.json"
    job_tree |= {"data": {"synthetic": {"length": 128, "examples": 16}, "packing": False}, "machine": "L40S-48GB"}
    job_tree |= {"precision": "float32", "strategy": {"micro_batch": 16, "recompute": "none"}}
    job_tree["training"]["global_batch"] = 16
    roomy = sartor.plan(job_tree)
    assert roomy.forecast.process_bytes is not None
    assert not any("more room" in note for note in roomy.notes)
    limit = round(roomy.forecast.process_bytes / 0.95)
    tight = sartor.plan({**job_tree, "machine": {"name": "L40S-48GB", "device_memory": limit}})
    assert tight.forecast.verdict == "tight"
    (note,) = [note for note in tight.notes if note.startswith("to leave more room: ")]
    assert "strategy.micro_batch=1: " in note
    assert ", saves " in note


def test_where_only_more_memory_helps_it_says_how_much(job_tree: dict[str, Any]) -> None:
    job_tree["machine"]["host_memory"] = "60MiB"
    job_tree["training"]["global_batch"] = 2
    with pytest.raises(DoesNotFit) as refused:
        sartor.plan(job_tree)
    assert re.fullmatch(r"machine\.host_memory=\d+MiB, where this machine has that much", refused.value.remedy)


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
    assert tree["verdict"] == tree["forecast"]["verdict"] == "fits"
    (device,) = tree["forecast"]["device"]
    assert device["rank"] == 0
    low, high = device["interval"]
    assert low <= device["process_bytes"] <= high
    assert tree["forecast"]["host"]["rss_bytes"] == device["process_bytes"]
    assert sum(tree["forecast"]["breakdown"].values()) == device["process_bytes"]
    assert set(tree["forecast"]["peak"]) == {"phase", "module", "kind"}
