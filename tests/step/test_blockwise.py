"""bitsandbytes' optimizers on CUDA: what the forecast's stand-in keeps, and what is said where they cannot be."""

from __future__ import annotations

import importlib.util
from pathlib import Path

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
from sartor.kernels.compact import moments_bytes
from sartor.model import build, resolve
from sartor.predict import Ledger
from sartor.predict.target import Target
from sartor.predict.whole import trace_job
from sartor.step import Precision
from sartor.step.blockwise import BLOCK, SMALLEST, check_optimizer
from sartor.step.optim import make_optimizer


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


@pytest.mark.parametrize("mode", ["float32", "bf16-master"])
def test_on_a_cpu_the_forecast_has_what_the_optimizer_keeps(model: Path, mode: str) -> None:
    residual = 2 if mode == "bf16-master" else 0
    kept = sum(moments_bytes(size, eight_bit=True) + residual * size for size in sizes_of(model))
    assert traced(model, "adamw-8bit", kind="cpu", mode=mode).peak().by_kind["optimizer"] == pytest.approx(kept, rel=0.001)


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
        make_optimizer(dict(nn.Linear(3, 3).named_parameters()), TrainingJob(optimizer="adamw-8bit"), kind="cuda")
