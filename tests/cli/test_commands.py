"""Every command, as a user types it."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sartor.cli import main
from sartor.job.schema import MachineJob


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Standard output of a command that ends well."""
    capsys.readouterr()
    try:
        main(list(arguments))
    except SystemExit as end:
        code = end.code
    else:
        code = 0
    captured = capsys.readouterr()
    assert not code, captured.err
    return captured.out


@pytest.fixture
def job_file(job_tree: dict[str, Any], tmp_path: Path) -> str:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(job_tree), encoding="utf-8")
    return str(path)


def test_plan_in_words_and_as_json(capsys: pytest.CaptureFixture[str], job_file: str) -> None:
    assert "fits" in run(capsys, "plan", job_file)
    tree = json.loads(run(capsys, "plan", job_file, "--json", "training.epochs=1"))
    assert tree["total_steps"] == 3
    assert tree["forecast"]["verdict"] == "fits"


def test_plan_as_a_page(capsys: pytest.CaptureFixture[str], job_file: str, tmp_path: Path) -> None:
    page = tmp_path / "new" / "plan.html"
    assert f"written: {page}" in "".join(run(capsys, "plan", job_file, "--html", str(page)).split("\n"))
    html = page.read_text(encoding="utf-8")
    assert "Memory over a step" in html
    assert "<svg" in html
    assert list(page.parent.iterdir()) == [page]
    json.loads(run(capsys, "plan", job_file, "--json", "--html", str(page)))  # what is printed stays JSON


def test_data_in_the_terminal_and_as_a_page(capsys: pytest.CaptureFixture[str], job_file: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    out = run(capsys, "data", job_file, "--html", str(page))
    assert "⟦" in out
    assert "<html" in page.read_text(encoding="utf-8")


def test_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert "cores" in run(capsys, "machine")
    assert "not measured yet" in run(capsys, "machine")
    tree = json.loads(run(capsys, "machine", "8xA100-80GB", "--json"))
    assert tree["machine"]["devices_per_node"] == 8


def test_calibrating(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The measuring itself is tested in the machine room: here what is kept and said around it."""
    from sartor.machine import find_calibration, probe
    from sartor.machine import measure as measure_module
    from sartor.machine.calibrate import calibrate
    from sartor.machine.clock import Clock

    for name, value in {"_ROWS_M": (16,), "_SHAPES_NK": ((64, 64),), "_MEMORY_BYTES": (), "_LENGTHS": ()}.items():
        monkeypatch.setattr(measure_module, name, value)
    monkeypatch.setattr(Clock, "seconds", lambda clock, call, budget=0.0: max(clock.once(call), 1e-9))
    monkeypatch.setattr(sys.modules[calibrate.__module__], "_largest_bytes", lambda _: 2**20)
    monkeypatch.setattr(sys.modules[calibrate.__module__], "_waited", lambda *_: 0.0)
    out = run(capsys, "machine", "--device", "cpu", "--threads", "1", "--calibrate", "--folder", str(tmp_path))
    assert "Rates measured" in out
    tree = json.loads(run(capsys, "machine", "--device", "cpu", "--threads", "1", "--json"))
    assert tree["calibration"]["disk"]["folder"] == str(tmp_path)
    path = find_calibration(probe(MachineJob(device="cpu", threads=1))).path
    assert path is not None
    path.write_text("{", encoding="utf-8")
    assert "measure again" in " ".join(run(capsys, "machine", "--device", "cpu", "--threads", "1").split())
    with pytest.raises(SystemExit) as refused:
        main(["machine", "L40S-48GB", "--calibrate"])
    assert refused.value.code == 2


def test_train_resume_generate_chat(
    capsys: pytest.CaptureFixture[str], job_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run(capsys, "train", job_file)
    assert "forecast" in out
    assert "\x1b[" not in out
    run(capsys, "train", job_file, "--resume")  # nothing left to do
    run(capsys, "train", job_file, "--from", "checkpoint-6")
    folder = str(tmp_path / "run")
    run(capsys, "generate", folder, "--prompt", "What is number 2?", "--max-new-tokens", "3")
    monkeypatch.setattr("sys.stdin", io.StringIO("/quit\n"))
    run(capsys, "chat", folder)


def test_the_demo_from_end_to_end_in_short(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo's folder and commands, with three steps of training; `make demo` takes all of them."""
    from sartor.demo.write import write

    job = write(tmp_path / "demo")
    run(capsys, "data", str(job))
    out = run(capsys, "train", str(job), "training.max_steps=3", "evaluation.generate=2", "machine.threads=1")
    assert "held-out loss" in out
    assert (tmp_path / "demo/run/report.html").is_file()
