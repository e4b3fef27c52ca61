"""A step that runs out of memory: the run says so, plans again, and comes to the same result."""

from __future__ import annotations

import contextlib
import io
import json
import resource
from pathlib import Path
from typing import Any

import psutil
import pytest

import fresh
import sartor
from sartor.errors import RunError
from sartor.train import read_metrics


class Cap(sartor.Observer):
    """From when the model is loaded: the process may have so many bytes more."""

    def __init__(self, room: int) -> None:
        self.room, self.told = room, list[str]()

    def loaded(self, *_: Any) -> None:
        used = psutil.Process().memory_info().data
        resource.setrlimit(resource.RLIMIT_DATA, (used + self.room, resource.RLIM_INFINITY))

    def said(self, text: str) -> None:
        self.told.append(text)


def train_capped(job: dict[str, Any], room_mib: int) -> tuple[bool, str]:
    """Whether the run came to its end, and what was said."""
    cap, errors, failed = Cap(room_mib * 2**20), io.StringIO(), list[str]()
    with contextlib.redirect_stderr(errors):
        try:
            sartor.train(job, observers=[cap])
        except RunError as error:
            failed = [str(error)]
    return not failed, "\n".join([*cap.told, *failed, errors.getvalue()])


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
        "training": {**job_tree["training"], "global_batch": 24, "max_steps": 2, "epochs": 4},
        "precision": "float32",
        "strategy": {"attention": "sdpa"},
    }


def test_a_run_that_runs_out_of_memory_goes_on_with_less(wide: dict[str, Any], tmp_path: Path) -> None:
    free = sartor.train({**wide, "output": str(tmp_path / "free"), "strategy": {**wide["strategy"], "micro_batch": 24}})
    assert free.steps == 2
    finished, said = fresh.call(train_capped, wide, 90)
    assert finished, said
    assert "memory ran out in step 1" in said
    assert "Going on with" in said
    losses = [[line["loss"] for line in read_metrics(Path(run)) if "loss" in line] for run in (free.folder, wide["output"])]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4), "the global batch stayed"


def test_where_nothing_smaller_is_left_the_run_says_so(wide: dict[str, Any]) -> None:
    pinned = {"micro_batch": 24, "recompute": "none", "attention": "sdpa"}
    finished, said = fresh.call(train_capped, {**wide, "strategy": pinned}, 90)
    assert not finished
    assert "memory ran out in step 1" in said
    assert "Traceback" not in said
