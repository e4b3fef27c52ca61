"""A step that runs out of memory: the run says so, plans again, and comes to the same result."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import sartor
from sartor.train import read_metrics

_CAPPED = """
import json, resource, sys
import psutil, sartor

class Cap(sartor.Observer):
    # From when the model is loaded: the process may have so many bytes more.
    def loaded(self, *_):
        used = psutil.Process().memory_info().data
        resource.setrlimit(resource.RLIMIT_DATA, (used + int(sys.argv[2]), resource.RLIM_INFINITY))

    def said(self, text):
        print(text)

try:
    run = sartor.train(json.loads(sys.argv[1]), observers=[Cap()])
except sartor.errors.RunError as error:
    print(error)
    sys.exit(3)
"""


@pytest.fixture
def wide(job_tree: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A step whose activations take 150 MiB at once and a tenth of that row by row."""
    config = json.loads((Path(job_tree["model"]) / "config.json").read_text())
    path = tmp_path / "wide.json"
    path.write_text(json.dumps({**config, "intermediate_size": 2048, "num_hidden_layers": 6}), encoding="utf-8")
    return {
        **job_tree,
        "model": {"path": str(path), "tokenizer": job_tree["model"]},
        "data": {**job_tree["data"], "packing": False},
        "training": {**job_tree["training"], "global_batch": 24, "max_steps": 3, "epochs": 4},
        "precision": "float32",
        "strategy": {"attention": "sdpa"},
    }


def run_capped(job: dict[str, Any], room_mib: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _CAPPED, json.dumps(job), str(room_mib * 2**20)], capture_output=True, text=True, check=False
    )


def test_a_run_that_runs_out_of_memory_goes_on_with_less(wide: dict[str, Any], tmp_path: Path) -> None:
    free = sartor.train({**wide, "output": str(tmp_path / "free")})
    assert free.steps == 3
    done = run_capped(wide, 90)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "memory ran out in step 1" in done.stdout
    assert "Going on with" in done.stdout
    losses = [[line["loss"] for line in read_metrics(Path(run)) if "loss" in line] for run in (free.folder, wide["output"])]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4), "the global batch stayed"


def test_where_nothing_smaller_is_left_the_run_says_so(wide: dict[str, Any]) -> None:
    done = run_capped({**wide, "strategy": {"micro_batch": 24, "recompute": "none", "attention": "sdpa"}}, 90)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "memory ran out in step 1" in done.stdout
    assert "Traceback" not in done.stderr
