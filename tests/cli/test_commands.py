"""Every command, as a user types it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sartor.cli import main


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
