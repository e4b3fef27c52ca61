"""A placed step is the plain step, bit for bit, wherever things live."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from placed_runs import batches, make, make_llama, run
from sartor.kernels import compact
from sartor.placement import DiskTier, Engine, HostTier, PlacedStep, find_rows
from sartor.placement.timeline import STREAMS, TIMELINE, Timeline
from sartor.plan.placed import row_sizes
from sartor.plan.table import RowPlaces, Sizes, Table, less_and_less, uniform
from sartor.report.placement import placement_picture
from sartor.step import TrainStep
from support import PageChecker


def placed(step: TrainStep, tmp_path: Path, place: str, *, activations: str = "device") -> PlacedStep:
    tiers = {"host": HostTier(), "disk": DiskTier(tmp_path)}
    rows = find_rows(step.model)
    sizes = [Sizes.of(row) for row in rows]
    if place == "mixed":
        places = ("disk", "host", "device")
        table = Table(
            rows=tuple(
                RowPlaces(
                    name=size.name,
                    weights=places[number % 3],
                    gradients=places[(number + 1) % 3],
                    state=places[(number + 2) % 3],
                    activations=places[number % 3],
                )
                for number, size in enumerate(sizes)
            )
        )
    else:
        table = uniform(sizes, place, activations=activations)
    return PlacedStep(step, Engine(step.model, rows, table, tiers))


def outside(plain: TrainStep, placed: PlacedStep) -> int:
    """Optimizer state of what is in no row."""
    rows = {id(p) for live in placed.engine.rows for p in live.trained}
    names = [name for name, parameter in placed.parameters.items() if id(parameter) not in rows]
    return sum(v.nbytes for name in names for v in plain.optimizer.state[plain.parameters[name]].values() if v.numel() > 1)


def assert_same(
    tmp_path: Path, place: str, *, micro_batches: int, activations: str = "device", tied: bool = True, **job: Any
) -> None:
    model = make_llama(tied=tied)
    plain = make(copy.deepcopy(model), **job)
    wanted = run(plain, micro_batches)
    moved = placed(make(model, **job), tmp_path, place, activations=activations)
    got = run(moved, micro_batches)
    assert all(map(torch.equal, wanted[0], got[0])), "losses"
    assert all(map(torch.equal, wanted[1], got[1])), "norms"
    if place != "device":
        moved.engine.mover.settle()
        here = [live for live in moved.engine.rows if live.weights is not None and live.weights.state != "free"]
        assert len(here) <= 2, "rows that are used do not go"
        optimizer = job.get("optimizer", "adamw")
        sizes = row_sizes(find_rows(moved.model), moved.precision, optimizer, accumulated=micro_batches > 1)
        kept = sum(v.nbytes for state in plain.optimizer.state.values() for v in state.values() if v.numel() > 1)
        assert kept == sum(size.state for size in sizes) + outside(plain, moved)
        assert 0 < moved.engine.gauge.peak_bytes <= moved.engine.table.moving_bytes(sizes)
    moved.engine.detach()
    for name, parameter in plain.parameters.items():
        assert torch.equal(parameter, moved.parameters[name]), name
        for key, value in plain.optimizer.state[parameter].items():
            assert torch.equal(value, moved.optimizer.state[moved.parameters[name]][key]), (name, key)


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("place", ["device", "host", "disk", "mixed"])
def test_every_tier(tmp_path: Path, place: str, method: str, micro_batches: int) -> None:
    assert_same(tmp_path, place, method=method, mode="float32", micro_batches=micro_batches, clip_norm=0.1)


@pytest.mark.parametrize("mode", ["bf16-master", "bf16-mixed"])
def test_precisions(tmp_path: Path, mode: str) -> None:
    assert_same(tmp_path, "disk", method="full", mode=mode, micro_batches=4, clip_norm=0.1)


@pytest.mark.parametrize(("mode", "rounding"), [("float32", "nearest"), ("bf16-master", "nearest"), ("bf16", "stochastic")])
def test_less_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, rounding: str) -> None:
    monkeypatch.setattr(compact, "SMALLEST", 1024)
    kinds = {"method": "full", "mode": mode, "rounding": rounding, "optimizer": "adamw-8bit"}
    assert_same(tmp_path, "disk", micro_batches=2, clip_norm=0.1, **kinds)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_recompute(tmp_path: Path, method: str) -> None:
    assert_same(tmp_path, "host", method=method, mode="float32", micro_batches=2, recompute=True)


@pytest.mark.parametrize(("activations", "recompute"), [("host", False), ("disk", False), ("host", True)])
def test_activations_away(tmp_path: Path, activations: str, recompute: bool) -> None:
    model = make_llama()
    job: dict[str, Any] = {"method": "full", "mode": "float32", "recompute": recompute}
    plain, moved = make(copy.deepcopy(model), **job), placed(make(model, **job), tmp_path, "device", activations=activations)
    wanted, got = run(plain, 2), run(moved, 2)
    assert all(map(torch.equal, wanted[0] + wanted[1], got[0] + got[1]))
    hidden = sum(32 * 4 * batch.input_ids_RT.numel() for cut, _ in batches(2) for batch in cut)
    assert moved.engine.mover.written_bytes >= 3 * hidden, "at least what the second and later blocks begin with"
    assert moved.engine.mover.read_bytes > 0


@pytest.mark.parametrize("changes", [{"clip_norm": 0}, {"optimizer": "sgd"}, {"loss": "hf"}])
def test_untied_head_and_other_steps(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert_same(tmp_path, "host", method="full", mode="float32", micro_batches=2, tied=False, **changes)


def test_less_in_memory_from_the_second_step_on(tmp_path: Path) -> None:
    """As after a shortage: a step is given up, more lives on disk, and the numbers stay."""
    model = make_llama()
    plain = make(copy.deepcopy(model), method="full", mode="float32")
    wanted = run(plain, 2)
    moved = placed(make(model, method="full", mode="float32"), tmp_path, "mixed")
    steps = list(batches(2))
    losses = []
    for number, (cut, trained_tokens) in enumerate(steps):
        if number == 1:
            moved.backward(cut, trained_tokens)
            moved.discard()
            moved.engine.clear()
            assert not any(live.weights.here for live in moved.engine.rows if live.weights is not None)
            before = moved.engine.table
            sizes = [Sizes.of(live.row) for live in moved.engine.rows]
            fewer = list(less_and_less(sizes, "disk", before))[-1]
            assert fewer.kept_bytes(sizes) < before.kept_bytes(sizes)
            moved.rearrange(fewer, limit=fewer.least_bytes(sizes), update_limit=fewer.least_bytes(sizes))
        losses += moved.backward(cut, trained_tokens).losses
        moved.update(1e-2)
    assert all(map(torch.equal, wanted[0], losses))
    moved.engine.detach()
    assert all(torch.equal(parameter, moved.parameters[name]) for name, parameter in plain.parameters.items())


def test_a_step_leaves_a_timeline(tmp_path: Path) -> None:
    moved = placed(make(make_llama(), method="full", mode="float32"), tmp_path, "disk")
    run(moved, 2)
    timeline = moved.timeline
    assert timeline is not None
    (tmp_path / TIMELINE).write_text(json.dumps(timeline.to_mapping()))
    assert Timeline.read(tmp_path) == timeline
    assert Timeline.read(tmp_path / "elsewhere") is None
    assert {span.stream for span in timeline.spans} == set(STREAMS)
    assert all(0 <= span.start <= span.end <= timeline.seconds for span in timeline.spans)
    assert max(level.device for level in timeline.levels) <= moved.engine.gauge.peak_bytes
    assert all(0 < timeline.busy(stream) <= timeline.seconds for stream in STREAMS)
    rows = [live.name for live in moved.engine.rows]
    assert [span.name for span in timeline.spans if span.stream == "update"] == rows
    memory = placement_picture(timeline)
    checker = PageChecker()
    checker.feed(memory["placement_memory"] + memory["placement_streams"])
    assert checker.tags.count("svg") == 2
    assert checker.tags.count("rect") > len(rows)
    assert {"stays in memory", "brought into memory", "lives on host and disk"} <= set(checker.text)
    assert placement_picture(None)["placement_memory"] == ""
