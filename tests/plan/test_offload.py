"""Jobs for one accelerator that need main memory or disk below it: the choice, its memory on every tier, and its time."""

from __future__ import annotations

import dataclasses
import itertools
import re
import sys
from typing import Any

import pytest
from transformers import LlamaConfig

import sartor
from sartor.errors import DoesNotFit, JobError
from sartor.machine.memory import resident_bytes
from sartor.plan import Plan, Strategy
from sartor.plan.levels import host_bytes, levels, spilled
from sartor.plan.offload import Offload
from sartor.plan.offload_fit import Fitting
from sartor.plan.offload_time import Surroundings, Work, offloaded_seconds
from sartor.plan.search import Choice, search
from sartor.plan.setting import Setting
from sartor.plan.table import DEVICE_BUFFER_BYTES, Sizes, uniform
from sartor.plan.timing import Timing, rates_of

MIB = 2**20
SIZES = tuple(Sizes(name=f"layers.{number}", weights=100, gradients=100, state=200) for number in range(4))
AROUND = Surroundings(to_device=1e12, to_host=1e12, updated=1e12, from_disk=1e12, to_disk=1e12)
WORK = Work(forward=1.0, backward=2.0, optimizer=1.0, micro_batches=1.0)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Full fine-tuning of 20 million parameters, 300 MiB of states, on two steps."""
    folder = tmp_path_factory.mktemp("model")
    LlamaConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1376, num_hidden_layers=5, num_attention_heads=8
    ).save_pretrained(folder)  # fmt: skip
    return {
        "model": str(folder / "config.json"),
        "data": {"synthetic": {"length": 256, "examples": 4}, "packing": False},
        "method": "full",
        "training": {"epochs": 1, "global_batch": 2},
    }


def planned(job: dict[str, Any], device: int, host: int = 4096, **strategy: Any) -> tuple[Plan, Setting]:
    """With so many MiB; and what the search was given."""
    machine = {"name": "1xRTX-3090-24GB", "device_memory": device * MIB, "host_memory": host * MIB}
    settings: list[Setting] = []

    def noted(setting: Setting, row_capacity: int) -> Choice:
        settings.append(setting)
        return search(setting, row_capacity)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["sartor.plan.prepack"], "search", noted)
        plan = sartor.plan({**job, "machine": machine, "strategy": strategy or "auto"})
    return plan, settings[0]


@pytest.fixture(scope="module")
def plans(job: dict[str, Any]) -> dict[int, tuple[Plan, Setting]]:
    """By the device's memory in MiB."""
    return {device: planned(job, device) for device in (750, 850, 1500)}


def test_more_device_memory_is_never_slower(plans: dict[int, tuple[Plan, Setting]]) -> None:
    tight, _, whole = (plan for plan, _ in plans.values())
    assert tight.strategy.placement is not None
    assert whole.strategy.placement is None, "what fits stays"
    seconds = [plan.time.step_seconds for plan, _ in plans.values() if plan.time is not None]
    assert len(seconds) == 3
    assert seconds == sorted(seconds, reverse=True)


def test_tiers_add_up(plans: dict[int, tuple[Plan, Setting]]) -> None:
    plan, _ = plans[750]
    placement, forecast = plan.strategy.placement, plan.forecast
    assert placement is not None
    assert forecast.verdict == "fits"
    assert forecast.interval is not None
    assert forecast.interval[1] <= 750 * MIB, "judged by the interval's upper end"
    device, host = forecast.tiers
    assert (device.name, device.peak_bytes) == ("device", forecast.process_bytes)
    assert (host.name, host.peak_bytes) == ("host", forecast.host_bytes)
    away = [row for row in placement.table.rows if row.state == "host"]
    assert away
    assert all(row.gradients == "host" for row in away), "the host updates what it has the state of"
    mapping = plan.to_mapping()["forecast"]
    assert [tier["name"] for tier in mapping["tiers"]] == ["device", "host"]
    assert "in main memory" in plan.strategy.describe()


def test_the_choice_is_that_of_trying_everything(plans: dict[int, tuple[Plan, Setting]]) -> None:
    """Each candidate with as little elsewhere as it needs, each level tried by a replay; of them the one that is fastest."""
    plan, setting = plans[750]
    rates = rates_of(setting.machine)
    assert rates is not None
    offload = Offload(setting, Timing(setting, rates))
    found: list[tuple[float, Strategy]] = []
    for size, recompute in itertools.product((2, 1), (False, True)):
        strategy = dataclasses.replace(plan.strategy, micro_batch=size, recompute=recompute, placement=None)
        one = offload.exact(strategy)
        if one is None:
            continue
        assert one.time is not None
        assert one.strategy.placement is not None
        fitting = Fitting(offload.ground, strategy)
        place = fitting.tables.index(one.strategy.placement.table)
        assert fitting.forecast(fitting.tables[place - 1], ahead=True).verdict != "fits", "less elsewhere is not enough"
        found.append((one.time.step_seconds, one.strategy))
    assert len(found) >= 2
    assert plan.strategy == min(found, key=lambda entry: entry[0])[1]


def test_main_memory_that_is_short(job: dict[str, Any]) -> None:
    """`auto` sends the rest to disk; without a disk the job is refused, with the memory that is enough."""
    pinned: dict[str, Any] = {"micro_batch": 1, "recompute": "full"}
    planned(job, 700, **pinned)  # what planning loads is loaded
    short = int((resident_bytes() / MIB + 240) / 0.9)  # of 300 MiB of states
    spilt, _ = planned(job, 700, short, **pinned)
    assert spilt.strategy.placement is not None
    assert spilt.strategy.placement.disk_bytes > 0
    assert [tier.name for tier in spilt.forecast.tiers] == ["device", "host", "disk"]
    assert spilt.forecast.tiers[1].peak_bytes <= 0.9 * short * MIB
    with pytest.raises(DoesNotFit, match="does not fit") as kept:
        planned(job, 700, **pinned, placement="device")
    assert re.search(r"strategy.placement=auto: .*iB, and .*iB of main memory", kept.value.remedy)
    with pytest.raises(DoesNotFit, match="does not fit") as caught:
        planned(job, 700, short, **pinned, placement="host")
    asked = re.search(r"machine\.host_memory=(\d+)MiB", caught.value.remedy)
    assert asked is not None
    enough, _ = planned(job, 700, int(asked[1]) + 64, **pinned, placement="host")
    assert enough.strategy.placement is not None
    assert all(row.weights == row.state == "host" for row in enough.strategy.placement.table.rows)
    assert enough.strategy.placement.disk_bytes == 0


def test_several_devices_keep_what_they_have(job: dict[str, Any]) -> None:
    with pytest.raises(JobError, match="is host, which this job cannot have") as caught:
        sartor.plan({**job, "machine": "2xRTX-3090-24GB", "strategy": {"placement": "host"}})
    assert "one accelerator" in caught.value.why


# -- tables --------------------------------------------------------------------------------------------------------------------


def test_what_moves_least_leaves_first() -> None:
    tables = [level.table for level in levels(SIZES, blocks=["layers.0", "layers.1"])]
    kept = [level.kept_bytes for level in levels(SIZES)]
    assert kept == [1600, 1300, 1000, 700, 400, 300, 200, 100, 0]
    assert tables[1].row("layers.3").state == tables[1].row("layers.3").gradients == "host"
    assert tables[1].row("layers.3").weights == tables[1].row("layers.0").state == "device"
    assert tables[-1].row("layers.0").activations == tables[-1].row("layers.1").activations == "host"
    assert host_bytes(tables[1], SIZES) == 300 + 100, "and a copy of the weights that the host updates"
    assert host_bytes(tables[8], SIZES) == 1600


def test_as_little_as_can_be_goes_to_disk() -> None:
    sizes = [Sizes(name=s.name, weights=s.weights * MIB, gradients=s.gradients * MIB, state=s.state * MIB) for s in SIZES]
    table = uniform(sizes, "host")
    assert spilled(table, sizes, 1600 * MIB) == table
    for room, on_disk in ((1400, 3), (1200, 4), (1000, 8), (800, 12)):  # two rows are there while one is updated from disk
        made = spilled(table, sizes, room * MIB + DEVICE_BUFFER_BYTES)
        assert made is not None
        assert host_bytes(made, sizes) <= room * MIB + DEVICE_BUFFER_BYTES
        places = [getattr(row, kind) for kind in ("state", "gradients", "weights") for row in reversed(made.rows)]
        assert places == ["disk"] * on_disk + ["host"] * (12 - on_disk)
    assert spilled(table, sizes, 799 * MIB + DEVICE_BUFFER_BYTES) is None


# -- time ----------------------------------------------------------------------------------------------------------------------


def seconds(place: Any = "host", *, micro_batches: float = 1.0, ahead: bool = True, **slow: float) -> float:
    work = dataclasses.replace(WORK, micro_batches=micro_batches)
    around = dataclasses.replace(AROUND, **slow)
    return offloaded_seconds(work, uniform(SIZES, place), SIZES, around, gradient_width=4, ahead=ahead)


def test_fast_links_cost_nothing() -> None:
    assert seconds() == pytest.approx(3.0), "the host updates in no time"
    assert seconds("device") == pytest.approx(4.0)
    assert seconds(micro_batches=7.0) == pytest.approx(21.0)


def test_slow_links_are_all_that_counts() -> None:
    """Weights come for both passes, those of the last row once, and gradients go; they come back where they accumulate."""
    assert seconds(to_device=1e-3) == pytest.approx(700e3, rel=0.01)
    assert seconds(to_host=1e-3) == pytest.approx(400e3, rel=0.01)
    assert seconds(to_device=1e-3, micro_batches=5.0) == pytest.approx((5 * 700 + 4 * 400) * 1e3, rel=0.01)
    assert seconds(updated=1e-3) == pytest.approx(100e3, rel=0.01), "the host updates when the norm is known"
    read, written = 400 + 300 + (400 + 400 + 800), 400 + (400 + 800)
    assert seconds("disk", from_disk=1e-3, to_disk=1e-3) == pytest.approx((read + written) * 1e3, rel=0.01)


def test_fetching_ahead_hides_what_moves() -> None:
    link = {"to_device": 100 / 0.25, "to_host": 400.0}
    assert 3.0 < seconds(**link) < seconds(ahead=False, **link)
