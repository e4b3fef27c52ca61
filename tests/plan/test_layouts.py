"""Plans for several devices: which layouts are tried, and what is said of those that cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

import sartor
from sartor.errors import JobError
from sartor.job.schema import MachineJob, StrategyJob
from sartor.machine import probe
from sartor.plan.layouts import possible_layouts


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    LlamaConfig(
        vocab_size=8192, hidden_size=2048, intermediate_size=5504, num_hidden_layers=8, num_attention_heads=16,
    ).save_pretrained(tmp_path)  # fmt: skip
    return {
        "model": str(tmp_path / "config.json"),
        "data": {"synthetic": {"length": 128, "examples": 64}},
        "method": "full",
        "training": {"epochs": 1, "global_batch": 32},
        "strategy": {"micro_batch": 2, "recompute": "none"},
    }


def test_all_devices_share_by_default(job: dict[str, Any]) -> None:
    plan = sartor.plan({**job, "machine": "8xA100-80GB"})
    assert plan.strategy.layout.shard == 8
    assert plan.strategy.layout.zero == 2, "the faster of the two, where it fits"
    assert "8 x cuda, ZeRO-2 over 8" in plan.strategy.describe()
    alone = sartor.plan({**job, "machine": "A100-80GB"})
    assert plan.forecast.peak is not None
    assert alone.forecast.peak is not None
    assert plan.forecast.peak.by_kind["optimizer"] == pytest.approx(alone.forecast.peak.by_kind["optimizer"] / 8, rel=0.01)


def test_zero_3_where_zero_2_does_not_fit(job: dict[str, Any]) -> None:
    job["training"]["global_batch"] = 16
    roomy = sartor.plan({**job, "machine": "4xT4-16GB"})
    both = [sartor.plan({**job, "machine": "4xT4-16GB", "strategy": {**job["strategy"], "zero": zero}}) for zero in (2, 3)]
    needs = [plan.forecast.process_bytes or 0 for plan in both]
    assert needs[1] < needs[0] == roomy.forecast.process_bytes
    machine = {"name": "4xT4-16GB", "device_memory": int(needs[1] / 0.88)}
    assert machine["device_memory"] < needs[0], "room for the second, not for the first"
    squeezed = sartor.plan({**job, "machine": machine})
    assert squeezed.strategy.layout.zero == 3
    assert "ZeRO-2" in squeezed.rejected[0].strategy.describe()


def test_json_names_a_rank(job: dict[str, Any]) -> None:
    (device,) = sartor.plan({**job, "machine": "2x4xH100-80GB"}).to_mapping()["forecast"]["device"]
    assert device["rank"] == 0
    assert device["allocated_bytes"] > 0


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (StrategyJob(shard=3), "over 3 devices, and the machine has 8"),
        (StrategyJob(tensor=3), "over 6 devices, and the machine has 8"),
        (StrategyJob(tensor=16), "over 16 devices"),
        (StrategyJob(shard=8), "8 data parallel ranks share 4 examples"),
    ],
)
def test_layouts_that_cannot_be(wanted: StrategyJob, said: str) -> None:
    with pytest.raises(JobError, match=said):
        possible_layouts(wanted, probe(MachineJob(name="8xA100-80GB")), global_batch=4)


def test_a_single_device_has_one_layout() -> None:
    (layout,) = possible_layouts(StrategyJob(), probe(MachineJob(name="T4-16GB")), global_batch=1)
    assert layout.devices == 1
    with pytest.raises(JobError, match="the machine has 1"):
        possible_layouts(StrategyJob(shard=2), probe(MachineJob(name="T4-16GB")), global_batch=8)
