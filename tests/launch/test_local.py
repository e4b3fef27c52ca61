"""Two processes against one: the same run, and one clear end when a process is lost."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

import sartor
from ranks import on_ranks
from sartor.errors import Interrupted, RunError
from sartor.job.schema import MachineJob
from sartor.machine.calibration import (
    CALIBRATION_VERSION,
    Calibration,
    calibration_key,
    load_calibration,
    save_calibration,
)
from sartor.step import World
from sartor.train import fit, read_metrics
from sartor.train.loop import assist
from support import device_rates


class At(sartor.Observer):
    """Does something when a step is done."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def stepped(self, record: Any) -> None:
        if record.step == self.step:
            self.action()


def take_part(rank: int, tree: dict[str, Any], resume: str | None, stop_at: int) -> str:
    """A run as a launcher's processes have it. `stop_at`: a step after which the last rank is asked to stop."""
    world = World(rank, 2)
    try:
        if rank:
            assist(world)
        else:
            stop = At(stop_at, lambda: os.kill(os.getpid(), signal.SIGTERM))
            fit(sartor.plan(tree), resume=resume, observers=[stop], world=world)
    except Interrupted as error:
        return str(error)
    return ""


def same_runs(one: Path, two: Path, name: str) -> None:
    for ours, other in zip(read_metrics(one), read_metrics(two), strict=True):
        assert ours.get("loss", 0) == pytest.approx(other.get("loss", 0), rel=1e-5)
        assert ours.get("eval_loss", 0) == pytest.approx(other.get("eval_loss", 0), rel=1e-5)
        assert ours.get("tokens") == other.get("tokens")
    weights, others = load_file(one / name), load_file(two / name)
    for key, tensor in weights.items():
        torch.testing.assert_close(tensor, others[key], rtol=1e-3, atol=2e-5, msg=key)


@pytest.fixture
def tree(job_tree: dict[str, Any]) -> dict[str, Any]:
    """Odd numbers everywhere: 19 examples, 7 a step, so that the last step of an epoch has 5 and ranks accumulate differently."""
    job_tree["training"] |= {"global_batch": 7, "save_every": 1, "optimizer": "adamw"}
    job_tree["evaluation"] |= {"fraction": 0.2}
    return {**job_tree, "precision": "float32", "strategy": {"micro_batch": 1}}


def test_a_launchers_processes_make_the_run_of_one(tree: dict[str, Any], tmp_path: Path) -> None:
    """Full fine-tuning, stopped by a signal to one rank and resumed."""
    sartor.train({**tree, "output": str(tmp_path / "one")})
    shared = {**tree, "strategy": {**tree["strategy"], "processes": 2}, "output": str(tmp_path / "two")}
    shared["machine"] = {**tree["machine"], "threads": 2}
    if sartor.probe().cores < 2:
        pytest.skip("two processes need two processors")
    told = on_ranks(2, take_part, shared, None, 2)
    assert "stopped by signal 15 after step 2 of 6" in told[0]
    assert len(read_metrics(tmp_path / "two")) == 3
    on_ranks(2, take_part, shared, "latest", 0)
    same_runs(tmp_path / "one", tmp_path / "two", "model.safetensors")


def test_a_lost_process_ends_the_run_and_it_goes_on(tree: dict[str, Any], tmp_path: Path) -> None:
    if sartor.probe().cores < 2:
        pytest.skip("two processes need two processors")
    tree = {**tree, "method": "lora", "lora": {"rank": 2}}
    sartor.train({**tree, "output": str(tmp_path / "one")})
    shared = {**tree, "strategy": {**tree["strategy"], "processes": 2}, "output": str(tmp_path / "two")}
    shared["machine"] = {**tree["machine"], "threads": 2}
    machine = sartor.probe(MachineJob(**shared["machine"]))
    affinity = os.sched_getaffinity(0)

    def lose() -> None:
        (child,) = (one for one in psutil.Process().children() if "sartor.launch" in one.cmdline())
        assert len(child.cpu_affinity() or []) == len(affinity) // 2
        child.kill()

    with pytest.raises(RunError, match=r"process 1 of 2 ended \(signal 9\)"):
        sartor.train(shared, observers=[At(2, lose)])
    assert os.sched_getaffinity(0) == affinity
    assert not [one for one in psutil.Process().children() if "sartor.launch" in one.cmdline()]
    rates = Calibration(
        version=CALIBRATION_VERSION, key=calibration_key(machine), measured="2026-11-21", seconds=1.0, device=device_rates()
    )
    save_calibration(rates)
    run = sartor.train(shared, resume="latest")
    assert run.status == "finished"
    kept = load_calibration(machine)
    assert kept is not None
    assert [(rate.name, rate.ranks) for rate in kept.collectives] == [("all_reduce", 2)]
    same_runs(tmp_path / "one", tmp_path / "two", "adapter_model.safetensors")
