"""The search chooses what forecasting every candidate would choose."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, LlamaConfig

import sartor
from sartor.errors import DoesNotFit
from sartor.job.schema import MachineJob
from sartor.machine import probe
from sartor.machine.calibration import CALIBRATION_VERSION, Calibration, calibration_key, save_calibration
from sartor.plan import Plan, make
from support import device_rates

GIB = 2**30
MICRO_BATCHES = (8, 4, 2, 1)


def job_of(folder: Path, *, width: int, layers: int, heads: int, vocabulary: int, length: int, batch: int) -> dict[str, Any]:
    """Full fine-tuning of a Llama of these sizes on two steps of examples as long as this."""
    LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=width * 43 // 16, num_hidden_layers=layers,
        num_attention_heads=heads,
    ).save_pretrained(folder)  # fmt: skip
    return {
        "model": str(folder / "config.json"),
        "data": {"synthetic": {"length": length, "examples": 2 * batch}, "packing": False},
        "method": "full",
        "training": {"epochs": 1, "global_batch": batch},
        "machine": "A10-24GB",
    }


@pytest.fixture
def job(tmp_path: Path) -> dict[str, Any]:
    return job_of(tmp_path, width=1024, layers=4, heads=16, vocabulary=8192, length=1024, batch=16)


def planned(job: dict[str, Any], room: int, **strategy: Any) -> Plan | None:
    """Without forecasts of what would help where memory is short: they take longer than the search and have their own tests."""
    machine, making = {"name": job["machine"], "device_memory": room}, sys.modules["sartor.plan.make"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(making, "does_not_fit", lambda *_: DoesNotFit("memory is short"))
        patch.setattr(making, "more_room", lambda *_: "")
        try:
            return sartor.plan({**job, "machine": machine, "strategy": {"placement": "device", **strategy}})
        except DoesNotFit:
            return None


@pytest.mark.parametrize("room_gib", [4.6, 2.6])
def test_the_choice_is_that_of_trying_everything(job: dict[str, Any], room_gib: float) -> None:
    room = int(room_gib * GIB)
    everything = [
        planned(job, room, micro_batch=size, recompute=recompute)
        for size, recompute in itertools.product(MICRO_BATCHES, ("none", "full"))
    ]
    fitting = [plan for plan in everything if plan is not None and plan.forecast.verdict == "fits"]
    assert 0 < len(fitting) < len(everything), "some fit and some do not"
    best = min(fitting, key=seconds)
    chosen = planned(job, room)
    assert chosen is not None
    assert seconds(chosen) == pytest.approx(seconds(best), rel=1e-6)
    assert (chosen.strategy.micro_batch, chosen.strategy.recompute) == (best.strategy.micro_batch, best.strategy.recompute)


@pytest.fixture
def narrow(tmp_path: Path) -> dict[str, Any]:
    """Six blocks, and activations that outweigh all else."""
    return job_of(tmp_path, width=256, layers=6, heads=4, vocabulary=512, length=512, batch=8)


def test_no_more_blocks_recompute_than_have_to(narrow: dict[str, Any]) -> None:
    """Between the room that recomputing none takes and the room that recomputing all takes: with one block less it is tight."""
    pinned: dict[str, Any] = {"micro_batch": 8}
    needs = [planned(narrow, 24 * GIB, recompute=recompute, **pinned) for recompute in ("none", "full")]
    none, full = (plan.forecast.process_bytes or 0 for plan in needs if plan is not None)
    room = int((none + full) / 2 / 0.9)
    chosen = planned(narrow, room, **pinned)
    assert chosen is not None
    count = chosen.strategy.recomputed
    assert count is not None
    assert 1 < count < 6
    fewer, same = (planned(narrow, room, recompute=number, **pinned) for number in (count - 1, count))
    assert fewer is None or fewer.forecast.verdict == "tight"
    assert same is not None
    assert same.strategy == chosen.strategy
    assert same.forecast.process_bytes == chosen.forecast.process_bytes
    assert seconds(same) == pytest.approx(seconds(chosen))
    assert "blocks recomputed" in chosen.strategy.describe()


def test_what_was_passed_over_is_named_with_a_reason(job: dict[str, Any]) -> None:
    plan = planned(job, int(2.4 * GIB))
    assert plan is not None
    reasons = [other.reason for other in plan.rejected]
    assert any("does not fit" in reason for reason in reasons)
    assert any("% slower" in reason for reason in reasons)
    assert plan.strategy not in [other.strategy for other in plan.rejected]


def test_several_devices_have_layouts_to_choose_from(job: dict[str, Any]) -> None:
    plan = sartor.plan({**job, "machine": "2x4xH100-80GB", "training": {"epochs": 1, "global_batch": 16}})
    layouts = {plan.strategy.layout, *(other.strategy.layout for other in plan.rejected)}
    assert {layout.tensor for layout in layouts} == {1, 2, 4}
    assert {layout.replicate for layout in layouts} == {1, 2}
    assert all(layout.devices == 8 for layout in layouts)
    assert plan.time is not None
    assert plan.time.cost_usd is None or plan.time.cost_usd > 0


def test_adapters_in_pipeline_stages_are_split_too(narrow: dict[str, Any]) -> None:
    pinned = {"pipeline": 2, "micro_batch": 2, "recompute": "none"}
    plan = sartor.plan({**narrow, "method": "lora", "machine": "4xA10-24GB", "strategy": pinned})
    everything = [(plan.strategy, ""), *((other.strategy, other.reason) for other in plan.rejected)]
    assert {strategy.layout.tensor for strategy, _ in everything} == {1, 2}
    assert not any("split" in reason for _, reason in everything)


def test_the_time_of_the_plan_is_of_the_strategy_that_runs(job: dict[str, Any]) -> None:
    """Recomputation costs a forward pass, a second device halves the examples."""
    kept, again = (sartor.plan({**job, "strategy": {"micro_batch": 2, "recompute": name}}) for name in ("none", "full"))
    assert 1.2 < seconds(again) / seconds(kept) < 1.5
    two = sartor.plan({**job, "machine": "2xA10-24GB", "strategy": {"micro_batch": 2, "recompute": "none", "tensor": 1}})
    assert 0.45 < seconds(two) / seconds(kept) < 0.75


def test_a_machine_of_unknown_speed_gets_a_plan_without_times(job: dict[str, Any]) -> None:
    known = sartor.plan(job)
    bare = make(known.job, dataclasses.replace(known.machine, rates=None))
    assert bare.time is None
    assert bare.forecast.verdict == "fits"


def test_a_calibrated_cpu_ranks_full_fine_tuning_with_long_answers(tmp_path: Path) -> None:
    """Its loss goes through several chunks, in the traces that rank as in the run."""
    LlamaConfig(
        vocab_size=8192, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4
    ).save_pretrained(tmp_path)  # fmt: skip
    key = calibration_key(probe(MachineJob(device="cpu")))
    known: dict[str, Any] = {"version": CALIBRATION_VERSION, "key": key, "measured": "2026-11-21", "seconds": 1.0}
    save_calibration(Calibration(**known, device=device_rates()))
    tree = {
        "model": str(tmp_path / "config.json"),
        "data": {"synthetic": {"length": 301, "examples": 32}},
        "method": "full",
        "training": {"epochs": 1, "global_batch": 16},
        "machine": {"device": "cpu"},
    }
    plan = sartor.plan(tree)
    assert plan.time is not None
    assert not any("not ranked" in note for note in plan.notes)
    assert any("% slower" in other.reason for other in plan.rejected)


def test_machines_are_compared(tmp_path: Path) -> None:
    GPT2Config(n_layer=6, n_embd=256, n_head=4, vocab_size=4096).save_pretrained(tmp_path)
    tree = {
        "model": str(tmp_path / "config.json"),
        "data": {"synthetic": {"length": 256, "examples": 64}},
        "training": {"epochs": 1, "global_batch": 8},
    }
    comparison = sartor.compare(tree, ["T4-16GB", "H100-80GB"])
    assert comparison.fastest is not None
    assert comparison.fastest.machine == "H100-80GB"
    mapping = comparison.to_mapping()
    assert [offer["machine"] for offer in mapping["machines"]] == ["T4-16GB", "H100-80GB"]
    assert mapping["cheapest"] in ("T4-16GB", "H100-80GB", None)


def seconds(plan: Plan) -> float:
    assert plan.time is not None
    return plan.time.step_seconds
