"""Prompt and reference of a sample."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sartor.data import Sample, prepare, prompt_and_reference


def test_last_answer(write: Callable[..., Path], job_for: Any, byte_level: Any) -> None:
    tokenizer = byte_level(template=None)
    turns = [("user", "Hello"), ("assistant", "Hi"), ("user", "And?"), ("assistant", " All well ")]
    path = write([{"messages": [{"role": role, "content": content} for role, content in turns]}])
    sets = prepare(job_for(path, template="chatml"), tokenizer, max_length=128)
    prompt, reference = prompt_and_reference(sets.train[0], tokenizer)
    assert reference == "All well"
    assert tokenizer.decode(prompt).endswith("And?<|im_end|>\n<|im_start|>assistant\n")
    assert all(type(token) is int for token in prompt)


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
