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
from safetensors.torch import load_file
from torch import Tensor

import sartor
from placed_runs import batches, make, make_llama, run
from sartor.placement import DiskTier, Engine, HostTier, PlacedStep, find_rows
from sartor.placement.save import load_model, restore_optimizer, save_model, save_optimizer
from sartor.placement.streams import StreamMover, Way
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
        ("bf16", 2, {"rounding": "stochastic", "optimizer": "adamw-8bit"}),
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


def test_less_on_the_device_from_the_second_step_on(tmp_path: Path) -> None:
    """As after a shortage: a step is given up, with updates of the last one under way; the numbers stay."""
    model = make_llama()
    plain = make(copy.deepcopy(model), method="full", mode="bf16-master")
    wanted = run(plain, 1)
    moved = placed(make(model, method="full", mode="bf16-master"), tmp_path, "state")
    sizes = [Sizes.of(live.row, state_bytes=10) for live in moved.engine.rows]
    losses = []
    for number, (cut, trained_tokens) in enumerate(batches(1)):
        if number == 2:
            moved.backward(cut, trained_tokens)
            moved.discard()
            moved.engine.clear()
            fewer = table_of(sizes, "host")
            moved.rearrange(fewer, limit=fewer.least_bytes(sizes), update_limit=fewer.least_bytes(sizes))
        losses += moved.backward(cut, trained_tokens).losses
        moved.update(1e-2)
    assert all(map(torch.equal, wanted[0], losses))
    assert moved.engine.gauge.peak_bytes <= table_of(sizes, "host").moving_bytes(sizes)
    assert_equal(plain, moved)


@pytest.mark.parametrize("place", ["state", "host", "mixed"])
def test_files_hold_what_updates_on_host_cores_made(tmp_path: Path, place: str) -> None:
    """Written and read again while such updates are under way."""
    model = make_llama()
    plain = make(copy.deepcopy(model), method="full", mode="float32")
    moved = placed(make(model, method="full", mode="float32"), tmp_path, place)
    run(plain, 1), run(moved, 1)
    weights = [live.weights for live in moved.engine.rows if live.weights is not None]
    assert any(chunk.gate is not None for chunk in weights) == (place == "host"), "a step does not wait for its update"
    save_model(moved, tmp_path / "model")
    save_optimizer(moved, tmp_path / "optimizer.safetensors")
    saved = load_file(tmp_path / "model/model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in plain.model.state_dict().items() if name in saved)
    kept = load_file(tmp_path / "optimizer.safetensors")
    for name, parameter in plain.parameters.items():
        assert all(torch.equal(kept[f"{name}|{key}"], value) for key, value in plain.optimizer.state[parameter].items())
    run(moved, 2)
    load_model(moved, tmp_path / "model")
    restore_optimizer(moved, tmp_path / "optimizer.safetensors")
    assert all(map(torch.equal, run(plain, 1)[0], run(moved, 1)[0]))
    assert_equal(plain, moved)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines place models below a device that copies late."""

    def mover_of(device: Any, tiers: dict[str, Any], streams: Any, *, note: Any) -> StreamMover:
        return StreamMover(LateStreams(), tiers.setdefault("host", HostTier()), note=note)

    monkeypatch.setattr("sartor.placement.engine.mover_of", mover_of)


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize(
    "where", [{"policy": "host", "activations": "host"}, {"policy": "disk"}, {"lower": "host", "share": 0.8}]
)
def test_other_peoples_loops(tmp_path: Path, where: dict[str, Any]) -> None:
    """They clip by PyTorch's function, and read, write and save weights between steps."""
    model = make_llama()
    other = copy.deepcopy(model)
    optimizer, inner = (torch.optim.AdamW(one.parameters(), lr=1e-2, fused=True) for one in (model, other))
    if "share" in where:
        where = {"lower": "host", "budget": int(where["share"] * 16 * sum(p.numel() for p in model.parameters()))}
    other, streamed = sartor.prepare(other, inner, folder=tmp_path, **where)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        seen = []
        micro_batches = [torch.randint(0, 64, (2, 16), generator=generator) for _ in range(2)]
        for one, its in ((model, optimizer), (other, streamed)):
            losses = []
            for ids in micro_batches:
                loss = one(input_ids=ids, labels=ids).loss
                loss.backward()
                losses.append(loss.detach())
            losses.append(torch.nn.utils.clip_grad_norm_(one.parameters(), 0.5))
            its.step()
            its.zero_grad()
            weight = one.model.layers[3].mlp.up_proj.weight
            with torch.no_grad():
                weight.mul_(0.9)
            seen.append([*losses, weight.sum(), one.lm_head.weight.detach().norm()])
        assert all(map(torch.equal, *seen))
    saved, states = other.state_dict(), (optimizer.state_dict()["state"], streamed.state_dict()["state"])
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(states[0][n][key], states[1][n][key]) for n in states[0] for key in states[0][n])
    assert streamed.release() is inner
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
