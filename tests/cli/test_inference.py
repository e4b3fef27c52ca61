"""`sartor plan --inference`, as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sartor.cli import main


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    capsys.readouterr()
    try:
        main(list(arguments))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    else:
        code = 0
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


@pytest.fixture
def job_file(tiny: Path, tmp_path: Path) -> str:
    """A job that only plans inference."""
    path = tmp_path / "job.yaml"
    path.write_text(f"model: {tiny}/config.json\ninference: {{prompt: 60, answer: 20}}\nmachine: L40S-48GB\n", encoding="utf-8")
    return str(path)


def test_in_words(capsys: pytest.CaptureFixture[str], job_file: str) -> None:
    code, out, _ = run(capsys, "plan", job_file, "--inference", "inference.batch=2")
    assert code == 0
    assert "2 prompts of 60 tokens, of different length, answers of 20" in out
    assert "fits" in out
    assert "C cache" in out
    assert "prompts of up to 108 tokens (the model's 128 positions)" in " ".join(out.split())
    assert "batches of up to" in out


def test_as_json_and_without_a_file(capsys: pytest.CaptureFixture[str], tiny: Path) -> None:
    words = ["inference.prompt=50", "inference.answer=5", "machine=L40S-48GB"]
    code, out, _ = run(capsys, "plan", f"model={tiny}/config.json", *words, "--inference", "--json")
    assert code == 0
    tree = json.loads(out)
    assert tree["schema_version"] == 1
    assert tree["verdict"] == tree["forecast"]["verdict"] == "fits"
    assert tree["inference"]["prompt"] == 50
    assert tree["cache_bytes"] > 0
    assert tree["longest_prompt"] == 123


def test_what_does_not_fit_ends_with_2_and_says_what_would(capsys: pytest.CaptureFixture[str], job_file: str) -> None:
    limits = "inference.batch=4000", "inference.answer=4", "machine.device_memory=600MiB"
    code, _, message = run(capsys, "plan", job_file, "--inference", *limits)
    assert code == 2
    assert "does not fit on L40S-48GB" in message
    assert "inference.batch=" in message


@pytest.mark.parametrize("command", ["plan", "train", "data"])
def test_training_still_needs_data(capsys: pytest.CaptureFixture[str], job_file: str, command: str) -> None:
    code, _, message = run(capsys, command, job_file)
    assert code == 2
    assert "`data` is missing" in message


def test_wrong_input(capsys: pytest.CaptureFixture[str], job_file: str, tmp_path: Path) -> None:
    for arguments, words in {
        ("inference.bach=2",): "did you mean `inference.batch`?",
        ("inference.cache=paged",): "one of dynamic, static",
        ("inference.prompt=0",): "at least 1",
        ("--html", str(tmp_path / "plan.html")): "--html",
    }.items():
        code, _, message = run(capsys, "plan", job_file, "--inference", *arguments)
        assert code == 2
        assert words in message
    code, _, message = run(capsys, "plan", str(tmp_path / "none.yaml"), "--inference")
    assert code == 2
    assert "no job file" in message
