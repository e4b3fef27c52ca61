"""The time of a placed step: what moves costs what the disk takes, as far as computing does not hide it."""

from __future__ import annotations

import dataclasses

import pytest

from sartor.machine.calibration import DiskRate
from sartor.plan.placed_time import step_seconds
from sartor.plan.strategy import Placement
from sartor.plan.table import Sizes, uniform
from sartor.predict.time import TimeForecast

SIZES = tuple(Sizes(name=f"layers.{number}", weights=100, gradients=100, state=200) for number in range(4))
TABLE = uniform(SIZES, "disk")
PLACEMENT = Placement(table=TABLE, limit_bytes=10_000, update_limit_bytes=10_000, disk_bytes=1600)
TIME = TimeForecast(
    step_seconds=10.0,
    interval_seconds=(9.0, 11.0),
    tokens_per_second=1.0,
    sequences_per_second=1.0,
    mfu=0.5,
    breakdown={"compute": 9.0, "optimizer": 1.0},
    job_hours=1.0,
)


def disk(rate: float) -> DiskRate:
    return DiskRate(folder="here", direct=True, total_bytes=1, write_bytes_per_second=rate, read_bytes_per_second=rate)


def seconds(rate: float, placement: Placement = PLACEMENT, *, micro_batches: float = 1.0) -> float:
    return step_seconds(TIME, placement, SIZES, disk(rate), micro_batches=micro_batches, backward=2.0)


def test_a_fast_disk_costs_nothing() -> None:
    assert seconds(1e12) == pytest.approx(10.0)
    assert seconds(1e12, micro_batches=6.0) == pytest.approx(10.0)


def test_a_slow_disk_is_all_that_counts() -> None:
    """Forward reads weights, backward reads those of three rows again and writes gradients, the update reads all and writes
    weights and state."""
    moved = 400 + (300 + 400) + (1600 + 1200)
    assert seconds(0.001) == pytest.approx(moved / 0.001, rel=0.01)
    accumulated = moved + 400 + (300 + 400 + 400)  # a second micro-batch: gradients come back as well
    assert seconds(0.001, micro_batches=2.0) == pytest.approx(accumulated / 0.001, rel=0.01)


def test_what_is_not_fetched_ahead_is_waited_for() -> None:
    tight = dataclasses.replace(PLACEMENT, limit_bytes=400, update_limit_bytes=400)
    assert 10.0 < seconds(1000.0) < seconds(1000.0, tight)
    kept = dataclasses.replace(PLACEMENT, table=uniform(SIZES, "device"))
    assert seconds(1000.0, kept) == pytest.approx(10.0)
