"""Estimates that rank candidates on a CPU are the forecasts of the same candidates, or nearly so."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

import sartor
from sartor.job.schema import MachineJob
from sartor.kernels.native import products_library
from sartor.machine import probe
from sartor.machine.calibration import CALIBRATION_VERSION, Calibration, calibration_key, save_calibration
from support import BASE, device_rates


@pytest.mark.skipif(products_library() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("packing", [True, False])
def test_estimates_of_ragged_data_are_its_forecasts(tmp_path: Path, packing: bool) -> None:
    LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2
    ).save_pretrained(tmp_path)  # fmt: skip
    known: dict[str, Any] = {"version": CALIBRATION_VERSION, "measured": "2026-11-21", "seconds": 1.0}
    save_calibration(Calibration(**known, key=calibration_key(probe(MachineJob(device="cpu"))), device=device_rates()))
    source, text = random.Random(0), tmp_path / "text.txt"
    text.write_text("\n".join("a " * source.randint(20, 160) for _ in range(64)), encoding="utf-8")
    tree: dict[str, Any] = {
        "model": {"path": str(tmp_path / "config.json"), "tokenizer": str(BASE), "random_weights": True},
        "data": {"path": str(text), "documents": "lines", "max_length": 160, "packing": packing},
        "training": {"epochs": 1, "global_batch": 8},
        "strategy": {"recompute": "none"},
        "machine": {"device": "cpu"},
    }
    plan = sartor.plan(tree)
    estimated = {other.strategy.micro_batch: other.step_seconds for other in plan.rejected}
    size = max(estimated)
    pinned = sartor.plan({**tree, "strategy": {"recompute": "none", "micro_batch": size}})
    assert pinned.time is not None
    off = "with attention of whole rows 15 % off where padded"
    assert estimated[size] == pytest.approx(pinned.time.step_seconds, rel=0.06), off
