"""How many processes a job gets on a CPU, and what each of them may take."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from machine_trees import xeon
from sartor.data.pack import shares
from sartor.errors import JobError
from sartor.job import from_mapping
from sartor.machine import Machine, probe
from sartor.machine.topology import read_topology
from sartor.plan import make
from sartor.plan.processes import part_of, possible_processes, with_sums
from sartor.predict.time import TimeForecast


def on_two_sockets(root: Path, threads: int = 56) -> Machine:
    return dataclasses.replace(probe(), topology=read_topology("Intel Xeon", xeon(root)), cores=112, threads=threads)


def job(**changes: Any) -> Any:
    tree = {"model": "unused", "data": "unused", "training": {"global_batch": 8}, "machine": {"device": "cpu"}}
    return from_mapping({**tree, **changes})


def test_one_a_cluster_that_this_process_may_use(tmp_path: Path) -> None:
    machine = on_two_sockets(tmp_path)
    assert possible_processes(job(), machine, range(112)) == [2, 1]
    assert possible_processes(job(), machine, range(28)) == [1]
    assert possible_processes(job(), on_two_sockets(tmp_path, threads=1), range(112)) == [1]
    assert possible_processes(job(training={"global_batch": 1}), machine, range(112)) == [1]
    assert possible_processes(job(strategy={"processes": 3}), machine, range(112)) == [3]
    assert possible_processes(job(), dataclasses.replace(machine, topology=None), range(112)) == [1]


@pytest.mark.parametrize(("changes", "said"), [({"global_batch": 3}, "3 examples a step"), ({}, "5 threads")])
def test_more_than_there_is_work_or_threads_for(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(JobError, match=said):
        possible_processes(job(strategy={"processes": 6}, training={"global_batch": 8, **changes}), on_two_sockets(tmp_path, 5))


def test_all_must_fit_together(job_tree: dict[str, Any], tmp_path: Path) -> None:
    """A machine with room for one process but not for two: auto takes one, with room for two it takes two."""
    topology = read_topology("Intel Xeon", xeon(tmp_path / "xeon"))
    here = dataclasses.replace(probe(), topology=topology, threads=2)
    loaded = from_mapping({**job_tree, "machine": {"device": "cpu"}, "strategy": {"micro_batch": 1}})
    needed = make(loaded, dataclasses.replace(here, topology=None)).forecast.process_bytes
    assert needed is not None
    room = int(1.6 * needed)
    device = dataclasses.replace(here.device, total_bytes=room, available_bytes=room)
    small = dataclasses.replace(here, device=device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["sartor.plan.processes"], "usable_cpus", lambda: frozenset(range(112)))
        plan = make(loaded, small)
        assert plan.strategy.processes == 1
        assert any(other.strategy.processes == 2 for other in plan.rejected)
        roomy = make(loaded, here)
        assert (roomy.strategy.processes, roomy.strategy.threads) == (2, 1)
        assert "2 processes of 1 thread" in roomy.strategy.describe()


def test_a_part_of_the_machine() -> None:
    machine = probe()
    assert part_of(machine, 1) is machine
    assert part_of(machine, 4).device.total_bytes == machine.device.total_bytes // 4


def test_time_counts_the_sums_and_every_update() -> None:
    one = TimeForecast(
        step_seconds=1.0,
        interval_seconds=(0.5, 1.5),
        tokens_per_second=100.0,
        sequences_per_second=10.0,
        mfu=0.5,
        breakdown={"compute": 0.9, "communication": 0.0, "bubble": 0.0, "optimizer": 0.1},
        job_hours=2.0,
    )
    two = with_sums(one, 2, 0.05)
    assert two.step_seconds == pytest.approx(1.0 + 0.1 + 0.05)
    assert sum(two.breakdown.values()) == pytest.approx(two.step_seconds)
    assert two.tokens_per_second == pytest.approx(100 / two.step_seconds)


@given(lengths=st.lists(st.integers(1, 500), min_size=1, max_size=40), ranks=st.integers(1, 8))
def test_examples_are_shared_out_evenly(lengths: list[int], ranks: int) -> None:
    array = np.array(lengths)
    parts = shares(np.arange(len(lengths)), array, ranks)
    assert sorted(index for part in parts for index in part) == list(range(len(lengths)))
    assert len(parts) == ranks
    assert max(map(len, parts)) <= -(-len(lengths) // ranks)
