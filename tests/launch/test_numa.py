"""Which cores and memory processes get, on machines that are not here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from machine_trees import laptop, xeon, xeon_max
from sartor.launch.numa import Place, bind, places
from sartor.machine.topology import read_topology


def test_one_process_a_cluster(tmp_path: Path) -> None:
    topology = read_topology("Intel Xeon", xeon(tmp_path))
    first, second = places(topology, range(112), 2, tmp_path)
    assert first == Place(cpus=(*range(28), *range(56, 84)))
    assert second == Place(cpus=(*range(28, 56), *range(84, 112)))


def test_clusters_are_divided_by_cores_and_joined_whole(tmp_path: Path) -> None:
    topology = read_topology("Intel Xeon", xeon(tmp_path))
    four = places(topology, range(112), 4, tmp_path)
    assert four[0].cpus == (*range(14), *range(56, 70))
    assert sorted(cpu for place in four for cpu in place.cpus) == list(range(112))
    (one,) = places(topology, range(112), 1, tmp_path)
    assert sorted(one.cpus) == list(range(112))
    three = places(topology, range(112), 3, tmp_path)
    assert sorted(cpu for place in three for cpu in place.cpus) == list(range(112))


def test_only_what_this_process_may_use(tmp_path: Path) -> None:
    topology = read_topology("Intel Xeon", xeon(tmp_path))
    assert [place.cpus for place in places(topology, {0, 1, 28}, 2, tmp_path)] == [(0, 1), (28,)]
    assert [place.cpus for place in places(topology, {3, 4}, 2, tmp_path)] == [(3,), (4,)]


def test_without_numa_cores_are_divided(tmp_path: Path) -> None:
    topology = read_topology("i7", laptop(tmp_path))
    two = places(topology, range(20), 2, tmp_path)
    assert sorted(cpu for place in two for cpu in place.cpus) == list(range(20))
    assert not set(two[0].cpus) & set(two[1].cpus)
    assert {0, 1} <= set(two[0].cpus)


@pytest.mark.parametrize(("mode", "memory"), [("flat", [2, 3]), ("cache", [None, None]), ("only", [None, None])])
def test_flat_high_bandwidth_memory_is_preferred(tmp_path: Path, mode: str, memory: list[int | None]) -> None:
    root = xeon_max(tmp_path, mode=mode)
    if mode == "flat":
        for node, distances in {0: "10 21 13 23", 1: "21 10 23 13"}.items():
            (root / f"sys/devices/system/node/node{node}/distance").write_text(distances)
    topology = read_topology("Intel(R) Xeon(R) CPU Max 9462", root)
    assert [place.memory for place in places(topology, range(128), 2, root)] == memory


def test_binding_is_of_all_threads_and_can_be_undone() -> None:
    before = os.sched_getaffinity(0)
    bind(Place(cpus=(min(before),)))
    try:
        assert os.sched_getaffinity(0) == {min(before)}
    finally:
        bind(Place(cpus=tuple(before)))
    assert os.sched_getaffinity(0) == before
