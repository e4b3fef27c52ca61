"""Whatever is wrong with what a user gives: one clear message, the right exit code, no traceback, nothing lost."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sartor.cli import main

Sartor = Callable[..., tuple[int, str]]


@pytest.fixture
def sartor(job_tree: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Sartor:
    """Runs `sartor COMMAND job.yaml …` with changes to the job; returns exit code and standard error."""

    def run(command: str = "plan", *arguments: str, **changes: Any) -> tuple[int, str]:
        for key, value in changes.items():
            old = job_tree.get(key)
            job_tree[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
        job_file = tmp_path / "job.yaml"
        job_file.write_text(yaml.safe_dump(job_tree), encoding="utf-8")
        capsys.readouterr()
        try:
            main([command, str(job_file), *arguments])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        else:
            code = 0
        message = capsys.readouterr().err
        assert "Traceback" not in message
        return code, message

    return run


def data_file(tmp_path: Path, content: str | bytes, name: str = "bad.jsonl") -> dict[str, str]:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return {"path": str(path)}


GOOD = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) + "\n"


def test_the_job_itself_is_fine(sartor: Sartor) -> None:
    assert sartor("plan")[0] == 0


def test_unknown_key(sartor: Sartor) -> None:
    code, message = sartor("plan", "training.learning_rat=1e-4")
    assert code == 2
    assert "did you mean `training.learning_rate`?" in message


def test_a_key_of_another_tool(sartor: Sartor) -> None:
    code, message = sartor("plan", per_device_train_batch_size=4)
    assert code == 2
    assert "strategy.micro_batch" in message
    assert "job.yaml:" in message


@pytest.mark.parametrize(
    ("override", "remedy"),
    [
        ("training.epochs=many", "a number"),
        ("training.global_batch=2.5", "a whole number"),
        ("training.global_batch=0", "at least 1"),
        ("data.packing=perhaps", "true or false"),
        ("machine.host_memory=lots", "a size such as 6GiB"),
        ("method=lorra", "one of full, lora"),
        ("training=3", "section"),
        ("epochs", "key=value"),
    ],
)
def test_wrong_type_or_range(sartor: Sartor, override: str, remedy: str) -> None:
    code, message = sartor("plan", override)
    assert code == 2
    assert remedy in message


def test_missing_job_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["plan", str(tmp_path / "none.yaml")])
    assert end.value.code == 2
    assert "no job file" in capsys.readouterr().err


def test_a_job_that_is_no_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job.yaml").write_text("model: [unclosed", encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        main(["plan", str(tmp_path / "job.yaml")])
    assert end.value.code == 2
    assert "not valid YAML" in capsys.readouterr().err


def test_missing_data_file(sartor: Sartor) -> None:
    code, message = sartor("plan", data={"path": "nowhere/train.jsonl"})
    assert code == 2
    assert "nowhere/train.jsonl" in message


@pytest.mark.parametrize("content", ["", "\n\n", "[]"])
def test_empty_data(sartor: Sartor, tmp_path: Path, content: str) -> None:
    code, message = sartor("plan", data=data_file(tmp_path, content, "bad.json" if content == "[]" else "bad.jsonl"))
    assert code == 2
    assert "bad.json" in message


def test_malformed_line_is_named(sartor: Sartor, tmp_path: Path) -> None:
    code, message = sartor("plan", data=data_file(tmp_path, GOOD + GOOD + '{"messages": [\n' + GOOD))
    assert code == 2
    assert "bad.jsonl:3" in message


def test_not_utf8(sartor: Sartor, tmp_path: Path) -> None:
    code, message = sartor("plan", data=data_file(tmp_path, GOOD.encode() + b'{"text": "caf\xe9"}\n'))
    assert code == 2
    assert "UTF-8" in message


def test_nothing_unmasked(sartor: Sartor, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": False}]
    code, message = sartor("plan", data=data_file(tmp_path, json.dumps({"messages": turns}) + "\n"))
    assert code == 2
    assert "count in the loss" in message


@pytest.mark.parametrize("overlong", ["drop", "truncate"])
def test_every_sample_too_long(sartor: Sartor, overlong: str) -> None:
    code, message = sartor("plan", data={"max_length": 4, "overlong": overlong})
    assert code == 2
    assert "raise `data.max_length`" in message


def test_unknown_format(sartor: Sartor, tmp_path: Path) -> None:
    code, message = sartor("plan", data=data_file(tmp_path, '{"foo": 1, "bar": 2}\n'))
    assert code == 2
    assert "foo" in message
    assert "data.format" in message or "data.columns" in message


def test_missing_model(sartor: Sartor) -> None:
    code, message = sartor("plan", model="nobody/nothing-like-this")
    assert code == 2
    assert "nobody/nothing-like-this" in message


@pytest.fixture
def own_model(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def test_pickled_weights_are_not_opened(sartor: Sartor, own_model: Path) -> None:
    (own_model / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(1)}, own_model / "pytorch_model.bin")
    code, message = sartor("train", model=str(own_model))
    assert code == 2
    assert "pickled" in message


def test_truncated_safetensors(sartor: Sartor, own_model: Path) -> None:
    weights = own_model / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    code, message = sartor("train", model=str(own_model))
    assert code == 2
    assert str(own_model) in message


def test_weights_that_lack_tensors(sartor: Sartor, own_model: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(own_model / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, own_model / "model.safetensors", metadata={"format": "pt"})
    code, message = sartor("train", model=str(own_model))
    assert code == 2
    assert "model.layers.1.mlp.up_proj.weight" in message


def test_a_tokenizer_of_another_model(sartor: Sartor, own_model: Path) -> None:
    config = json.loads((own_model / "config.json").read_text())
    (own_model / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    code, message = sartor("plan", model=str(own_model))
    assert code == 2
    assert "tokenizer" in message


def test_tokenizer_without_a_template(sartor: Sartor, own_model: Path) -> None:
    (own_model / "chat_template.jinja").unlink()
    code, message = sartor("plan", model=str(own_model))
    assert code == 2
    assert "data.template" in message
    assert "chatml" in message
    assert sartor("plan", data={"template": "chatml"})[0] == 0


def test_tokenizer_without_a_pad_token_trains_all_the_same(sartor: Sartor, own_model: Path, tmp_path: Path) -> None:
    path = own_model / "tokenizer_config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key != "pad_token"}
    path.write_text(json.dumps(config))
    assert sartor("train", model=str(own_model), training={"max_steps": 1})[0] == 0
    assert (tmp_path / "run/run.json").is_file()


def test_output_in_use(sartor: Sartor, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with (tmp_path / "run/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, message = sartor("train")
    assert code == 2
    assert "in use" in message


def test_output_that_holds_a_run_is_not_overwritten(sartor: Sartor, tmp_path: Path) -> None:
    assert sartor("train", training={"max_steps": 1})[0] == 0
    before = (tmp_path / "run/model.safetensors").read_bytes()
    code, message = sartor("train")
    assert code == 2
    assert "--resume" in message
    assert (tmp_path / "run/model.safetensors").read_bytes() == before


def test_unwritable_output(sartor: Sartor, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    code, message = sartor("train", output=str(tmp_path / "file/run"))
    assert code == 2
    assert "cannot write" in message


def test_a_device_that_is_not_there(sartor: Sartor) -> None:
    code, message = sartor("plan", "machine.device=tpu")
    assert code == 2
    assert "cpu" in message


def test_a_job_that_cannot_fit_is_refused_before_anything_is_loaded(sartor: Sartor, tmp_path: Path) -> None:
    code, message = sartor("train", "machine.host_memory=50MiB", "training.global_batch=2")
    assert code == 2
    assert "does not fit" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_disk_full_during_a_checkpoint(sartor: Sartor, tmp_path: Path) -> None:
    """A file size limit stands in for the full disk; a job on a full tmpfs takes the same path (see below)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        code, message = sartor("train", training={"save_every": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 1, message
    assert "--resume" in message
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert not list((tmp_path / "run").glob(".checkpoint-*"))


@pytest.mark.slow
def test_disk_full_on_a_real_file_system(sartor: Sartor, job_tree: dict[str, Any], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("cannot mount a small file system: not root")
    try:
        code, message = sartor("train", output=str(disk / "run"), training={"save_every": 2, "keep_last": 9})
        assert code == 1
        assert "the disk is full" in message
        kept = sorted(path.name for path in (disk / "run").glob("checkpoint-*"))
        assert kept, "the first checkpoint fits"
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        assert sartor("train", "--resume")[0] == 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("command", ["plan", "data"])
@pytest.mark.parametrize("name", ["file/page.html", "folder", "x" * 300])
def test_a_page_that_cannot_be_written(sartor: Sartor, tmp_path: Path, command: str, name: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    code, message = sartor(command, "--html", str(tmp_path / name))
    assert code == 2
    assert f"cannot write {tmp_path / name}" in message
    assert "why:" in message
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
