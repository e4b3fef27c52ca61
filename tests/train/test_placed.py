"""Jobs whose model does not fit in memory: planned onto the disk, with the same results and the same files."""

from __future__ import annotations

import copy
import json
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch.optim.optimizer import register_optimizer_step_pre_hook

import fresh
import sartor
from sartor.errors import DoesNotFit, StorageError
from sartor.plan.table import Table
from sartor.train import checkpoint, read_metrics


def run(tree: dict[str, Any], folder: Path, **strategy: Any) -> tuple[Any, list[float]]:
    tree = copy.deepcopy(tree)
    tree["output"] = str(folder)
    tree["strategy"] = {"micro_batch": 4, **strategy}
    plan = sartor.plan(tree)
    sartor.train(plan)
    return plan, [line["loss"] for line in read_metrics(folder) if "loss" in line]


@pytest.mark.parametrize(
    ("method", "precision", "recompute"),
    [("full", "float32", "none"), ("full", "bf16-master", "full"), ("lora", "float32", "full")],
)
def test_a_job_on_disk_is_the_same_job(
    job_tree: dict[str, Any], tmp_path: Path, method: str, precision: str, recompute: str
) -> None:
    job_tree |= {"method": method, "precision": precision}
    job_tree["training"] |= {"keep_best": True, "save_every": 3}
    job_tree["evaluation"] |= {"fraction": 0.2, "every": 3}
    _, wanted = run(job_tree, tmp_path / "plain", recompute=recompute)
    plan, losses = run(job_tree, tmp_path / "placed", recompute=recompute, placement="disk")
    assert isinstance(plan.strategy.placement.table, Table)
    assert plan.strategy.placement.disk_bytes > 0
    assert losses == wanted
    names = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    for name in (names, "state/optimizer.safetensors", "state/random.safetensors"):
        plain, placed = (tmp_path / where / "checkpoint-3" / name for where in ("plain", "placed"))
        assert plain.read_bytes() == placed.read_bytes(), name
    record = json.loads((tmp_path / "placed/run.json").read_text())
    assert record["memory"]["forecast_bytes"] == plan.forecast.process_bytes


@pytest.mark.parametrize("precision", ["float32", "bf16-master", "stochastic"])
def test_a_run_goes_on_elsewhere(job_tree: dict[str, Any], tmp_path: Path, precision: str | dict[str, str]) -> None:
    """Begun in memory, gone on with on disk from the second step's checkpoint, and in memory from what that run saved."""
    job_tree["training"] |= {"save_every": 2}
    if precision == "stochastic":
        precision = {"mode": "bf16", "rounding": "stochastic"}
        job_tree["training"]["optimizer"] = "adamw-8bit"
    job_tree |= {"precision": precision, "output": str(tmp_path / "run")}

    def trained(placement: str, *without: str) -> dict[str, dict[str, bytes]]:
        """What the last checkpoints hold, of a run that goes on where these are gone."""
        for name in without:
            shutil.rmtree(tmp_path / "run" / name)
            (tmp_path / "run/run.json").unlink(missing_ok=True)
        tree = {**job_tree, "strategy": {"micro_batch": 4, "placement": placement}}
        sartor.train(tree, resume="latest" if without else None)
        folders = [tmp_path / "run" / name for name in ("checkpoint-4", "checkpoint-6")]
        return {at.name: {path.name: path.read_bytes() for path in at.rglob("*.safetensors")} for at in folders}

    whole = trained("device")
    assert trained("disk", "checkpoint-4", "checkpoint-6") == whole
    assert trained("device", "checkpoint-6") == whole


def forecast_squeezed(job: dict[str, Any]) -> dict[str, Any]:
    """Planned with 128 MiB less than it would take. In a process of its own: what another holds is part of its forecast."""
    room = (sartor.plan(job).forecast.process_bytes or 0) - 2**27
    job["machine"]["host_memory"] = room
    plan = sartor.plan(job)
    placement, forecast = plan.strategy.placement, plan.forecast
    kept = any(row.stays or row.weights == "device" for row in placement.table.rows)
    told = {"verdict": forecast.verdict, "process": forecast.process_bytes, "words": plan.strategy.describe()}
    disk = [plan.to_mapping()["strategy"]["placement"]["disk_bytes"], placement.disk_bytes]
    return {**told, "room": room, "kept": kept, "disk": disk}


def widen(job_tree: dict[str, Any], tmp_path: Path, width: int) -> None:
    """A model of random weights so large that its states are what takes memory."""
    config = {**json.loads((Path(job_tree["model"]) / "config.json").read_text()), "hidden_size": width}
    config |= {"intermediate_size": 4 * width, "num_hidden_layers": 5, "head_dim": width // 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    job_tree["model"] = {"path": str(tmp_path / "config.json"), "tokenizer": job_tree["model"]}
    job_tree |= {"precision": "float32"}
    job_tree["strategy"] = {"micro_batch": 4, "recompute": "none"}


def test_what_does_not_fit_in_memory_goes_to_disk(job_tree: dict[str, Any], tmp_path: Path) -> None:
    """A machine with so little memory that the states alone are too much."""
    widen(job_tree, tmp_path, 512)
    told = fresh.call(forecast_squeezed, job_tree)
    assert told["verdict"] == "fits"
    assert told["process"] <= 0.9 * told["room"]
    assert told["kept"], "what fits stays"
    assert "on disk" in told["words"]
    assert told["disk"][0] == told["disk"][1] > 0


class Cap(sartor.Observer):
    """In the third step, the process may have `ROOM` bytes more than before, or less."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def stepped(self, record: Any) -> None:
        used = psutil.Process().memory_info().data
        room = used + ROOM if record.step == 2 else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_DATA, (room, resource.RLIM_INFINITY))

    def said(self, text: str) -> None:
        self.told.append(text)


def train_capped(job: dict[str, Any]) -> str:
    """What the run says."""
    cap = Cap()
    sartor.train(job, observers=[cap])
    return "\n".join(cap.told)


ROOM = -20 * 2**20
"""Without what the run keeps in reserve (64 MiB): more than a block needs in its update, less than three."""


def test_a_placed_run_that_runs_out_of_memory_goes_on_with_less(job_tree: dict[str, Any], tmp_path: Path) -> None:
    widen(job_tree, tmp_path, 256)
    job_tree["training"]["max_steps"] = 4
    _, wanted = run(job_tree, tmp_path / "plain", **job_tree["strategy"])
    job_tree["strategy"]["placement"] = "disk"
    said = fresh.call(train_capped, job_tree)
    assert "memory ran out in step 3" in said
    assert "Going on with" in said
    assert [line["loss"] for line in read_metrics(Path(job_tree["output"])) if "loss" in line] == wanted


def test_an_update_that_runs_out_of_memory_goes_on_with_less(job_tree: dict[str, Any], tmp_path: Path) -> None:
    job_tree["training"]["max_steps"] = 3
    job_tree["precision"] = "float32"
    _, wanted = run(job_tree, tmp_path / "plain")
    job_tree |= {"output": str(tmp_path / "run"), "strategy": {"micro_batch": 4, "placement": "disk"}}
    calls, told = 0, []

    class Told(sartor.Observer):
        def said(self, text: str) -> None:
            told.append(text)

    def short(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 6:  # at a row that is not the first
            raise MemoryError("can't allocate memory")

    hook = register_optimizer_step_pre_hook(short)
    try:
        sartor.train(job_tree, observers=[Told()])
    finally:
        hook.remove()
    assert any("memory ran out in step" in text and "Going on with the update" in text for text in told)
    assert [line["loss"] for line in read_metrics(tmp_path / "run") if "loss" in line] == wanted
    final = [(tmp_path / where / "checkpoint-3/model.safetensors").read_bytes() for where in ("plain", "run")]
    assert final[0] == final[1]


class Full(sartor.Observer):
    """After the fourth step, no file may be longer than this."""

    def stepped(self, record: Any) -> None:
        if record.step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2**13, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_disk_that_fails_leaves_the_last_checkpoint_intact(job_tree: dict[str, Any], tmp_path: Path) -> None:
    job_tree["training"] |= {"save_every": 3}
    _, wanted = run(job_tree, tmp_path / "plain")
    job_tree |= {"output": str(tmp_path / "run"), "strategy": {"micro_batch": 4, "placement": "disk"}}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(StorageError, match="could not write") as caught:
            sartor.train(job_tree, observers=[Full()])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "ulimit -f" in caught.value.remedy
    assert checkpoint.check(tmp_path / "run/checkpoint-3") == ""
    assert not (tmp_path / "run/checkpoint-4").exists()
    sartor.train(job_tree, resume="latest")
    assert [line["loss"] for line in read_metrics(tmp_path / "run") if "loss" in line] == wanted


def test_where_all_is_to_stay_in_memory_the_plan_says_what_the_disk_would_save(job_tree: dict[str, Any], tmp_path: Path) -> None:
    widen(job_tree, tmp_path, 512)
    job_tree["training"]["global_batch"] = 2
    job_tree |= {"strategy": {"micro_batch": 1, "recompute": "full", "placement": "device"}}
    forecast = sartor.plan(job_tree).forecast
    assert forecast.process_bytes is not None
    job_tree["machine"]["host_memory"] = forecast.process_bytes - 40 * 2**20
    with pytest.raises(DoesNotFit, match="does not fit") as caught:
        sartor.plan(job_tree)
    assert re.search(r"strategy.placement=auto: .*iB, saves .*iB, and .*iB on disk", caught.value.remedy)
    job_tree["strategy"]["placement"] = "auto"
    assert sartor.plan(job_tree).forecast.verdict in ("fits", "tight")


def test_where_not_even_the_disk_is_enough_the_plan_says_what_is(job_tree: dict[str, Any], tmp_path: Path) -> None:
    widen(job_tree, tmp_path, 64)
    job_tree["training"]["global_batch"] = 2
    job_tree |= {"precision": "bf16", "strategy": {"micro_batch": 1, "recompute": "full"}}
    job_tree["machine"]["host_memory"] = "64MiB"
    with pytest.raises(DoesNotFit, match="with everything on disk") as caught:
        sartor.plan(job_tree)
    named = re.search(r"machine.host_memory=(\d+)MiB", caught.value.remedy)
    assert named is not None
    job_tree["machine"]["host_memory"] = f"{1.2 * int(named[1])}MiB"  # what the process holds has grown since
    assert sartor.plan(job_tree).forecast.verdict in ("fits", "tight")
