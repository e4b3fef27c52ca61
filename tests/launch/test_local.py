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
from sartor.step import World
from sartor.train import fit, read_metrics
from sartor.train.loop import assist


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


def same_files(one: Path, two: Path) -> None:
    """The optimizer's state has the same names, formats and shapes, and close to the same values."""
    states, others = (load_file(folder / "state/optimizer.safetensors") for folder in (one, two))
    assert states.keys() == others.keys()
    for key, tensor in states.items():
        torch.testing.assert_close(tensor, others[key], rtol=1e-2, atol=1e-6, msg=key)


@pytest.fixture
def tree(job_tree: dict[str, Any]) -> dict[str, Any]:
    """Odd numbers everywhere: 19 examples, 7 a step, so that the last step of an epoch has 5 and ranks accumulate differently."""
    job_tree["training"] |= {"global_batch": 7, "save_every": 1, "optimizer": "adamw"}
    job_tree["evaluation"] |= {"fraction": 0.2}
    return {**job_tree, "precision": "float32", "strategy": {"micro_batch": 1}}


def test_a_launchers_processes_make_the_run_of_one(tree: dict[str, Any], tmp_path: Path) -> None:
    """Full fine-tuning, stopped by a signal to one rank, resumed by one process alone, stopped again and resumed by two."""
    sartor.train({**tree, "output": str(tmp_path / "one")})
    shared = {**tree, "strategy": {**tree["strategy"], "processes": 2}, "output": str(tmp_path / "two")}
    shared["machine"] = {**tree["machine"], "threads": 2}
    if sartor.probe().cores < 2:
        pytest.skip("two processes need two processors")
    told = on_ranks(2, take_part, shared, None, 2)
    assert "stopped by signal 15 after step 2 of 6" in told[0]
    assert len(read_metrics(tmp_path / "two")) == 3
    alone = {**shared, "strategy": tree["strategy"]}
    with pytest.raises(Interrupted):
        sartor.train(alone, resume="latest", observers=[At(4, lambda: os.kill(os.getpid(), signal.SIGTERM))])
    on_ranks(2, take_part, shared, "latest", 0)
    same_files(tmp_path / "one/checkpoint-6", tmp_path / "two/checkpoint-6")
    same_runs(tmp_path / "one", tmp_path / "two", "model.safetensors")


def test_a_lost_process_ends_the_run_and_it_goes_on(tree: dict[str, Any], tmp_path: Path) -> None:
    if sartor.probe().cores < 2:
        pytest.skip("two processes need two processors")
    tree = {**tree, "method": "lora", "lora": {"rank": 2}}
    sartor.train({**tree, "output": str(tmp_path / "one")})
    shared = {**tree, "strategy": {**tree["strategy"], "processes": 2}, "output": str(tmp_path / "two")}
    shared["machine"] = {**tree["machine"], "threads": 2}
    affinity = os.sched_getaffinity(0)

    def lose() -> None:
        (child,) = (one for one in psutil.Process().children() if "sartor.launch" in one.cmdline())
        assert len(child.cpu_affinity() or []) == len(affinity) // 2
        child.kill()

    with pytest.raises(RunError, match=r"process 1 of 2 ended \(signal 9\)"):
        sartor.train(shared, observers=[At(2, lose)])
    assert os.sched_getaffinity(0) == affinity
    assert not [one for one in psutil.Process().children() if "sartor.launch" in one.cmdline()]
    run = sartor.train(shared, resume="latest")
    assert run.status == "finished"
    same_runs(tmp_path / "one", tmp_path / "two", "adapter_model.safetensors")
