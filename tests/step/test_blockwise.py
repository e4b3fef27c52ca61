"""bitsandbytes' optimizers: what the forecast's stand-in keeps and allocates, against the real one where it is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig

import sartor
from sartor.data.pack import Batch, collate
from sartor.data.tokens import Sample, TokenSet
from sartor.errors import JobError
from sartor.job import Job, from_mapping
from sartor.job.schema import TrainingJob
from sartor.model import build, resolve
from sartor.predict import Ledger, StorageTracker
from sartor.predict.target import Target
from sartor.predict.trace import run_traced_step
from sartor.predict.whole import trace_job
from sartor.step import Precision, make_step, make_trainable
from sartor.step.blockwise import BLOCK, SMALLEST, check_optimizer, put_state, state_of
from sartor.step.optim import make_optimizer

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes: pip install 'sartor[quant]'"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven layers, of which some are repeated; with tensors above and below the sizes that make a difference."""
    folder = tmp_path_factory.mktemp("model")
    LlamaConfig(
        vocab_size=2048, hidden_size=64, intermediate_size=160, num_hidden_layers=7, num_attention_heads=4,
        num_key_value_heads=1, tie_word_embeddings=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder / "config.json"


def batch() -> Batch:
    samples = TokenSet.from_samples([Sample(input_ids=np.arange(24) + 3, trained=np.arange(24) % 3 > 0, source="test")])
    return collate(samples, [[0], [0]], pad_id=0, packing=False)


def job_of(model: Path, optimizer: str) -> Job:
    return from_mapping({"model": str(model), "data": "unused", "method": "full", "training": {"optimizer": optimizer}})


def traced(model: Path, optimizer: str, *, kind: str = "cuda", mode: str = "bf16") -> Ledger:
    job = job_of(model, optimizer)
    precision = Precision.of(mode)
    target = Target(kind=kind, sm=80 if kind == "cuda" else None)
    return trace_job(job, resolve(job.model), [batch()] * 2, target, precision=precision, recompute=False, attention=None)


def sizes_of(model: Path) -> list[int]:
    job = job_of(model, "adamw")
    whole = build(resolve(job.model), dtype=torch.bfloat16, device="cpu")
    return [parameter.numel() for parameter in whole.parameters()]


def test_moments_are_as_large_as_bitsandbytes_makes_them(model: Path) -> None:
    sizes = sizes_of(model)
    assert min(sizes) < SMALLEST < max(sizes) > 100_000

    def kept(size: int) -> int:
        return 8 * size if size < SMALLEST else 2 * size + 2 * 4 * -(-size // BLOCK)

    ledger = traced(model, "adamw-8bit")
    assert ledger.peak().by_kind["optimizer"] == sum(map(kept, sizes))
    assert ledger.paged_bytes == 0
    assert traced(model, "paged-adamw").paged_bytes == sum(8 * size for size in sizes if size >= 100_000)
    paged = traced(model, "paged-adamw-8bit")
    assert paged.paged_bytes == sum(2 * size for size in sizes if size >= 100_000)
    assert paged.peak().by_kind["optimizer"] == sum(map(kept, sizes)) - paged.paged_bytes
    assert ledger.peak().total_bytes > paged.peak().total_bytes


def test_a_plan_for_a_card_needs_nothing_installed(model: Path) -> None:
    tree = {
        "model": str(model),
        "data": {"synthetic": {"length": 64, "examples": 8}},
        "method": "full",
        "training": {"epochs": 1, "global_batch": 4, "optimizer": "paged-adamw-8bit"},
        "machine": "T4-16GB",
    }
    plan = sartor.plan(tree)
    mapping = plan.to_mapping()["forecast"]
    assert mapping["verdict"] == "fits"
    assert mapping["host"]["paged_bytes"] == sum(2 * size for size in sizes_of(model) if size >= 100_000)
    assert plan.time is not None
    assert plan.time.breakdown["optimizer"] > 0


@pytest.mark.parametrize(
    ("name", "kind", "devices", "what"),
    [("paged-adamw", "cpu", 1, "unified memory"), ("adamw-8bit", "cuda", 8, "whole tensors")],
)
def test_where_they_cannot_be(name: str, kind: str, devices: int, what: str) -> None:
    with pytest.raises(JobError, match=what):
        check_optimizer(name, kind, devices=devices)


def test_training_without_bitsandbytes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(JobError, match="not installed"):
        make_optimizer(dict(nn.Linear(3, 3).named_parameters()), TrainingJob(optimizer="adamw-8bit"))


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["float32", "bf16"])
def test_the_traced_step_allocates_what_the_real_one_does(model: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes' updates are operators of its own, inside of which nothing can be seen: here they are called as functions."""
    from bitsandbytes.backends.cpu import ops  # type: ignore[import-not-found,unused-ignore]

    for name in ("optimizer_update_8bit_blockwise", "optimizer_update_32bit"):
        monkeypatch.setattr(torch.ops.bitsandbytes, name, getattr(ops, f"_{name}_cpu"))
    job, precision = job_of(model, "adamw-8bit"), Precision.of(mode)
    real = build(resolve(job.model), dtype=precision.load_dtype(adapter=False), device="cpu")
    real = make_trainable(real, job, precision, recompute=False, seed=0)
    tracker = StorageTracker()
    batches = [batch()] * 2
    with tracker:
        tracker.mark([*real.parameters(), *real.buffers()], "weights")
        step = make_step(real, job, precision, device_kind="cpu")
        for number in range(2):
            run_traced_step(tracker, step, batches, sum(one.trained_tokens for one in batches), number=number)
    forecast = traced(model, "adamw-8bit", kind="cpu", mode=mode)
    assert forecast.peak().total_bytes == pytest.approx(tracker.ledger.peak().total_bytes, rel=0.001)
    updates = [
        [event.size_bytes for event in ledger.events if event.phase == "step 2: update"] for ledger in (forecast, tracker.ledger)
    ]
    assert highest(updates[0]) == pytest.approx(highest(updates[1]), rel=0.001)


def highest(changes: list[int]) -> int:
    return int(np.cumsum(changes).max())


@needs_bitsandbytes
@pytest.mark.filterwarnings("ignore")
def test_it_goes_on_as_if_it_had_not_stopped() -> None:
    def begin() -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layer = nn.Linear(96, 64)
        return layer, make_optimizer(dict(layer.named_parameters()), TrainingJob(optimizer="adamw-8bit"))

    def steps(layer: nn.Linear, optimizer: Any, numbers: range) -> None:
        for number in numbers:
            torch.manual_seed(number)
            for group in optimizer.param_groups:
                group["lr"] = 0.01
            layer(torch.randn(4, 96)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, optimizer = begin()
    steps(whole, optimizer, range(4))
    stopped, first = begin()
    steps(stopped, first, range(2))
    resumed, second = begin()
    resumed.load_state_dict(stopped.state_dict())
    pairs = zip(resumed.parameters(), stopped.parameters(), strict=True)
    for new, old in pairs:
        for key, value in state_of(first, old).items():
            put_state(second, new, key, value)
    steps(resumed, second, range(2, 4))
    assert torch.equal(resumed.weight, whole.weight)
