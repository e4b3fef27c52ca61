"""Templates: which one is chosen, what the built-in ones write, and what is said about them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from sartor.data import template
from sartor.errors import DataError

CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U"},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "V"},
    {"role": "assistant", "content": "B"},
]
RENDERED = {
    "plain": "<s>SUA</s>VB</s>",
    "chatml": "<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|></s>\n"
    "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\nB<|im_end|></s>\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|></s><|start_header_id|>user<|end_header_id|>\n\nV<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nB<|eot_id|></s>",
    "alpaca": "<s>S\n\n### Instruction:\nU\n\n### Response:\nA</s>\n\n### Instruction:\nV\n\n### Response:\nB</s>",
    "vicuna": "<s>S USER: U ASSISTANT: A</s>USER: V ASSISTANT: B</s>",
}


@pytest.mark.parametrize("name", template.BUILT_IN)
def test_built_in(byte_level: Callable[..., Any], name: str) -> None:
    tokenizer = byte_level()
    template.choose(name, tokenizer, format="messages")
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == RENDERED[name]
    prompt = tokenizer.apply_chat_template(CHAT[:4], tokenize=False, add_generation_prompt=True)
    assert RENDERED[name].startswith(prompt)
    assert "B" not in prompt


@pytest.mark.parametrize("name", template.BUILT_IN)
def test_built_in_without_special_tokens(byte_level: Callable[..., Any], name: str) -> None:
    tokenizer = byte_level(bos_token=None, eos_token=None)
    template.choose(name, tokenizer, format="messages")
    expected = RENDERED[name].replace("<s>", "").replace("</s>", "")
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == expected


def test_chatml_ends_a_turn_once(byte_level: Callable[..., Any]) -> None:
    tokenizer = byte_level(bos_token=None, eos_token="<|im_end|>")
    assert template.choose("chatml", tokenizer, format="messages").end == "<|im_end|>"


def test_alpaca_wording(byte_level: Callable[..., Any]) -> None:
    tokenizer = byte_level(bos_token=None)
    template.choose("alpaca", tokenizer, format="alpaca")
    assert tokenizer.apply_chat_template(CHAT[1:3], tokenize=False) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nU\n\n### Response:\nA</s>"
    )


def test_auto(byte_level: Callable[..., Any]) -> None:
    own = "{% for m in messages %}{{ m.content }}!{% endfor %}"
    chosen = template.choose("auto", byte_level(template=own), format="messages")
    assert (chosen.name, chosen.text, chosen.end) == ("the tokenizer's own", own, "!")
    plain = template.choose("auto", byte_level(), format="prompt-completion")
    assert plain.name == "plain"
    assert "nothing between" in plain.notes[0]
    with pytest.raises(DataError, match="alpaca, chatml, llama3, plain, vicuna"):
        template.choose("auto", byte_level(), format="messages")


def test_file_travels_with_the_tokenizer(byte_level: Callable[..., Any], write: Callable[..., Path], tmp_path: Path) -> None:
    path = write("{% for m in messages %}[{{ m.content }}]{% endfor %}", "my.jinja")
    tokenizer = byte_level()
    chosen = template.choose(str(path), tokenizer, format="messages")
    tokenizer.save_pretrained(tmp_path / "saved")
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved").chat_template == chosen.text == path.read_text()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{% for", "does not render"),
        ("{{ raise_exception('no') }}", "no"),
        ("hello", "leaves the assistant's words out"),
        (None, "there is no chat template"),
    ],
)
def test_unusable(byte_level: Callable[..., Any], write: Callable[..., Path], text: str | None, says: str) -> None:
    name = "chatlm" if text is None else str(write(text, "my.jinja"))
    with pytest.raises(DataError) as caught:
        template.choose(name, byte_level(), format="messages")
    assert says in str(caught.value)


def test_notes(byte_level: Callable[..., Any], write: Callable[..., Path]) -> None:
    assert not template.choose("chatml", byte_level(), format="messages").notes
    llama = template.choose("llama3", byte_level(), format="messages")
    assert "<|start_header_id|>, <|end_header_id|>" in llama.notes[0]
    assert "ordinary text" in llama.notes[0]
    endless = template.choose("plain", byte_level(eos_token=None), format="messages")
    assert "will not learn to stop" in endless.notes[0]
    assert not template.choose("chatml", byte_level(eos_token=None), format="messages").notes, "<|im_end|> is a token here"
    as_text = template.choose("llama3", byte_level(eos_token=None), format="messages")
    assert "answers end with '<|eot_id|>', which is ordinary text" in as_text.notes[1]
