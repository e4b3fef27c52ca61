"""Calibration: that measuring gives a whole record, that the record is kept and read strictly, and that nothing needs it."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from machine_trees import write_tree
from matrices import OURS
from sartor.errors import UsageError
from sartor.folders import cache_folder
from sartor.job.schema import MachineJob
from sartor.kernels.fuse import as_jobs_run
from sartor.machine import Machine, find_calibration, load_calibration, probe
from sartor.machine import calibration as module
from sartor.machine import measure as measure_module
from sartor.machine.calibrate import calibrate
from sartor.machine.calibration import CALIBRATION_VERSION, Calibration, calibration_key, save_calibration
from sartor.machine.clock import Clock
from sartor.machine.measure_links import disk_rate, measure_collectives
from sartor.machine.operands import Operands

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def machine() -> Machine:
    return probe(MachineJob(device="cpu", threads=1))


@pytest.fixture(scope="module")
def measured(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    """Quick, with the smallest problems only, and not kept."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "_ROWS_M": (16, 64),
            "_SHAPES_NK": ((64, 64), (16, 768)),
            "_GRADIENT_SHAPES_NK": ((64, 64),),
            "_BATCHED_MNK": ((64, 64, 64),),
            "_MEMORY_BYTES": (2**16,),
            "_LENGTHS": (64,),
        }.items():
            patch.setattr(measure_module, name, value)
        patch.setattr(Clock, "seconds", lambda clock, call, budget=0.0: max(clock.once(call), 1e-9))
        patch.setattr(sys.modules["sartor.machine.calibrate"], "_largest_bytes", lambda _: 2**23)
        return calibrate(machine, folder=tmp_path_factory.mktemp("disk"), keep=False)


@OURS
def test_products_of_jobs_are_measured_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_module, "_COMPILED_ROWS_M", (64,))
    monkeypatch.setattr(measure_module, "_COMPILED_SHAPES_NK", ((64, 32),))
    monkeypatch.setattr(Clock, "seconds", lambda clock, call, budget=0.0: max(clock.once(call), 1e-9))
    found = list(measure_module._compiled_products(Clock(CPU), as_jobs_run))
    assert [(rate.form, rate.m, rate.n, rate.k) for rate in found] == [
        (f"compiled {form}", 64, 64, 32) for form in ("nt", "nn", "tn")
    ]
    assert not list(measure_module._compiled_products(Clock(CPU), None))


def floats(tree: Any) -> Iterator[float]:
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list | tuple):
        for item in tree:
            yield from floats(item)
    elif isinstance(tree, float):
        yield tree


def test_everything_is_measured(measured: Calibration) -> None:
    rates = measured.device
    assert {rate.dtype for rate in rates.matmul} == {"float32", "bfloat16", "int8"}
    assert {(rate.form, rate.batch > 1) for rate in rates.matmul} == {
        ("nt", False),
        ("nn", False),
        ("tn", False),
        ("nt", True),
        ("nn", True),
    }
    assert {rate.kind for rate in rates.memory} == {
        "add", "copy", "cast", "exp", "silu", "tanh", "bernoulli", "masked_fill", "softmax", "layer_norm", "sum",
        "gather",
    }  # fmt: skip
    assert {rate.total_bytes > 2**22 for rate in rates.memory} == {True, False}
    assert {(rate.dtype, rate.form) for rate in rates.attention} == {
        (dtype, form) for dtype in ("float32", "bfloat16") for form in ("causal", "masked")
    }
    assert {rate.vocabulary for rate in rates.loss} == {2048, 32_000}
    assert rates.first_touch_bytes_per_second is not None
    assert measured.disk is not None
    assert measured.host is None
    assert measured.link is None
    assert all(math.isfinite(value) and value > 0 for value in floats(measured.to_mapping()))


def test_a_product_is_the_product_that_a_linear_layer_asks_for() -> None:
    """Forward, gradient of the input and gradient of the weights, by their shapes and results."""
    for form in ("nt", "nn", "tn"):
        out = measure_module._product(form, 8, 4, 6, torch.float32)()
        assert isinstance(out, torch.Tensor)
        assert out.shape == (8, 4)
        assert out.abs().sum() > 0
    whole = measure_module._product("nt", 64, 64, 64, torch.int8)()
    assert isinstance(whole, torch.Tensor)
    assert (whole == 64).all()


def test_operands_are_taken_by_turns_and_results_do_not_come_back_as_operands() -> None:
    operands = Operands(torch.float32)
    turns = operands.by_turns([(300, 500), (700, 500)], [(300, 700)])
    first = [next(turns) for _ in range(9)]
    assert {tuple(tensor.shape for tensor in turn) for turn in first} == {((300, 500), (700, 500), (300, 700))}
    assert len({turn[0].data_ptr() for turn in first}) == 9
    before = operands._numbers.clone()
    for left, right, out in first:
        torch.mm(left, right.t(), out=out)
    assert torch.equal(before, operands._numbers)
    large = operands.by_turns([(3000, 4000)], [(3000, 1000)])  # more than there are
    assert next(large)[0] is next(large)[0]
    assert next(large)[0].abs().sum() > 0


def test_operators_on_memory_compute_and_count_their_bytes() -> None:
    calls = measure_module._memory_calls(4, torch.float32)
    row = 4 * 1024 * 4
    assert {kind: total for kind, (_, total) in calls.items()} == {
        "add": 3 * row,
        "copy": 2 * row,
        "cast": row + row // 2,
        "exp": 2 * row,
        "silu": 2 * row,
        "tanh": 2 * row,
        "bernoulli": row,
        "masked_fill": 2 * row + row // 4,
        "softmax": 2 * row,
        "layer_norm": 2 * row,
        "sum": row + 16,
        "gather": 2 * row,
    }
    rows = calls["softmax"][0]()
    assert isinstance(rows, torch.Tensor)
    torch.testing.assert_close(rows.sum(-1), torch.ones(4))


def test_measuring_leaves_threads_and_random_numbers_alone(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def rates(clock: Clock, **_: Any) -> Any:
        seen.append(torch.get_num_threads())
        torch.rand(7)
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["sartor.machine.calibrate"], "device_rates", rates)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        calibrate(dataclasses.replace(machine, threads=2), folder=tmp_path)
    assert seen == [2]
    assert torch.get_num_threads() == 1
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_kept_is_found_again(machine: Machine, measured: Calibration) -> None:
    assert load_calibration(machine) is None
    assert find_calibration(machine).reason == "not measured yet"
    path = save_calibration(measured)
    assert path is not None
    assert path.parent == cache_folder("machines")
    assert load_calibration(machine) == measured
    assert list(path.parent.iterdir()) == [path]


def test_rates_hold_for_one_machine(machine: Machine, measured: Calibration) -> None:
    save_calibration(measured)
    assert calibration_key(machine) == measured.key
    for other in (
        dataclasses.replace(machine, threads=machine.threads + 1),
        dataclasses.replace(machine, cores=machine.cores + 1),
        dataclasses.replace(machine, cpu_name="Another"),
        dataclasses.replace(machine, device=dataclasses.replace(machine.device, kind="cuda", name="A Card")),
    ):
        assert load_calibration(other) is None


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: text[:100], "cannot be read"),
        (lambda text: "", "cannot be read"),
        (lambda text: "[]", "another version"),
        (lambda text: text.replace(f'"version": {CALIBRATION_VERSION}', '"version": 0'), "another version"),
        (lambda text: text.replace('"operator_seconds"', '"operator_second"'), "damaged"),
        (lambda text: text.replace('"dtype": "float32"', '"dtype": 32', 1), "damaged"),
        (lambda text: text.replace('"batch": 1,', '"batch": null,', 1), "damaged"),
        (lambda text: json.dumps({**json.loads(text), "device": None}), "damaged"),
        (lambda text: json.dumps({**json.loads(text), "seconds": float("nan")}), "damaged"),
        (lambda text: json.dumps({**json.loads(text), "seconds": -1.0}), "damaged"),
        (lambda text: json.dumps({**json.loads(text), "notes": "many"}), "damaged"),
        (lambda text: json.dumps({**json.loads(text), "key": "elsewhere"}), "another machine"),
    ],
)
def test_damaged_files_are_told_and_not_used(machine: Machine, measured: Calibration, damage: Any, says: str) -> None:
    path = save_calibration(measured)
    assert path is not None
    changed = damage(path.read_text(encoding="utf-8"))
    assert changed != path.read_text(encoding="utf-8")
    path.write_text(changed, encoding="utf-8")
    kept = find_calibration(machine)
    assert kept.calibration is None
    assert says in kept.reason
    assert "measure again" in kept.reason


def test_a_file_that_is_no_text(machine: Machine, measured: Calibration) -> None:
    path = save_calibration(measured)
    assert path is not None
    path.write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in find_calibration(machine).reason


def test_a_machine_elsewhere_is_not_measured_here() -> None:
    there = probe(MachineJob(name="L40S-48GB"))
    assert load_calibration(there) is None
    assert "published" in find_calibration(there).reason
    with pytest.raises(UsageError, match="not this machine"):
        calibrate(there)


def test_where_nothing_can_be_kept(
    machine: Machine, measured: Calibration, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("", encoding="utf-8")
    monkeypatch.setenv("SARTOR_CACHE", str(file))
    assert load_calibration(machine) is None
    with pytest.raises(UsageError, match="cannot write"):
        save_calibration(measured)
    with pytest.raises(UsageError, match="cannot write"):
        calibrate(machine, folder=tmp_path)


def test_the_cache_is_where_others_look_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SARTOR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder("machines") == Path("/somewhere/sartor/machines")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_folder("machines") == Path("/home/me/.cache/sartor/machines")


@pytest.mark.parametrize("case", [(0.05, 0, True), (0.2, 1, True), (0.8, 1, False)])
def test_what_others_spoilt_is_not_kept(
    machine: Machine, measured: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: tuple[float, int, bool]
) -> None:
    waited, notes, kept = case
    room = sys.modules["sartor.machine.calibrate"]
    monkeypatch.setattr(room, "device_rates", lambda *_, **__: measured.device)
    monkeypatch.setattr(room, "_waited", lambda *_: waited)
    monkeypatch.setattr("sartor.machine.measure_links.DISK_BYTES", 2**22)
    found = calibrate(machine, folder=tmp_path)
    assert len(found.notes) == notes
    assert all(("not kept" in note) != kept for note in found.notes)
    assert load_calibration(machine) == (found if kept else None)


def test_what_there_was_no_time_for_is_not_kept(
    machine: Machine, measured: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = sys.modules["sartor.machine.calibrate"]
    without = dataclasses.replace(measured.device, memory=())
    monkeypatch.setattr(room, "device_rates", lambda *_, **__: without)
    monkeypatch.setattr(room, "_waited", lambda *_: 0.0)
    monkeypatch.setattr("sartor.machine.measure_links.DISK_BYTES", 2**22)
    found = calibrate(machine, folder=tmp_path)
    assert any("no time was left" in note for note in found.notes)
    assert load_calibration(machine) is None


def test_waiting_is_counted_over_all_threads(tmp_path: Path) -> None:
    room = sys.modules["sartor.machine.calibrate"]
    for thread, text in {"1": "700 200 9", "2": "100 0 1", "3": "odd"}.items():
        write_tree(tmp_path, {f"proc/self/task/{thread}/schedstat": text})
    assert room._ran_and_waited(tmp_path) == (800, 200)
    assert room._waited((0, 0), (800, 200)) == 0.2
    assert room._waited((800, 200), (800, 200)) == 0
    assert room._ran_and_waited(tmp_path / "none") == (0, 0)


def test_a_disk_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    notes: list[str] = []
    rate = disk_rate(tmp_path, notes, size=2**23)
    assert rate is not None
    assert rate.total_bytes == 2**23
    assert not list(tmp_path.iterdir())
    assert not notes
    assert disk_rate(tmp_path / "none", notes) is None
    assert disk_rate(tmp_path, notes, size=2**60) is None
    assert len(notes) == 2


_RANK = """
import sys, torch.distributed as dist
from sartor.machine import measure_links
from sartor.machine.measure_links import measure_collectives
measure_links._COLLECTIVE_BYTES, measure_links._COLLECTIVE_REPEATS = (2**10, 2**16), 3
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=int(sys.argv[2]), world_size=2)
rates = measure_collectives()
print([(r.name, r.backend, r.ranks, r.alpha_seconds, r.beta_bytes_per_second) for r in rates])
dist.destroy_process_group()
"""


def test_collectives_between_two_ranks(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK, str(tmp_path / "store"), str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], said
    assert said[0][0] == said[1][0]
    for name in ("all_reduce", "all_gather", "reduce_scatter", "broadcast"):
        assert f"('{name}', 'gloo', 2, " in said[0][0]


def test_collectives_need_ranks() -> None:
    assert not dist.is_initialized()
    with pytest.raises(UsageError, match="ranks"):
        measure_collectives()


def test_the_clock_takes_what_a_call_typically_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the quickest batch nor interrupted ones; while the three quickest do not agree, it goes on."""
    clock, times = Clock(CPU), iter([5.0, 9.0, 9.0] + [9.0, 1.0, 1.3, 1.1, 1.2, 1.05] + [9.0] * 100)
    now = iter(range(10_000))
    monkeypatch.setattr(Clock, "once", lambda clock, call, times_=1: next(times))
    monkeypatch.setattr("sartor.machine.clock.time.perf_counter", lambda: 0.01 * next(now))
    assert clock.seconds(lambda: None, budget=0.05) == 1.3


def test_version_is_in_the_file(measured: Calibration) -> None:
    assert measured.to_mapping()["version"] == module.CALIBRATION_VERSION == 10
