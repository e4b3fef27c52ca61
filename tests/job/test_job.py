"""One strict YAML: what is read, what is refused, and that a resolved job reads back equal."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sartor.errors import JobError
from sartor.job import Job, from_mapping, load, to_mapping, to_yaml
from sartor.job.hints import known_keys, suggest
from sartor.job.reference import reference
from sartor.job.schema import TrainingJob
from sartor.job.units import format_bytes, format_count, format_seconds, parse_bytes

MINIMAL = {"model": "some/model", "data": "train.jsonl"}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_shorthands_defaults_and_numbers_as_people_write_them(tmp_path: Path) -> None:
    text = "model: a/b\ndata: x.jsonl\ntraining: {learning_rate: 2e-5, global_batch: 1_024}\n"
    text += "machine: {host_memory: 6GiB}\nstrategy: auto\n"
    job = load(write(tmp_path, text))
    assert (job.model.path, job.data.path, job.method) == ("a/b", "x.jsonl", "lora")
    assert job.training.learning_rate == 2e-5
    assert job.training.global_batch == 1024
    assert job.machine.host_memory == 6 * 2**30


def test_the_command_line_wins_also_over_a_shorthand(tmp_path: Path) -> None:
    path = write(tmp_path, "model: a/b\ndata: x.jsonl\nstrategy: auto\n")
    job = load(path, ["model.revision=main", "training.epochs=2", "strategy.micro_batch=4", "lora.targets=[q_proj, v_proj]"])
    assert job.model.path == "a/b"
    assert job.model.revision == "main"
    assert job.strategy.micro_batch == 4
    assert job.lora.targets == ["q_proj", "v_proj"]


def test_a_peft_section_is_a_method() -> None:
    assert from_mapping({**MINIMAL, "peft": {"peft_type": "IA3"}}).method == "peft"
    with pytest.raises(JobError, match="remove one"):
        from_mapping({**MINIMAL, "method": "lora", "peft": {"peft_type": "IA3"}})
    with pytest.raises(JobError, match="needs a `peft` section"):
        from_mapping({**MINIMAL, "method": "peft"})


def test_messages_name_line_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"job\.yaml:3: unknown key `traning`") as error:
        load(write(tmp_path, "model: a/b\ndata: x\ntraning: {}\n"))
    assert "did you mean `training`?" in str(error.value)
    with pytest.raises(JobError, match=r"job\.yaml:4: `training.epochs` is -1"):
        load(write(tmp_path, "model: a/b\ndata: x\ntraining:\n  epochs: -1\n"))
    with pytest.raises(JobError, match=r"job\.yaml:3: `model` is given twice"):
        load(write(tmp_path, "model: a/b\ndata: x\nmodel: c\n"))


def test_a_wrong_override_is_not_blamed_on_a_line_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "model: a/b\ndata: x\ntraining:\n  epochs: 1\n")
    with pytest.raises(JobError) as error:
        load(path, ["training.epochs=-1"])
    assert "job.yaml:4" not in str(error.value)


@pytest.mark.parametrize("missing", ["model", "data"])
def test_what_a_job_must_have(missing: str) -> None:
    with pytest.raises(JobError, match=f"`{missing}` is missing"):
        from_mapping({key: value for key, value in MINIMAL.items() if key != missing})


@given(st.text(max_size=12) | st.integers() | st.floats() | st.booleans() | st.none() | st.lists(st.integers(), max_size=2))
def test_any_value_anywhere_is_read_or_refused_with_a_message(value: object) -> None:
    for key in ("epochs", "global_batch", "betas", "schedule", "tensorboard", "max_steps"):
        try:
            job = from_mapping({**MINIMAL, "training": {key: value}})
        except JobError as error:
            message = str(error)
        else:
            message = f"training.{key}"
            assert from_mapping(to_mapping(job)) == job
        assert f"training.{key}" in message


def test_a_resolved_job_reads_back_equal(tmp_path: Path) -> None:
    job = from_mapping({**MINIMAL, "method": "full", "training": {"learning_rate": 1e-4}, "machine": {"host_memory": "3GiB"}})
    assert load(write(tmp_path, to_yaml(job))) == job


def test_every_default_is_within_its_own_limits() -> None:
    assert isinstance(from_mapping(to_mapping(from_mapping(MINIMAL))), Job)


def test_every_key_is_documented() -> None:
    assert "training.learning_rate" in known_keys()
    for field in dataclasses.fields(TrainingJob):
        assert field.metadata["meaning"]


@pytest.mark.parametrize(
    ("key", "prefix", "expected"),
    [
        ("gradient_accumulation_steps", "", "training.global_batch"),
        ("learning_rate", "", "training.learning_rate"),
        ("epoch", "training.", "training.epochs"),
        ("xyzzy", "lora.", "rank, alpha"),
    ],
)
def test_suggestions(key: str, prefix: str, expected: str) -> None:
    assert expected in suggest(key, prefix)


def test_units() -> None:
    assert parse_bytes("6GiB") == 6 * 2**30
    assert parse_bytes("6GB") == 6 * 10**9
    assert parse_bytes("1.5g") == 1.5 * 2**30
    assert parse_bytes(123) == 123
    for wrong in ("", "GiB", "6 parsecs", "-1GiB"):
        with pytest.raises(ValueError, match="not a size"):
            parse_bytes(wrong)
    assert format_bytes(1.5 * 2**30) == "1.50 GiB"
    assert format_bytes(1023) == "1023 B"
    assert format_seconds(200) == "3 min 20 s"
    assert format_count(7_241_732_096) == "7.24B"


def test_the_reference_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs/job.md"
    assert page.read_text(encoding="utf-8") == reference(), "run: python -m sartor.job.reference > docs/job.md"
