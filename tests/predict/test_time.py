"""Seconds of a step: from rates that make the sums easy, and from rates of both kinds."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from sartor.data.pack import Batch
from sartor.job import from_mapping
from sartor.machine.calibration import Calibration
from sartor.machine.catalogue import lookup
from sartor.parallel import Layout
from sartor.predict.operations import VIEW, Operation, Operations
from sartor.predict.rates import CalibratedRates, CatalogueRates
from sartor.predict.shapes import Shape, blank_batch
from sartor.predict.stages import trace_stages
from sartor.predict.streams import Link, Network
from sartor.predict.target import Target
from sartor.predict.time import Expenses, Work, expenses_of, forecast_time, network_of
from sartor.predict.whole import trace_job
from sartor.step import Precision
from support import device_rates

from .test_repeat import source

FLOPS = 1e9
NETWORK = Network(
    devices_per_node=8,
    inside=Link(alpha_seconds=0.0, bytes_per_second=1e9),
    between=Link(alpha_seconds=0.0, bytes_per_second=1e8),
)


class ByFlops:
    """A device on which nothing but arithmetic takes time."""

    spread = 0.1

    def seconds(self, operation: Operation, kind: str) -> float:
        return operation.flops / FLOPS

    def during(self, footprint: int, *, compiled: bool = False) -> ByFlops:
        return self

    def peak(self, dtype: str) -> float:
        return 2 * FLOPS


def options(**changes: Any) -> dict[str, Any]:
    return {"precision": Precision.of("float32"), "recompute": False, "attention": None, **changes}


def batches(count: int) -> list[Batch]:
    return [blank_batch(Shape(2, 32, 31), packing=False)] * count


def traced(method: str = "full", *, micro_batches: int = 1, **changes: Any) -> Operations:
    job = from_mapping({"model": "unused", "data": "unused", "method": method})
    return trace_job(job, source("llama"), batches(micro_batches), Target(kind="cpu"), **options(**changes)).operations


def work(micro_batches: int = 1, **changes: Any) -> Work:
    return Work(**{"micro_batches": micro_batches, "tokens": 64.0, "sequences": 2.0, "total_steps": 10, **changes})


def forecast(operations: Operations, made: Work, layout: Layout | None = None, **changes: Any) -> Any:
    given = {"rates": ByFlops(), "network": NETWORK, "layout": layout or Layout(), "work": made, **changes}
    return forecast_time({0: operations}, **given)


def test_a_step_takes_as_long_as_its_arithmetic() -> None:
    one, two = traced(), traced(micro_batches=2)
    flops = one.step().total("flops")
    single = forecast(one, work())
    assert single.step_seconds == pytest.approx(flops / FLOPS)
    assert single.mfu == pytest.approx(0.5), "the peak is twice the rate"
    assert single.tokens_per_second == pytest.approx(64 / single.step_seconds)
    assert single.job_hours == pytest.approx(10 * single.step_seconds / 3600)
    assert sum(single.breakdown.values()) == pytest.approx(single.step_seconds)
    for count in (2, 3, 7, 100):
        for operations in (one, two):
            assert forecast(operations, work(count)).step_seconds == pytest.approx(count * flops / FLOPS)
    assert forecast(one, work(scale=0.5)).step_seconds == pytest.approx(0.5 * flops / FLOPS)


def test_recomputation_takes_time_but_counts_for_nothing() -> None:
    plain, again = forecast(traced(), work()), forecast(traced(recompute=True), work())
    assert 1.2 < again.step_seconds / plain.step_seconds < 1.34
    assert again.mfu * again.step_seconds == pytest.approx(plain.mfu * plain.step_seconds)


def test_an_hour_has_its_price() -> None:
    made = forecast(traced(), work(total_steps=10**6), expenses=Expenses(usd_per_hour=3.0, watts=700.0))
    assert made.cost_usd == pytest.approx(3 * made.job_hours)
    assert made.energy_kwh == pytest.approx(0.7 * made.job_hours)
    assert forecast(traced(), work()).cost_usd is None
    machine = lookup("8xA100-80GB")
    assert expenses_of(machine.device, 8, None).watts == 8 * machine.device.tdp_watts  # type: ignore[operator]


def test_shards_gather_and_reduce_beside_the_computation() -> None:
    sharded = traced(layout=Layout(shard=4))
    quick = forecast(sharded, work(), Layout(shard=4))
    slow_link = Network(devices_per_node=8, inside=Link(alpha_seconds=0.0, bytes_per_second=1e6))
    slow = forecast(sharded, work(), Layout(shard=4), network=slow_link)
    assert quick.breakdown["compute"] == pytest.approx(slow.breakdown["compute"])
    weights = sum(o.read_bytes * count for _, o, count in sharded.step() if o.name in ("all_gather", "reduce_scatter"))
    sent = 0.75 * weights / 1e6
    assert slow.breakdown["communication"] < sent, "some of it is hidden"
    assert slow.breakdown["communication"] > sent - slow.breakdown["compute"]
    assert quick.breakdown["communication"] < 0.2 * 0.75 * weights / 1e9 + 1e-3
    unknown = forecast(sharded, work(), Layout(shard=4), network=Network(devices_per_node=8))
    assert "inside of a node" in unknown.notes[0]


def test_tensor_parallel_messages_are_waited_for() -> None:
    operations = traced(layout=Layout(tensor=2))
    made = forecast(operations, work(), Layout(tensor=2))
    inline = [(o, count) for _, o, count in operations.step() if o.family == "collective"]
    assert all(o.group is not None and not o.group.overlaps for o, _ in inline)
    # Rings of two: half of the message there and back for an all-reduce.
    expected = sum(count * o.read_bytes * (1.0 if o.name == "all_reduce" else 0.5) / 1e9 for o, count in inline)
    assert made.breakdown["communication"] == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_a_pipeline_has_its_bubble(schedule: str) -> None:
    layout, count = Layout(pipeline=2, schedule=schedule), 4
    job = from_mapping({"model": "unused", "data": "unused", "method": "full"})
    model = source("llama", num_hidden_layers=16)
    ledgers = trace_stages(job, model, batches(count), Target(kind="cpu"), **options(layout=layout))
    stages = {rank: ledger.operations for rank, ledger in ledgers}
    made = forecast_time(stages, rates=ByFlops(), network=NETWORK, layout=layout, work=work(count))
    slowest = max(operations.step().total("flops") for operations in stages.values()) / FLOPS
    assert made.breakdown["compute"] == pytest.approx(slowest)
    first, last = (operations.step().total("flops") / count / FLOPS for operations in stages.values())
    # The first stage's forward before the last one can start, and its backward after that is done.
    assert made.breakdown["bubble"] == pytest.approx(first, rel=0.05)
    assert made.mfu == pytest.approx(count * (first + last) / made.step_seconds / 2 / 2, rel=1e-6)


def operation(**changes: Any) -> Operation:
    common = {"dtype": "float32", "flops": 0, "read_bytes": 0, "written_bytes": 0, "made_bytes": 0}
    return Operation(**{**common, **changes})


def product(m: int, form: str = "nt") -> Operation:
    return operation(name="mm", family="matmul", flops=2 * m * 256 * 256, sizes=(1, m, 256, 256), form=form)


def calibrated(**changes: Any) -> CalibratedRates:
    calibration = Calibration(version=1, key="", measured="", seconds=1.0, device=device_rates())
    return CalibratedRates(calibration, **changes)


def test_measured_rates_are_met_where_they_were_measured() -> None:
    known = calibrated()
    assert known.seconds(product(1024), "forward") == pytest.approx(4e-6 + 2 * 1024 * 256 * 256 / 1e11, rel=1e-3)
    assert known.seconds(product(1024, "tn"), "backward") == pytest.approx(5e-6 + 2 * 1024 * 256 * 256 / 6e10, rel=1e-3)
    between = 2 * 256 * 256 * 256 / (known.seconds(product(256), "update") - 1e-6)
    assert 4e10 < between < 1e11
    added = operation(name="add", family="elementwise", read_bytes=2**26, written_bytes=2**26, sizes=(2**24,))
    assert known.seconds(added, "update") == pytest.approx(1e-6 + 2**27 / 1e10 - 1e-6, rel=1e-3)
    assert known.seconds(VIEW, "forward") == pytest.approx(1e-6)
    assert known.seconds(VIEW, "backward") == pytest.approx(2e-6)
    step = operation(name="_fused_adamw_", family="optimizer", sizes=(10**6,), read_bytes=16 * 10**6, written_bytes=12 * 10**6)
    assert known.seconds(step, "update") == pytest.approx(1e-3 + 1e-6)
    halves = dataclasses.replace(step, name="adamw_", read_bytes=14 * 10**6)  # its gradient is bfloat16
    assert known.seconds(halves, "update") == pytest.approx(26 / 28 * 1e-3 + 1e-6)


def test_what_the_caches_do_not_hold_comes_from_memory() -> None:
    added = operation(name="add", family="elementwise", read_bytes=2**19, written_bytes=2**19, sizes=(2**17,))
    cached, spread = calibrated().seconds(added, "update"), calibrated().during(2**30).seconds(added, "update")
    assert cached == pytest.approx(2**20 / 4e10, rel=1e-3)
    assert spread == pytest.approx(1e-6 + 2**20 / 1e10, rel=1e-3)


def test_new_memory_costs_its_page_faults() -> None:
    made = operation(name="add", family="elementwise", read_bytes=2**26, written_bytes=2**26, made_bytes=2**26, sizes=(2**24,))
    kept, new = calibrated(keeps_up_to=None).seconds(made, "forward"), calibrated().seconds(made, "forward")
    assert new - kept == pytest.approx(2**26 / 1e9)


def test_published_rates() -> None:
    machine = lookup("A100-80GB")
    device = machine.device
    known = CatalogueRates(device)
    large = dataclasses.replace(product(8192), dtype="bfloat16", flops=10**13)
    assert device.matmul_efficiency is not None
    reached = device.matmul_efficiency * device.peak_flops_per_second["bfloat16"]
    assert known.seconds(large, "forward") == pytest.approx(10**13 / reached)
    assert CatalogueRates(device, speed=0.5).seconds(large, "forward") == pytest.approx(2 * known.seconds(large, "forward"))
    assert known.seconds(dataclasses.replace(large, dtype="float32"), "forward") > 10 * known.seconds(large, "forward")
    moved = operation(name="add", family="elementwise", read_bytes=2**33, written_bytes=2**32)
    assert device.memory_bandwidth_bytes_per_second is not None
    assert known.seconds(moved, "forward") > (2**33 + 2**32) / device.memory_bandwidth_bytes_per_second
    bare = dataclasses.replace(device, peak_flops_per_second={})
    with pytest.raises(ValueError, match="no published rates"):
        CatalogueRates(bare)
    fabric = lookup("2xp5.48xlarge")
    network = network_of(fabric.device, fabric.devices_per_node, fabric.network_bytes_per_second)
    assert network.inside is not None
    assert network.between is not None
    assert network.inside.bytes_per_second > network.between.bytes_per_second
