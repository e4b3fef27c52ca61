"""Placement below an accelerator, on a CPU: streams that copy as late as their events allow stand for those of the device.

What is read before its copy was waited for is rubbish, and what changes or goes while a copy of it is under way is noticed.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from placed_runs import make, make_llama, run
from sartor.placement import DiskTier, Engine, HostTier, PlacedStep, find_rows
from sartor.placement.streams import Way
from sartor.plan.table import RowPlaces, Sizes, Table, uniform
from sartor.step import TrainStep


class LateEvent:
    """The end of a copy that is made when somebody waits for it."""

    def __init__(self, finish: Callable[[LateEvent], None]) -> None:
        self._finish, self.passed = finish, False

    def query(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        self._finish(self)


class LateStreams:
    """Two streams of copies; what computes on a CPU is done at once."""

    def __init__(self) -> None:
        self._queues: dict[str, list[tuple[LateEvent, Tensor, Tensor, Tensor]]] = {"in": [], "out": []}
        self._lock = threading.RLock()
        self._marks = 0
        self.copied = {"in": 0, "out": 0}

    def mark(self) -> Any:
        self._marks += 1
        event = LateEvent(lambda _: None)
        event.number = self._marks  # type: ignore[attr-defined]
        return event

    def copy(self, way: Way, target: Tensor, source: Tensor, after: Any) -> LateEvent:
        if threading.current_thread() is threading.main_thread():
            assert after.number == self._marks, "a copy waits for all that was computed before it"
        assert target.nbytes == source.nbytes > 0
        with self._lock:
            event = LateEvent(lambda event: self._finish(way, event))
            self._queues[way].append((event, target, source, source.clone()))
            target.fill_(255)  # as floating-point numbers: not a number
            return event

    def _finish(self, way: str, event: LateEvent) -> None:
        with self._lock:
            while not event.passed:
                first, target, source, wanted = self._queues[way].pop(0)
                for tensor in (target, source):
                    assert tensor.untyped_storage().nbytes() >= tensor.nbytes, "memory was freed while a copy was under way"
                assert torch.equal(source, wanted), "what is copied was changed while the copy was under way"
                assert bool((target == 255).all()), "memory was used while a copy into it was under way"
                target.copy_(source)
                self.copied[way] += target.nbytes
                first.passed = True

    def wait(self, event: Any) -> None:
        event.synchronize()

    def drain(self) -> None:
        with self._lock:
            for queue in self._queues.values():
                if queue:
                    queue[-1][0].synchronize()


def table_of(sizes: list[Sizes], place: str) -> Table:
    if place == "state":  # the cheapest to move
        return Table(rows=tuple(RowPlaces(name=size.name, state="host") for size in sizes))
    if place != "mixed":
        return uniform(sizes, place)  # type: ignore[arg-type]
    ways = ("host", "disk", "device")
    return Table(
        rows=tuple(
            RowPlaces(
                name=size.name,
                weights=ways[number % 3],
                gradients=ways[(number // 2) % 3],
                state=ways[(number + 1) % 3],
                activations=ways[number % 3],
            )
            for number, size in enumerate(sizes)
        )
    )


def placed(step: TrainStep, tmp_path: Path, place: str) -> PlacedStep:
    rows = find_rows(step.model)
    table = table_of([Sizes.of(row) for row in rows], place)
    tiers = {"host": HostTier(), "disk": DiskTier(tmp_path)}
    return PlacedStep(step, Engine(step.model, rows, table, tiers, streams=LateStreams()))


def assert_equal(plain: TrainStep, moved: PlacedStep) -> None:
    moved.engine.detach()
    moved.streamed.release()
    for name, parameter in plain.parameters.items():
        other = moved.parameters[name]
        assert torch.equal(parameter, other), name
        for key, value in plain.optimizer.state[parameter].items():
            assert torch.equal(value, moved.optimizer.state[other][key]), (name, key)


@pytest.mark.parametrize("place", ["state", "host", "disk", "mixed"])
@pytest.mark.parametrize(
    ("mode", "micro_batches", "job"),
    [
        ("float32", 1, {}),
        ("bf16-master", 4, {"clip_norm": 0.1}),
        ("float32", 2, {"clip_norm": 0.1, "method": "lora"}),
        ("float32", 2, {"recompute": True, "optimizer": "sgd"}),
    ],
)
def test_copies_as_late_as_can_be(tmp_path: Path, place: str, mode: str, micro_batches: int, job: dict[str, Any]) -> None:
    model = make_llama()
    job = {"method": "full", "mode": mode, **job}
    plain, moved = make(copy.deepcopy(model), **job), placed(make(model, **job), tmp_path, place)
    wanted, got = run(plain, micro_batches), run(moved, micro_batches)
    assert all(map(torch.equal, wanted[0] + wanted[1], got[0] + got[1]))
    trained = [live for live in moved.engine.rows if live.trained]
    assert {live.on_host for live in trained} == ({True, False} if place == "mixed" else {True})
    sizes = [Sizes.of(live.row, state_bytes=10, gradient_bytes=4) for live in moved.engine.rows]
    assert moved.engine.gauge.peak_bytes <= moved.engine.table.moving_bytes(sizes)
    if place == "host":
        assert moved.engine.gauge.peak_bytes <= moved.engine.table.pass_bytes(sizes), "updates take nothing of the device"
    assert_equal(plain, moved)
