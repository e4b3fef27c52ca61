"""The same runs on an accelerator: they train, resume exactly, and agree with the CPU. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import sartor
from sartor.train import read_metrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator"),
]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder) if "loss" in line]


@pytest.mark.parametrize("method", ["full", "lora", "prefix"])
@pytest.mark.parametrize("mode", ["float32", "bf16-mixed", "bf16"])
def test_an_accelerator_gives_the_losses_of_the_cpu(job_tree: dict[str, Any], tmp_path: Path, method: str, mode: str) -> None:
    job_tree |= {"method": method, "precision": mode, "prefix": {"length": 4}}
    sartor.train({**job_tree, "output": str(tmp_path / "cpu")})
    run = sartor.train({**job_tree, "machine": {"device": "auto"}, "output": str(tmp_path / "gpu")})
    tolerance = 1e-4 if mode == "float32" else 2e-2
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=tolerance)
    assert run.memory.measured_name == "peak allocated device memory"
    assert run.memory.measured_bytes > 0


def test_a_resumed_run_on_an_accelerator_goes_on(job_tree: dict[str, Any], tmp_path: Path) -> None:
    job_tree |= {"machine": {"device": "auto"}}
    job_tree["training"]["save_every"] = 3
    sartor.train({**job_tree, "output": str(tmp_path / "whole")})
    sartor.train(job_tree)
    resumed = sartor.train(job_tree, resume="checkpoint-3")
    assert resumed.steps == 6
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
