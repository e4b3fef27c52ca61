"""What a plan says about reserved memory while lengths vary, and what the run then sets."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import sartor
import sartor.api
from sartor.model import resolve
from sartor.plan import Plan, batch_order
from sartor.plan.drift import with_drift
from sartor.plan.setting import Setting
from sartor.predict.allocator_setting import set_expandable_segments
from support import write_jsonl


@pytest.fixture(scope="module")
def ragged(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model that fills segments, and texts of very different lengths, one a row."""
    tmp_path = tmp_path_factory.mktemp("ragged")
    config = json.loads((tiny / "config.json").read_text(encoding="utf-8"))
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 8}
    path = tmp_path / "wide.json"
    path.write_text(json.dumps({**config, **sizes, "head_dim": 128, "max_position_embeddings": 2048}), encoding="utf-8")
    chance = random.Random(0)
    texts = [{"text": "several words and " * chance.randint(2, 110)} for _ in range(96)]
    return {
        "model": {"path": str(path), "tokenizer": str(tiny)},
        "data": {"path": str(write_jsonl(tmp_path / "ragged.jsonl", texts)), "packing": False, "max_length": 1024},
        "method": "lora",
        "machine": "L40S-48GB",
        "training": {"epochs": 2, "global_batch": 4, "learning_rate": 1e-3},
        "strategy": {"micro_batch": 4, "recompute": "none", "expandable_segments": False},
    }


@pytest.fixture(scope="module")
def plan(ragged: dict[str, Any]) -> Plan:
    return sartor.plan(ragged)


def test_segments_of_fixed_size_drift(plan: Plan) -> None:
    forecast = plan.forecast
    assert not plan.strategy.expandable_segments
    assert "segments of fixed size" in plan.strategy.describe()
    assert forecast.reserved_bytes is not None
    assert forecast.drift_reserved_bytes is not None
    assert forecast.drift_reserved_bytes > 1.05 * forecast.reserved_bytes
    (note,) = [note for note in plan.notes if "as lengths vary" in note]
    assert "With strategy.expandable_segments=true it is" in note
    assert plan.to_mapping()["forecast"]["device"][0]["drift_reserved_bytes"] == forecast.drift_reserved_bytes


def test_a_card_that_drift_fills_does_not_simply_fit(ragged: dict[str, Any], plan: Plan) -> None:
    forecast = plan.forecast
    assert forecast.reserved_bytes is not None
    assert forecast.drift_reserved_bytes is not None
    sets, _ = sartor.api.prepare_data(ragged)
    setting = Setting(
        job=plan.job,
        source=resolve(plan.job.model),
        machine=plan.machine,
        method=plan.traits,
        precision=plan.strategy.precision,
        packing=False,
        sets=sets,
        order=batch_order(plan.job, sets),
        expandable_segments=False,
    )
    room = forecast.drift_reserved_bytes - 2**21, (forecast.reserved_bytes + forecast.drift_reserved_bytes) // 2
    less, least = (
        with_drift(
            setting,
            plan.strategy,
            dataclasses.replace(forecast, available_bytes=forecast.baseline_bytes + size, verdict="fits"),
        )
        for size in room
    )
    assert less.verdict == "tight"
    assert "empty its cache" in less.drift_note
    assert less.drift_reserved_bytes is not None
    assert less.drift_reserved_bytes <= room[0]
    assert least.verdict == "does not fit"
    assert "it runs out after step 1" in least.reason


def test_segments_that_expand_do_not_drift(ragged: dict[str, Any]) -> None:
    plan = sartor.plan({**ragged, "strategy": {"micro_batch": 4}})
    assert plan.strategy.expandable_segments
    assert plan.forecast.drift_reserved_bytes is None
    assert not any("lengths vary" in note for note in plan.notes)
    assert "segments" not in plan.strategy.describe()


def test_examples_of_one_length_do_not_drift(ragged: dict[str, Any]) -> None:
    plan = sartor.plan({**ragged, "data": {"synthetic": {"length": 512, "examples": 32}, "packing": False}})
    assert plan.forecast.drift_reserved_bytes is None


def test_a_cpu_has_no_segments(job_tree: dict[str, Any]) -> None:
    plan = sartor.plan({**job_tree, "strategy": {"expandable_segments": True}})
    assert not plan.strategy.expandable_segments
    assert plan.forecast.drift_reserved_bytes is None


def test_the_run_tells_the_allocator_and_keeps_what_the_user_set(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch._C._accelerator_getAllocatorSettings()
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64,expandable_segments:False")
    try:
        set_expandable_segments(True)
        assert torch._C._accelerator_getAllocatorSettings() == "max_split_size_mb:64,expandable_segments:True"
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:cudaMallocAsync")
        set_expandable_segments(False)
        assert torch._C._accelerator_getAllocatorSettings() == "max_split_size_mb:64,expandable_segments:True", "left alone"
    finally:
        torch._C._accelerator_setAllocatorSettings(before or "expandable_segments:False")
