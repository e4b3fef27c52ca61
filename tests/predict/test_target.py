"""Forecasts for devices that are not here: the same trace, the device's workspaces and allocator."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sartor
from sartor.errors import DoesNotFit, JobError, UsageError
from sartor.job.schema import MachineJob
from sartor.machine import probe
from sartor.predict.ledger import Event, Ledger
from sartor.predict.target import Target


@pytest.fixture
def synthetic(job_tree: dict[str, Any]) -> dict[str, Any]:
    """Planned from the configuration alone: no data, no tokenizer, no weights."""
    job_tree["model"] = job_tree["model"] + "/config.json"
    return {**job_tree, "data": {"synthetic": {"length": 100, "examples": 16}}, "machine": "L40S-48GB"}


def test_four_numbers_for_an_accelerator(synthetic: dict[str, Any]) -> None:
    forecast = sartor.plan(synthetic).forecast
    assert forecast.peak is not None
    assert forecast.allocated_bytes is not None
    assert forecast.active_bytes is not None
    assert forecast.reserved_bytes is not None
    assert forecast.process_bytes is not None
    assert forecast.peak.total_bytes < forecast.allocated_bytes <= forecast.active_bytes
    assert forecast.active_bytes <= forecast.reserved_bytes < forecast.process_bytes
    assert forecast.reserved_bytes % 2**21 == 0
    parts = forecast.baseline_bytes + forecast.allocator_bytes + forecast.peak.total_bytes
    assert parts == forecast.process_bytes
    assert forecast.verdict == "fits"


def test_the_card_decides_what_fits(synthetic: dict[str, Any]) -> None:
    synthetic["training"]["global_batch"] = 64
    synthetic["data"]["synthetic"] |= {"examples": 128}
    roomy = sartor.plan(synthetic)
    assert roomy.strategy.micro_batch == 64
    assert roomy.forecast.reserved_bytes is not None
    limit = roomy.forecast.baseline_bytes + roomy.forecast.reserved_bytes // 2
    short = sartor.plan({**synthetic, "machine": {"name": "L40S-48GB", "device_memory": limit}})
    assert short.strategy.micro_batch < 64
    assert short.rejected
    with pytest.raises(DoesNotFit, match="runs out"):
        sartor.plan({**synthetic, "machine": {"name": "L40S-48GB", "device_memory": "460MiB"}})


def test_a_plan_for_another_machine_does_not_run_here(synthetic: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="plan is for L40S-48GB"):
        sartor.train(synthetic)


@pytest.mark.parametrize(("name", "remedy"), [("L40-48", "L40S-48GB"), ("8xA100-80GB", "one device"), ("Gaudi2-96GB", "CUDA")])
def test_machines_that_cannot_be_planned_for(name: str, remedy: str) -> None:
    with pytest.raises(JobError) as refused:
        probe(MachineJob(name=name))
    assert remedy in str(refused.value)


def test_the_workspace_comes_with_the_first_product_and_stays() -> None:
    events = [
        Event(storage=0, size_bytes=512, phase="build"),
        Event(storage=1, size_bytes=1024, phase="step 1: forward and backward"),
    ]
    with_workspace = Target(kind="cuda", sm=80).with_workspace(Ledger(events=events))
    assert [event.size_bytes for event in with_workspace] == [512, 8_519_680, 8_519_680, 1024]
    assert Target(kind="cuda", sm=90).workspace_bytes == 2 * 32 * 2**20
    assert list(Target(kind="cpu").with_workspace(Ledger(events=events))) == events


def test_flash_attention_takes_scratch_memory_in_backward() -> None:
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    query, key = torch.empty(2, 8, 100, 40, dtype=torch.bfloat16), torch.empty(2, 4, 100, 40, dtype=torch.bfloat16)
    rows, columns = 128, 64
    expected = 4 * 2 * 8 * rows * columns + 4 * 2 * 8 * rows + 2 * 2 * 8 * 100 * 40 * 2
    assert Target(kind="cuda", sm=80).transient_bytes(backward, (None, query, key)) == expected
    assert Target(kind="cpu").transient_bytes(backward, (None, query, key)) == 0
    assert Target(kind="cuda", sm=75).transient_bytes(backward, (None, query, key)) == 0


def test_synthetic_examples_must_fit_and_are_not_given_with_a_file(synthetic: dict[str, Any]) -> None:
    synthetic["data"]["synthetic"]["length"] = 4096
    with pytest.raises(JobError, match="128 positions"):
        sartor.plan(synthetic)
    synthetic["data"]["path"] = "train.jsonl"
    with pytest.raises(JobError, match="both"):
        sartor.plan(synthetic)


def test_cuda_needs_room_for_a_product_in_the_softmax_gradient() -> None:
    gradient = torch.zeros(2, 3, 64, 64)
    arguments = (gradient, torch.zeros_like(gradient), -1, torch.float32)
    backward = torch.ops.aten._softmax_backward_data.default
    assert Target(kind="cuda", sm=75).transient_bytes(backward, arguments) == 4 * gradient.numel()
    assert Target(kind="cpu").transient_bytes(backward, arguments) == 0
