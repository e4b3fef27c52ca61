"""Measured beside forecast on the accelerator that is here, each case in a process of its own. Skipped where there is none."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sartor.machine import probe
from sartor.predict.cuda import cuda_rules

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu/memory.py"
MOST_PERCENT = 3.0
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_cuda
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


@pytest.mark.gpu
@needs_cuda
def test_the_attention_kernel_is_the_one_that_is_forecast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    worker = importlib.import_module("memory_worker")
    for entry in worker.attention_kernels(probe().device):
        assert entry["chosen"] == entry["forecast"], entry
    for name in ("memory_worker", "memory_score"):
        sys.modules.pop(name)


@pytest.mark.gpu
@needs_cuda
def test_autocast_computes_as_the_rules_say() -> None:
    functional = torch.nn.functional
    operators: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
        "layer_norm": lambda half, weight: functional.layer_norm(half, (8,), weight),
        "rms_norm": lambda half, weight: functional.rms_norm(half, (8,), weight),
        "softmax": lambda half, weight: torch.softmax(half, -1),
        "log_softmax": lambda half, weight: torch.log_softmax(half, -1),
        "told": lambda half, weight: torch.softmax(half, -1, dtype=torch.bfloat16),
        "pow": lambda half, weight: half**3,
        "sum": lambda half, weight: half.sum(),
        "mean": lambda half, weight: half.mean(),
        "rsqrt": lambda half, weight: half.rsqrt(),
        "product": lambda half, weight: half @ half.T,
        "times": lambda half, weight: half * half,
        "gelu": lambda half, weight: functional.gelu(half),
        "dropout": lambda half, weight: functional.dropout(half, 0.5),
    }
    here, there = (
        (torch.ones(8, 8, dtype=torch.bfloat16, device=device), torch.ones(8, dtype=torch.bfloat16, device=device))
        for device in ("cpu", "cuda")
    )
    for name, operator in operators.items():
        with torch.autocast("cuda", dtype=torch.bfloat16):
            expected = operator(*there).dtype
        with torch.autocast("cpu", dtype=torch.bfloat16), cuda_rules(80):
            assert operator(*here).dtype == expected, name


def test_the_script_works_without_an_accelerator(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--only", "tiny-eager-hf", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.json")
    (result,) = json.loads(path.read_text(encoding="utf-8"))["results"]
    assert result["status"] == "measured", result
    assert result["forecast"]["allocated_bytes"] == result["measured"]["allocated_bytes"] > 0
    assert {"config", "job", "device", "capacity_bytes"} <= set(result)
