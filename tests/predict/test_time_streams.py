"""Streams, rings and pipelines against what can be worked out by hand."""

from __future__ import annotations

from random import Random

import pytest

from sartor.predict.operations import Group
from sartor.predict.streams import Block, Link, Network, collective_seconds, run_blocks, run_pipeline


def simulated(blocks: list[Block]) -> float:
    """As `run_blocks`, task by task: (stream, seconds, tasks that have to be done)."""
    tasks: list[tuple[str, float, list[int]]] = []
    gathers = [block.gather for block in blocks if block.gather]
    gathered: list[int] = []
    last: list[int] = []

    def gather() -> None:
        if len(gathered) < len(gathers):
            tasks.append(("communication", gathers[len(gathered)], list(last)))
            gathered.append(len(tasks) - 1)

    gather()
    for block in blocks:
        waits = []
        if block.gather:
            waits = [gathered[-1]]
            gather()
        tasks.append(("compute", block.compute + block.inline, waits))
        last = [len(tasks) - 1]
        if block.reduce:
            tasks.append(("communication", block.reduce, list(last)))
    free: dict[str, float] = {}
    ends: list[float] = []
    for stream, seconds, after in tasks:
        ends.append(max([free.get(stream, 0.0), *(ends[place] for place in after)]) + seconds)
        free[stream] = ends[-1]
    return max(ends, default=0.0)


def test_blocks_take_what_a_simulation_of_two_streams_takes() -> None:
    random = Random(1)
    for length in range(200):
        blocks = [Block(*(random.choice([0.0, random.random()]) for _ in range(4))) for _ in range(length % 9)]
        assert run_blocks(blocks).seconds == pytest.approx(simulated(blocks))


def test_rings() -> None:
    link = Link(alpha_seconds=1e-3, bytes_per_second=1e9)
    group = Group(4, 1)
    assert collective_seconds("all_gather", 10**9, group, link) == pytest.approx(0.75 + 3e-3)
    assert collective_seconds("reduce_scatter", 10**9, group, link) == pytest.approx(0.75 + 3e-3)
    assert collective_seconds("all_reduce", 10**9, group, link) == pytest.approx(1.5 + 6e-3)
    assert collective_seconds("send", 10**9, Group(2, 1), link) == pytest.approx(1 + 1e-3)
    assert collective_seconds("all_reduce", 10**9, Group(1, 1), link) == 0


def test_groups_share_the_network_of_a_node() -> None:
    network = Network(
        devices_per_node=8,
        inside=Link(alpha_seconds=1e-6, bytes_per_second=300e9),
        between=Link(alpha_seconds=1e-5, bytes_per_second=50e9),
    )
    beside = network.link(Group(8, 1))
    assert beside is not None
    assert beside.bytes_per_second == 300e9
    rates = {}
    for group in (Group(16, 1), Group(2, 8), Group(4, 4)):
        link = network.link(group)
        assert link is not None
        rates[group] = link.bytes_per_second
    # All 16 devices in one ring have the node's network; one rank a node shares it with seven other rings.
    assert rates == {Group(16, 1): 50e9, Group(2, 8): 50e9 / 8, Group(4, 4): 50e9 / 4}
    assert Network(devices_per_node=8).link(Group(16, 1)) is None


def test_communication_hides_behind_computation() -> None:
    alone = run_blocks([Block(1.0)] * 10)
    assert (alone.seconds, alone.exposed) == (10, 0)
    gathered = run_blocks([Block(1.0, gather=0.5)] * 10)
    assert gathered.exposed == pytest.approx(0.5), "only the first one's is waited for"
    slow = run_blocks([Block(1.0, gather=1.5)] * 10)
    assert slow.seconds == pytest.approx(10 * 1.5 + 1.0)
    reduced = run_blocks([Block(1.0, reduce=0.5)] * 10)
    assert reduced.exposed == pytest.approx(0.5), "the last one's"
    assert run_blocks([Block(1.0, inline=0.25)] * 10).exposed == pytest.approx(2.5)


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 4), (2, 4), (4, 4), (4, 16), (8, 8)])
def test_bubbles_of_gpipe_and_1f1b(stages: int, micro_batches: int) -> None:
    """(p - 1) / m of the work (Narayanan et al. 2021, section 2.2)."""
    work = micro_batches * (1.0 + 2.0)
    for schedule in ("gpipe", "1f1b"):
        seconds = run_pipeline([1.0] * stages, [2.0] * stages, ranks=stages, micro_batches=micro_batches, schedule=schedule)
        assert seconds == pytest.approx(work * (1 + (stages - 1) / micro_batches))


@pytest.mark.parametrize(("ranks", "chunks", "micro_batches"), [(2, 2, 4), (4, 2, 8), (4, 3, 16)])
def test_interleaving_divides_the_bubble(ranks: int, chunks: int, micro_batches: int) -> None:
    stages = ranks * chunks
    work = micro_batches * 3.0
    seconds = run_pipeline(
        [1.0 / chunks] * stages, [2.0 / chunks] * stages, ranks=ranks, micro_batches=micro_batches, schedule="interleaved"
    )
    assert seconds == pytest.approx(work * (1 + (ranks - 1) / micro_batches / chunks))


def test_the_slowest_stage_sets_the_pace() -> None:
    seconds = run_pipeline([1.0, 2.0, 1.0], [2.0, 4.0, 2.0], ranks=3, micro_batches=20, schedule="1f1b")
    assert 20 * 6 < seconds < 20 * 6 + 2 * 6
    waiting = run_pipeline([1.0] * 4, [2.0] * 4, ranks=4, micro_batches=8, schedule="1f1b", send_seconds=0.1)
    assert waiting > run_pipeline([1.0] * 4, [2.0] * 4, ranks=4, micro_batches=8, schedule="1f1b")
