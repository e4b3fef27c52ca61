"""The result is everybody's: PEFT and transformers load a run's folder, the template travels along, answers stop at their end."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

import sartor
from sartor.errors import ModelError, UsageError
from sartor.serve import Sampling, Session, chat
from sartor.train import load_run

IDS = torch.tensor([[5, 80, 200, 310, 41, 7]])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


class Keep(sartor.Observer):
    """Holds on to the live model's logits at the end."""

    def trained(self, model: Any, tokenizer: Any, sets: Any) -> None:
        self.logits = logits(model)


def test_a_full_run_loads_in_transformers_with_equal_logits(job_tree: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    keep = Keep()
    sartor.train(job_tree, observers=[keep])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert torch.equal(logits(loaded), keep.logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(job_tree["model"]).chat_template
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoint-6")), keep.logits)


@pytest.mark.parametrize("method", ["lora", "prefix", "prompt", "peft"])
def test_an_adapter_run_loads_in_peft_with_equal_logits(job_tree: dict[str, Any], tmp_path: Path, method: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    job_tree |= {"prefix": {"length": 4}, "prompt": {"length": 4}}
    if method == "peft":
        del job_tree["method"]
        job_tree["peft"] = {
            "peft_type": "IA3",
            "target_modules": ["k_proj", "v_proj", "down_proj"],
            "feedforward_modules": ["down_proj"],
        }
    else:
        job_tree["method"] = method
    job_tree["precision"] = "float32"  # so that the base model is loaded below as the run had it
    keep = Keep()
    run = sartor.train(job_tree, observers=[keep])
    base = AutoModelForCausalLM.from_pretrained(job_tree["model"])
    plain = logits(base)
    loaded = PeftModel.from_pretrained(base, tmp_path / "run")
    assert torch.equal(logits(loaded), keep.logits)
    assert not torch.equal(keep.logits[:, -6:], plain)
    assert AutoTokenizer.from_pretrained(tmp_path / "run").chat_template
    assert run.last_loss is not None


def test_an_adapter_configuration_file_is_a_method_too(job_tree: dict[str, Any], tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 3, "target_modules": ["q_proj"], "peft_version": "0.19.0", "inference_mode": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    del job_tree["method"]
    plan = sartor.plan({**job_tree, "peft": str(tmp_path / "adapter_config.json")})
    assert plan.trained_parameters == 2 * (32 * 3 + 3 * 32)


def test_a_named_template_travels_with_the_run(job_tree: dict[str, Any], tmp_path: Path) -> None:
    job_tree["data"]["template"] = "alpaca"
    sartor.train(job_tree)
    session = Session.open(str(tmp_path / "run"), device="cpu")
    assert "### Instruction:" in session.tokenizer.decode(session.encode("Name a colour."))
    assert session.chat


def test_answers_streamed_and_whole_and_a_conversation(job_tree: dict[str, Any], tmp_path: Path) -> None:
    sartor.train(job_tree)
    session = Session.open(str(tmp_path / "run"), device="cpu")
    sampling = Sampling(max_new_tokens=12)
    assert "".join(session.stream("What is number 3?", sampling)) == session.answer("What is number 3?", sampling)
    warm = Sampling(max_new_tokens=12, temperature=1.5, seed=3)
    assert session.answer("What is number 3?", warm) == session.answer("What is number 3?", warm)
    said = iter(["What is number 3?", "", "/new", "And number 4?", "/quit"])
    console = Console(file=io.StringIO())
    messages = chat(session, Sampling(max_new_tokens=4), console, read=lambda prompt: next(said))
    assert [message["role"] for message in messages] == ["user", "assistant"]
    assert messages[0]["content"] == "And number 4?"


def test_plain_text_runs_continue_text_and_know_no_chat(job_tree: dict[str, Any], tmp_path: Path) -> None:
    text = tmp_path / "story.txt"
    text.write_text("Once there was a sailor who had a boat. " * 40, encoding="utf-8")
    job_tree["data"] = {"path": str(text), "max_length": 64}
    sartor.train(job_tree)
    session = Session.open(str(tmp_path / "run"), device="cpu")
    assert session.answer("Once there", Sampling(max_new_tokens=5))
    with pytest.raises(UsageError, match="plain text"):
        chat(session, Sampling(), Console(file=io.StringIO()))


def test_a_run_without_a_model_says_so(job_tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/job.yaml").write_text(yaml.safe_dump(job_tree), encoding="utf-8")
    with pytest.raises(ModelError, match="no trained model yet"):
        Session.open(str(tmp_path / "run"))


def test_the_record_reads_back(job_tree: dict[str, Any], tmp_path: Path) -> None:
    job_tree["evaluation"] = {"fraction": 0.2, "generate": 2, "max_new_tokens": 4}
    run = sartor.train(job_tree)
    assert load_run(tmp_path / "run") == run
    assert len(run.answers) == 2
    assert run.exact_match_before is not None
    assert run.memory.forecast_bytes is not None
    assert run.memory.error_percent is not None
    page = (tmp_path / "run/report.html").read_text(encoding="utf-8")
    assert "<svg" in page


def test_answers_from_before_are_those_of_the_first_process(job_tree: dict[str, Any], tmp_path: Path) -> None:
    """A resumed run shows what the untrained model said, not what the checkpoint said."""
    job_tree["evaluation"] = {"fraction": 0.2, "generate": 2, "max_new_tokens": 4}
    job_tree["training"] |= {"epochs": 3, "save_every": 2, "learning_rate": 1e-2}
    whole = sartor.train(job_tree)
    assert any(answer.before != answer.after for answer in whole.answers)
    resumed = sartor.train(job_tree, resume="latest")
    assert [answer.before for answer in resumed.answers] == [answer.before for answer in whole.answers]
