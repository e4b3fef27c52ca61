"""Killed, stopped, damaged: a run goes on as if nothing had happened, or says what is wrong."""

from __future__ import annotations

import dataclasses
import os
import random
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

import fresh
import sartor
from sartor.errors import Interrupted, RunError
from sartor.plan import Plan
from sartor.train import read_metrics


def weights(folder: str | Path) -> dict[str, Any]:
    return load_file(Path(folder) / "model.safetensors")


def losses(folder: str | Path) -> list[float]:
    return [line["loss"] for line in read_metrics(Path(folder)) if "loss" in line]


def assert_same_run(one: str | Path, other: str | Path) -> None:
    """Bit for bit: every loss, every weight."""
    assert losses(one) == losses(other)
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.equal(second[name]), name


def planned(tree: dict[str, Any], tmp_path: Path) -> tuple[Plan, Plan]:
    """The plan of a run to stop and go on with, and that of the whole one."""
    plan = sartor.plan(tree)
    return plan, dataclasses.replace(plan, job=dataclasses.replace(plan.job, output=str(tmp_path / "whole")))


class StopAt(sartor.Observer):
    """Sends this process a signal when a step is done."""

    def __init__(self, step: int, number: signal.Signals) -> None:
        self.step, self.number = step, number

    def stepped(self, record: Any) -> None:
        if record.step == self.step:
            os.kill(os.getpid(), self.number)


def test_a_signal_finishes_the_step_saves_and_the_run_goes_on_exactly(job_tree: dict[str, Any], tmp_path: Path) -> None:
    """Twice in one run, by one signal and by the other."""
    whole = sartor.train({**job_tree, "output": str(tmp_path / "whole")})
    for number, step, resume in ((signal.SIGINT, 2, None), (signal.SIGTERM, 4, "latest")):
        with pytest.raises(Interrupted) as stopped:
            sartor.train(job_tree, resume=resume, observers=[StopAt(step, number)])
        assert stopped.value.exit_code == 128 + number
        assert (tmp_path / f"run/checkpoint-{step}").is_dir()
    resumed = sartor.train(job_tree, resume="latest")
    assert resumed.steps == whole.steps == 6
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def as_command(*words: str) -> None:
    """`python -m sartor` and these words, in this process."""
    sys.argv = ["sartor", *words]
    runpy.run_module("sartor", run_name="__main__")


@pytest.mark.slow
def test_killed_at_a_random_moment_and_resumed_is_the_uninterrupted_run(job_tree: dict[str, Any], tmp_path: Path) -> None:
    job_tree["training"] |= {"epochs": 12, "save_every": 7}
    whole = {**job_tree, "output": str(tmp_path / "whole")}
    job_file = tmp_path / "job.yaml"
    job_file.write_text(yaml.safe_dump(job_tree), encoding="utf-8")
    sartor.train(whole)
    metrics = tmp_path / "run/metrics.jsonl"
    kill_after = random.randint(8, 24)
    process, told = fresh.start(as_command, "train", str(job_file))
    deadline = time.monotonic() + 120
    while len(losses(tmp_path / "run")) < kill_after:
        assert process.is_alive(), f"the run ended before it was killed: {told.recv() if told.poll() else ''}"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    told.close()
    reached = len(losses(tmp_path / "run"))
    assert kill_after <= reached < 36
    sartor.train(job_tree, resume="latest")
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    assert metrics.exists()


@pytest.mark.parametrize("precision", ["float32", "bf16-mixed", "bf16-master"])
def test_every_precision_resumes_exactly(job_tree: dict[str, Any], tmp_path: Path, precision: str) -> None:
    job_tree |= {"precision": precision, "strategy": {"micro_batch": 4}}
    plan, whole = planned(job_tree, tmp_path)
    sartor.train(whole)
    with pytest.raises(Interrupted):
        sartor.train(plan, observers=[StopAt(3, signal.SIGTERM)])
    sartor.train(plan, resume="latest")
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    states = [load_file(tmp_path / run / "checkpoint-6/state/optimizer.safetensors") for run in ("whole", "run")]
    assert all(states[0][name].equal(states[1][name]) for name in states[0])
    residuals = [name for name in states[0] if name.endswith("|residual")]
    assert bool(residuals) == (precision == "bf16-master")
    assert all(states[0][name].count_nonzero() for name in residuals)


@pytest.mark.parametrize("precision", ["float32", "bf16-master"])
@pytest.mark.parametrize("method", ["lora", "prefix", "prompt"])
def test_adapters_resume_exactly_with_dropout(job_tree: dict[str, Any], tmp_path: Path, method: str, precision: str) -> None:
    job_tree["precision"] = precision
    job_tree |= {"method": method, "lora": {"dropout": 0.1}, "prefix": {"length": 4, "projection": True}, "prompt": {"length": 4}}
    job_tree["training"]["save_every"] = 3
    plan, whole = planned(job_tree, tmp_path)
    sartor.train(whole)
    with pytest.raises(Interrupted):
        sartor.train(plan, observers=[StopAt(3, signal.SIGTERM)])
    sartor.train(plan, resume="latest")
    assert losses(tmp_path / "whole") == losses(tmp_path / "run")
    state = "checkpoint-6/state/trained.safetensors"
    one, other = load_file(tmp_path / "whole" / state), load_file(tmp_path / "run" / state)
    assert all(one[name].equal(other[name]) for name in one)


def _damage(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        byte = file.read(1)
        file.seek(-100, os.SEEK_END)
        file.write(bytes([byte[0] ^ 0xFF]))


def test_a_damaged_checkpoint_is_noticed_and_the_one_before_taken(job_tree: dict[str, Any], tmp_path: Path) -> None:
    job_tree["training"]["save_every"] = 2
    sartor.train({**job_tree, "output": str(tmp_path / "whole")})
    with pytest.raises(Interrupted):
        sartor.train(job_tree, observers=[StopAt(4, signal.SIGTERM)])
    damaged = tmp_path / "run/checkpoint-4/state/optimizer.safetensors"
    _damage(damaged)
    said: list[str] = []

    class Listener(sartor.Observer):
        def said(self, text: str) -> None:
            said.append(text)

    with pytest.raises(RunError, match=r"optimizer\.safetensors has changed"):
        sartor.train(job_tree, resume="checkpoint-4")
    sartor.train(job_tree, resume="latest", observers=[Listener()])
    assert any("checkpoint-4 is damaged" in text for text in said)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_half_written_checkpoint_is_passed_over(job_tree: dict[str, Any], tmp_path: Path) -> None:
    job_tree["training"]["save_every"] = 2
    with pytest.raises(Interrupted):
        sartor.train(job_tree, observers=[StopAt(4, signal.SIGTERM)])
    weights_file = tmp_path / "run/checkpoint-4/model.safetensors"
    os.truncate(weights_file, weights_file.stat().st_size // 2)
    (tmp_path / "run/.checkpoint-5.partial").mkdir()  # what kill -9 in the middle of a save leaves
    run = sartor.train(job_tree, resume="latest")
    assert run.status == "finished"


def test_another_job_is_not_resumed(job_tree: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        sartor.train(job_tree, observers=[StopAt(2, signal.SIGTERM)])
    job_tree["training"]["learning_rate"] = 5e-4
    with pytest.raises(RunError, match="not the run that was stopped"):
        sartor.train(job_tree, resume="latest")


def test_keeps_the_last_checkpoints_and_ends_with_the_best(job_tree: dict[str, Any], tmp_path: Path) -> None:
    job_tree["training"] |= {"epochs": 6, "save_every": 3, "keep_last": 2, "keep_best": True, "learning_rate": 0.05}
    job_tree["evaluation"] |= {"fraction": 0.3, "every": 3}
    run = sartor.train(job_tree)
    evaluated = {line["step"]: line["eval_loss"] for line in read_metrics(tmp_path / "run") if "eval_loss" in line}
    del evaluated[0]
    best = min(evaluated, key=evaluated.__getitem__)
    assert run.checkpoint == f"checkpoint-{best}"
    kept = {int(path.name.removeprefix("checkpoint-")) for path in (tmp_path / "run").glob("checkpoint-*")}
    assert kept == {best} | set(sorted(range(3, run.steps + 1, 3))[-2:])
    for name, tensor in weights(tmp_path / "run").items():
        assert tensor.equal(weights(tmp_path / f"run/checkpoint-{best}")[name])
