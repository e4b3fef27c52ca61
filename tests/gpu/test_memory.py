"""Measured beside forecast on the accelerator that is here, each case in a process of its own. Skipped where there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu/memory.py"
MOST_PERCENT = 3.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_small_models_need_what_was_forecast(tmp_path: Path) -> None:
    names = ["small-bf16", "small-gqa-bf16"]
    command = [sys.executable, str(SCRIPT), "--only", *names, "--history", "--out", str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    assert [result["name"] for result in results] == names
    for result in results:
        assert result["status"] == "measured", result
        assert not result["forecast"]["cuda_had_started"]
        for figure in ("allocated_bytes", "active_bytes", "reserved_bytes"):
            measured, forecast = result["measured"][figure], result["forecast"][figure]
            assert forecast == pytest.approx(measured, rel=MOST_PERCENT / 100), (result["name"], figure)


def test_the_script_works_without_an_accelerator(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--only", "tiny-eager-hf", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    (result,) = json.loads(path.read_text(encoding="utf-8"))["results"]
    assert result["status"] == "measured", result
    assert result["forecast"]["allocated_bytes"] == result["measured"]["allocated_bytes"] > 0
    assert {"config", "job", "device", "capacity_bytes"} <= set(result)
