"""What a run is made of: the micro-batches that its forecast traces are those that bound the run's own steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import sartor
from sartor.data.order import BatchOrder
from sartor.data.pack import Batch, step_batches
from sartor.data.tokens import Sample, TokenSet
from sartor.parallel import Layout
from sartor.plan.setting import largest_steps
from sartor.plan.strategy import Strategy
from sartor.step import Precision


def samples(lengths: list[int], trained: list[int] | None = None) -> TokenSet:
    counts = trained or [length - 1 for length in lengths]
    return TokenSet.from_samples(
        Sample(input_ids=np.zeros(length, int), trained=np.arange(length) >= length - count, source=f"test:{length}")
        for length, count in zip(lengths, counts, strict=True)
    )


def strategy(micro_batch: int = 1, layout: Layout | None = None) -> Strategy:
    return Strategy(
        device="cpu",
        threads=1,
        precision=Precision.of("float32"),
        packing=False,
        row_capacity=64,
        micro_batch=micro_batch,
        recompute=False,
        attention=None,
        layout=layout or Layout(),
    )


def order(examples: int, batch: int, steps: int, seed: int = 0) -> BatchOrder:
    return BatchOrder(examples=examples, global_batch=batch, epochs=100, max_steps=steps, seed=seed)


def shapes(batches: Any) -> list[tuple[int, ...]]:
    return [batch.input_ids_RT.shape for batch in batches]


def size(batch: Batch) -> int:
    return int(batch.input_ids_RT.size)


@pytest.mark.parametrize("micro_batch", [1, 3])
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("seed", range(5))
def test_no_step_of_the_run_is_larger(seed: int, steps: int, micro_batch: int) -> None:
    lengths = np.random.default_rng(seed).integers(2, 60, size=40).tolist()
    data, plan = samples(lengths), order(40, 6, steps, seed)
    work = largest_steps(data, plan, strategy(micro_batch))
    assert bool(work.later) == (steps > 1)
    for number in range(steps):
        real = step_batches(data, plan.indices(number), capacity=64, packing=False, micro_batch=micro_batch, pad_id=0)
        first, *others = map(size, work.later if number else work.first)
        assert size(real[0]) <= first
        assert max(map(size, real[1:]), default=0) <= max(others, default=0)
    every = [plan.indices(number) for number in range(steps)]
    longest = max(lengths[index] for indices in every for index in indices)
    assert max(batch.input_ids_RT.shape[1] for batch in (*work.first, *work.later)) == longest, "and the largest is met"


def test_what_accumulates_is_what_comes_after_the_longest() -> None:
    data = samples([50] + [20] * 7)
    work = largest_steps(data, order(8, 4, 1000), strategy())
    assert shapes(work.later) == [(1, 50), (1, 20)]
    assert work.first is work.later, "one trace stands for all steps"


def test_a_first_step_that_is_larger_than_all_others_is_traced_for_itself() -> None:
    lengths = [20] * 8
    plan = order(8, 4, 2)
    lengths[int(plan.indices(0)[0])] = 50
    work = largest_steps(samples(lengths), plan, strategy())
    assert (shapes(work.first), shapes(work.later)) == ([(1, 50), (1, 20)], [(1, 20), (1, 20)])


def test_of_equal_sizes_that_with_more_targets() -> None:
    work = largest_steps(samples([30] * 4, trained=[2, 29, 3, 1]), order(4, 1, 1000), strategy())
    assert len(work.later[0].kept_K) == 29


def test_ranks_share_the_micro_batches_of_a_step() -> None:
    data = samples([50, 40, 30, 20])
    work = largest_steps(data, order(4, 4, 10), strategy(layout=Layout(shard=4)))
    assert shapes(work.later) == [(1, 50)]
    work = largest_steps(data, order(4, 4, 10), strategy(layout=Layout(pipeline=2)))
    assert shapes(work.later) == [(1, 50)] * 4


def test_a_run_of_one_step_never_computes_beside_the_optimizers_state(job_tree: dict[str, Any]) -> None:
    job_tree["strategy"] = {"micro_batch": 1, "recompute": "none"}
    job_tree["model"] += "/config.json"
    job_tree |= {"machine": "L40S-48GB", "data": {"synthetic": {"length": 100, "examples": 64}, "packing": False}}
    job_tree["training"]["max_steps"] = 1
    one = sartor.plan(job_tree).forecast
    job_tree["training"]["max_steps"] = 2
    two = sartor.plan(job_tree).forecast
    assert one.peak is not None
    assert two.peak is not None
    assert one.peak.by_kind["optimizer"] in (0, two.peak.by_kind["optimizer"])
    assert one.peak.total_bytes < two.peak.total_bytes
