"""What the loop writes, and how it stops when the loss is not a number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sartor
from sartor.errors import JobError, RunError
from sartor.train import read_metrics
from support import conversations, make_model, write_jsonl


def test_a_poisoned_example_is_named_and_nothing_is_lost(job_tree: dict[str, Any], tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", tie_word_embeddings=False)
    from transformers import AutoTokenizer

    records = conversations(24)
    records[13]["messages"][0]["content"] += " ~"
    rare = AutoTokenizer.from_pretrained(folder)(" ~", add_special_tokens=False).input_ids[-1]
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][rare] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    job_tree |= {
        "model": str(folder),
        "data": str(write_jsonl(tmp_path / "poison.jsonl", records)),
        "strategy": {"micro_batch": 1},
    }
    job_tree["training"] |= {"global_batch": 6, "learning_rate": 1e-5}
    job_tree["data"] = {"path": job_tree["data"], "packing": False}
    with pytest.raises(RunError, match="not a finite number") as stopped:
        sartor.train(job_tree)
    assert "poison.jsonl:14" in str(stopped.value)
    assert str(stopped.value).count("poison.jsonl") == 1
    done = sum("loss" in line for line in read_metrics(tmp_path / "run"))
    saved = load_file(tmp_path / f"run/checkpoint-{done}/model.safetensors")
    assert all(tensor.isfinite().all() for name, tensor in saved.items() if "embed_tokens" not in name)


def test_the_folder_of_a_run(job_tree: dict[str, Any], tmp_path: Path) -> None:
    job_tree["training"] |= {"tensorboard": True, "save_every": 2, "keep_last": 2}
    job_tree["evaluation"] = {"fraction": 0.25, "every": 3, "generate": 1, "max_new_tokens": 2}
    run = sartor.train(job_tree)
    folder = tmp_path / "run"
    lines = read_metrics(folder)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, run.steps + 1))
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 3, run.steps]
    assert {"loss", "grad_norm", "learning_rate", "epoch", "tokens_per_second"} <= lines[1].keys()
    assert list((folder / "tensorboard").glob("events*"))
    assert len(list(folder.glob("checkpoint-*"))) == 2
    assert (folder / "LATEST").read_text().strip() == f"checkpoint-{run.steps}"
    for name in ("job.yaml", "plan.yaml", "run.json", "report.html", "chat_template.jinja", "tokenizer.json"):
        assert (folder / name).is_file(), name
    assert json.loads((folder / "run.json").read_text())["memory"]["error_percent"] is not None
    assert not list(folder.glob("*.bin"))
    assert not list(folder.rglob("*.pt"))


@pytest.mark.parametrize("mode", ["float32", "bf16-mixed", "bf16"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_every_precision_learns(job_tree: dict[str, Any], method: str, mode: str) -> None:
    job_tree |= {"method": method, "precision": mode}
    job_tree["training"] |= {"epochs": 8, "learning_rate": 1e-2}
    run = sartor.train(job_tree)
    assert run.first_loss is not None
    assert run.last_loss is not None
    assert run.last_loss < run.first_loss - 0.2


def test_the_same_job_gives_the_same_run(job_tree: dict[str, Any], tmp_path: Path) -> None:
    for name in ("one", "two"):
        sartor.train({**job_tree, "output": str(tmp_path / name)})
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_models_that_mix_packed_examples_are_not_packed(job_tree: dict[str, Any], tmp_path: Path) -> None:
    """OPT takes position ids but builds its mask without them: the check on the real model finds out. With attention by segments
    there is no mask, and it can be packed."""
    from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(job_tree["model"])
    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32}
    config = OPTConfig(
        **sizes, vocab_size=len(tokenizer), max_position_embeddings=128, dropout=0.0, pad_token_id=0, bos_token_id=1
    )
    torch.manual_seed(0)
    OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    tokenizer.save_pretrained(tmp_path / "opt")
    said: list[str] = []

    class Listener(sartor.Observer):
        def said(self, text: str) -> None:
            said.append(text)

    tree = {**job_tree, "model": str(tmp_path / "opt"), "training": {**job_tree.get("training", {}), "max_steps": 1}}
    assert sartor.plan(tree).strategy.packing
    sartor.train(tree, observers=[Listener()])
    assert not any("not packed after all" in text for text in said)
    dense = {"strategy": {"attention": "sdpa"}, "output": str(tmp_path / "dense")}
    assert not sartor.plan({**tree, **dense}).strategy.packing
    with pytest.raises(JobError, match="see each other"):
        sartor.train({**tree, **dense, "data": {**tree["data"], "packing": True}})


def test_one_of_several_processes_is_refused(job_tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="one of 2 processes"):
        sartor.train(job_tree)
