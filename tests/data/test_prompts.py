"""Prompt and reference of a sample."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sartor.data import Sample, encode_prompt, prepare, prompt_and_reference
from sartor.errors import DataError


def test_last_answer(write: Callable[..., Path], job_for: Any, byte_level: Any) -> None:
    tokenizer = byte_level(template=None)
    turns = [("user", "Hello"), ("assistant", "Hi"), ("user", "And?"), ("assistant", " All well ")]
    path = write([{"messages": [{"role": role, "content": content} for role, content in turns]}])
    sets = prepare(job_for(path, template="chatml"), tokenizer, max_length=128)
    prompt, reference = prompt_and_reference(sets.train[0], tokenizer)
    assert reference == "All well"
    assert tokenizer.decode(prompt).endswith("And?<|im_end|>\n<|im_start|>assistant\n")
    assert all(type(token) is int for token in prompt)


@pytest.mark.parametrize("template", ["chatml", "vicuna", "plain"])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_chat_asks_as_training_did(
    write: Callable[..., Path], job_for: Any, byte_level: Any, template: str, adds_bos: bool
) -> None:
    tokenizer = byte_level(adds_bos=adds_bos)
    path = write([{"prompt": "How are you?", "completion": "Fine"}])
    sets = prepare(job_for(path, template=template), tokenizer, max_length=256)
    asked = encode_prompt(tokenizer, [{"role": "user", "content": "How are you?"}])
    assert asked == prompt_and_reference(sets.train[0], tokenizer)[0]
    assert asked.count(tokenizer.bos_token_id) == 1


def test_a_chat_whose_template_leaves_bos_to_the_tokenizer(byte_level: Any) -> None:
    tokenizer = byte_level(adds_bos=True, template="{% for m in messages %}{{ m.content }}{% endfor %}")
    assert encode_prompt(tokenizer, [{"role": "user", "content": "you"}])[0] == tokenizer.bos_token_id
    assert encode_prompt(tokenizer, "<s>you") == encode_prompt(tokenizer, "you")
    with pytest.raises(DataError, match="does not render"):
        encode_prompt(byte_level(template="{{ raise_exception('no') }}"), [{"role": "user", "content": "you"}])


def test_plain_text(write: Callable[..., Path], job_for: Any, byte_level: Any) -> None:
    tokenizer = byte_level(adds_bos=True)
    sets = prepare(job_for(write("How are you today? " * 8, "a.txt")), tokenizer, max_length=64)
    sample = sets.train[0]
    prompt, reference = prompt_and_reference(sample, tokenizer)
    assert len(prompt) == len(sample) // 4
    assert tokenizer.decode(prompt, skip_special_tokens=True).strip() + " " + reference in ("How are you today? " * 8)
    assert len(prompt_and_reference(Sample(input_ids=np.arange(400), trained=np.ones(400, bool), source=""), tokenizer)[0]) == 32


def test_nothing_trained(byte_level: Any) -> None:
    sample = Sample(input_ids=np.arange(5, 8), trained=np.zeros(3, bool), source="")
    assert prompt_and_reference(sample, byte_level()) == ([5, 6, 7], "")
