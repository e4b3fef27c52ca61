"""The loss mask: exactly the assistant's words and the token that ends them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from sartor.data import mask, template
from sartor.data.formats import Conversation, Document, Message
from sartor.data.mask import Encoder
from sartor.errors import DataError

QWEN3 = (  # as Qwen3 does: thoughts of earlier turns are dropped, the last answer always has a place for them
    "{%- for m in messages %}{% set c = m.content %}"
    "{%- if m.role == 'assistant' and not loop.last %}{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{%- if m.role == 'assistant' and loop.last and '</think>' not in c %}{% set c = '<think>\n\n</think>\n\n' + c %}{% endif %}"
    "{{- '<|im_start|>' + m.role + '\n' + c + '<|im_end|>\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"
)


def chat(*turns: str, flags: dict[int, bool] | None = None) -> Conversation:
    """`u:` user, `a:` assistant, `s:` system, `t:` tool."""
    roles = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    messages = [
        Message(role=roles[turn[0]], content=turn[2:], train=(flags or {}).get(index)) for index, turn in enumerate(turns)
    ]
    return Conversation(messages=tuple(messages), source="f:1")


def encoder(tokenizer: Any, name: str = "auto", *, train_on: str = "assistant", max_length: int = 4096) -> Encoder:
    chosen = template.choose(name, tokenizer, format="messages")
    return Encoder.make(tokenizer, chosen, train_on=train_on, max_length=max_length)


def trained_text(made: Encoder, item: Conversation) -> list[str]:
    """The trained runs of tokens, decoded."""
    (sample,) = made.encode([item])
    runs: list[list[int]] = []
    before = False
    for token, trained in zip(sample.input_ids.tolist(), sample.trained.tolist(), strict=True):
        if trained:
            runs = runs if before else [*runs, []]
            runs[-1].append(token)
        before = trained
    return [made.tokenizer.decode(run) for run in runs]


MULTI = chat("s:Be brief", "u:Hello you", "a:I am fine ", "u:And now?", "a:\nStill fine\n")


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", ["I am fine <|im_end|></s>", "\nStill fine\n<|im_end|></s>"]),
        ("llama3", ["I am fine<|eot_id|></s>", "Still fine<|eot_id|></s>"]),
        ("alpaca", ["I am fine </s>", "\nStill fine\n</s>"]),
        ("vicuna", [" I am fine </s>", " \nStill fine\n</s>"]),
        ("plain", ["I am fine </s>", "\nStill fine\n</s>"]),
    ],
)
def test_built_in_templates(byte_level: Callable[..., Any], name: str, expected: list[str], trim: bool) -> None:
    assert trained_text(encoder(byte_level(trim=trim), name), MULTI) == expected


@pytest.mark.parametrize(
    ("train_on", "flags", "expected"),
    [
        ("last", {}, ["\nStill fine\n<|im_end|></s>"]),
        ("assistant", {2: False}, ["\nStill fine\n<|im_end|></s>"]),
        ("last", {2: True}, ["I am fine <|im_end|></s>", "\nStill fine\n<|im_end|></s>"]),
        ("assistant", {1: True, 4: False}, ["Hello you", "I am fine <|im_end|></s>"]),
        ("assistant", {2: False, 4: False}, []),
    ],
)
def test_train_on_and_flags(byte_level: Callable[..., Any], train_on: str, flags: dict[int, bool], expected: list[str]) -> None:
    turns = [f"{turn.role[0]}:{turn.content}" for turn in MULTI.messages]
    assert trained_text(encoder(byte_level(), "chatml", train_on=train_on), chat(*turns, flags=flags)) == expected


def test_train_on_all(byte_level: Callable[..., Any]) -> None:
    made = encoder(byte_level(), "chatml", train_on="all")
    assert "".join(trained_text(made, MULTI)) == made.render([MULTI])[0].text
    quiet = chat("u:Hello", "a:No", flags={0: False})
    assert trained_text(made, quiet) == [
        "<s><|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\nNo<|im_end|></s>\n",
    ]


def test_qwen3_thoughts_are_dropped_from_history_and_made_room_for_at_the_end(byte_level: Callable[..., Any]) -> None:
    made = encoder(byte_level(template=QWEN3))
    thinking = "a:<think>\nhm, think\n</think>\n\nfine"
    assert trained_text(made, chat("u:think", thinking, "u:And?", "a:think")) == [
        "fine<|im_end|>",
        "<think>\n\n</think>\n\nthink<|im_end|>",
    ]
    assert trained_text(made, chat("u:think", thinking)) == ["<think>\nhm, think\n</think>\n\nfine<|im_end|>"]


def test_a_prompt_that_opens_the_thoughts(byte_level: Callable[..., Any]) -> None:
    opening = QWEN3.replace("'<|im_start|>assistant\n' }}", "'<|im_start|>assistant\n<think>\n' }}")
    made = encoder(byte_level(template=opening))
    assert trained_text(made, chat("u:x", "a:<think>\nhm\n</think>\n\nyes", "u:y", "a:<think>\nno end")) == [
        "yes<|im_end|>",
        "\n</think>\n\n<think>\nno end<|im_end|>",
    ]


def test_history_that_the_template_rewrites(byte_level: Callable[..., Any]) -> None:
    """No prompt is a beginning of the whole: the words are looked for turn by turn."""
    counting = "{{ messages | length }}" + "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
    made = encoder(byte_level(template=counting))
    assert trained_text(made, chat("u:yes or no", "a:yes", "u:no or yes", "a:no")) == ["yes</s>", "no</s>"]


def test_words_that_the_template_changes_are_an_error(byte_level: Callable[..., Any]) -> None:
    shouting = "{% for m in messages %}{{ m.content if m.content.startswith('Xq') else m.content | upper }}</s>{% endfor %}"
    with pytest.raises(DataError, match="f:1: turn 2, by the assistant, is not found"):
        list(encoder(byte_level(template=shouting)).encode([chat("u:hi", "a:hello")]))


def test_generation_marks_are_obeyed_and_the_end_is_in(byte_level: Callable[..., Any]) -> None:
    marked = (
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content | upper }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}</s>\n{% endfor %}"
    )
    item = chat("u:hi", "a:one 🙂", "u:hi", "a:two")
    assert trained_text(encoder(byte_level(template=_keeping(marked))), item) == ["ONE 🙂</s>", "TWO</s>"]
    assert trained_text(encoder(byte_level(template=_keeping(marked)), train_on="last"), item) == ["TWO</s>"]


def _keeping(text: str) -> str:
    """The probe's word must come back as it was."""
    return text.replace("m.content | upper", "(m.content if m.content.startswith('Xq') else m.content | upper)")


def test_tool_turns(byte_level: Callable[..., Any]) -> None:
    item = chat("u:weather?", "a:call", "t:sunny", "a:It is sunny")
    assert trained_text(encoder(byte_level(), "chatml"), item) == ["call<|im_end|></s>", "It is sunny<|im_end|></s>"]
    with pytest.raises(DataError, match="f:1: the chat template") as caught:
        list(encoder(byte_level(), "alpaca").encode([chat("u:x", "a:y"), item]))
    assert "turn of role tool" in str(caught.value)


def test_assistant_opens_and_empty_answers(byte_level: Callable[..., Any]) -> None:
    made = encoder(byte_level(), "chatml")
    assert trained_text(made, chat("a:Hello", "u:x", "a:")) == ["Hello<|im_end|></s>", "<|im_end|></s>"]


def test_tools_reach_the_template(byte_level: Callable[..., Any]) -> None:
    shows = "{% if tools %}{{ tools[0].name }}{% endif %}{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    item = Conversation(messages=chat("u:x", "a:y").messages, source="f:1", tools=({"name": "lookup"},))
    assert encoder(byte_level(template=shows)).render([item])[0].text == "lookupx</s>y</s>"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(st.text("a <|im_end>\n你🙂", max_size=12), min_size=2, max_size=6))
def test_any_words_are_found_where_they_stand(byte_level_once: Any, words: list[str]) -> None:
    """Also words that look like the template's own."""
    made = encoder(byte_level_once, "chatml")
    item = chat(*(f"{'ua'[index % 2]}:{word}" for index, word in enumerate(words)))
    text, expected = "<s>", []
    for turn in item.messages:
        text += f"<|im_start|>{turn.role}\n"
        end = "<|im_end|></s>" if turn.role == "assistant" else "<|im_end|>"
        if turn.role == "assistant":
            expected.append((len(text), len(text) + len(turn.content + end)))
        text += f"{turn.content}{end}\n"
    (rendered,) = made.render([item])
    assert (rendered.text, list(rendered.spans)) == (text, expected)


def test_a_flagged_turn_that_the_template_leaves_out(byte_level: Callable[..., Any]) -> None:
    answers = "{% for m in messages %}{{ m.content + '</s>' if m.role == 'assistant' else '>' }}{% endfor %}"
    made = encoder(byte_level(template=answers))
    assert trained_text(made, chat("u:x", "a:y")) == ["y</s>"]
    with pytest.raises(DataError, match="f:1: turn 1, by the user"):
        list(made.encode([chat("u:x", "a:y", flags={0: True})]))


@pytest.mark.parametrize("name", ["chatml", "plain"])
def test_one_bos(byte_level: Callable[..., Any], name: str) -> None:
    tokenizer = byte_level(adds_bos=True)
    (sample,) = encoder(tokenizer, name).encode([chat("u:x", "a:y")])
    assert sample.input_ids.tolist().count(tokenizer.bos_token_id) == 1
    silent = byte_level(adds_bos=True, template="{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    (sample,) = encoder(silent).encode([chat("u:x", "a:y")])
    assert sample.input_ids[0] == silent.bos_token_id
    assert sample.trained.tolist() == [False, False, False, True, True]


def test_pad_that_is_eos_changes_nothing(byte_level: Callable[..., Any]) -> None:
    samples = [next(encoder(byte_level(pad_token=pad), "chatml").encode([MULTI])) for pad in ("<pad>", "</s>")]
    assert np.array_equal(samples[0].trained, samples[1].trained)
    assert samples[1].trained[samples[1].input_ids == 2].all(), "every end of an answer is learnt"


def test_sentencepiece(sentencepiece: Any) -> None:
    made = encoder(sentencepiece, "vicuna")
    assert trained_text(made, chat("u:How are you?", "a:I am 🙂 fine")) == ["I am 🙂 fine</s>"]
    assert next(made.encode([MULTI])).input_ids.tolist().count(1) == 1


def test_truncation(byte_level: Callable[..., Any]) -> None:
    whole = next(encoder(byte_level(), "chatml").encode([MULTI]))
    (cut,) = encoder(byte_level(), "chatml", max_length=len(whole) - 1).encode([MULTI])
    assert (cut.truncated, whole.truncated) == (True, False)
    assert np.array_equal(cut.trained, whole.trained[:-1])


def test_documents_are_windows(byte_level: Callable[..., Any]) -> None:
    tokenizer = byte_level(adds_bos=True)
    made = Encoder.make(tokenizer, None, train_on="assistant", max_length=4)
    samples = list(made.encode([Document(text="zqxjk zqxjk", source="f:1"), Document(text="<s>q</s>", source="f:2")]))
    joined = np.concatenate([sample.input_ids for sample in samples[:-1]]).tolist()
    assert joined == [1, *tokenizer("zqxjk zqxjk", add_special_tokens=False).input_ids, 2]
    assert samples[-1].input_ids.tolist() == [1, *tokenizer("q", add_special_tokens=False).input_ids, 2]
    assert all(sample.trained.all() and not sample.truncated and 2 <= len(sample) <= 4 for sample in samples)


@given(length=st.integers(0, 200), most=st.integers(3, 40))
def test_windows_keep_every_token(length: int, most: int) -> None:
    pieces = mask.windows(np.arange(length), most)
    assert np.array_equal(np.concatenate(pieces), np.arange(length))
    assert all(len(piece) <= most for piece in pieces)
    assert length < 2 or all(len(piece) >= 2 for piece in pieces)


def test_slow_tokenizers_are_refused() -> None:
    with pytest.raises(DataError, match="slow tokenizer"):
        Encoder.make(object(), None, train_on="assistant", max_length=4)


@pytest.mark.shared
def test_qwen2_token_by_token(shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers/qwen2")
    made = encoder(tokenizer)
    turns = [f"{turn.role[0]}:{turn.content}" for turn in MULTI.messages]
    (sample,) = made.encode([chat(*turns)])
    ids: list[int] = []
    trained: list[bool] = []
    for turn in MULTI.messages:
        head = tokenizer(f"<|im_start|>{turn.role}\n").input_ids
        body = tokenizer(f"{turn.content}<|im_end|>").input_ids
        ids += [*head, *body, *tokenizer("\n").input_ids]
        trained += [False] * len(head) + [turn.role == "assistant"] * len(body) + [False]
    # "assistant\n" + "\nStill": the tokenizer joins the line breaks, and a token that touches the answer is trained.
    assert tokenizer.decode(sample.input_ids) == tokenizer.decode(ids)
    first = len(ids) - len(tokenizer("<|im_start|>assistant\n\nStill fine\n<|im_end|>\n").input_ids) - 1
    assert sample.input_ids[:first].tolist() == ids[:first]
    assert sample.trained[:first].tolist() == trained[:first]
    assert trained_text(made, MULTI)[1] == "\n\nStill fine\n<|im_end|>"


@pytest.mark.shared
def test_gpt2_where_one_token_begins_ends_and_pads(shared: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers/gpt2")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == tokenizer.bos_token_id
    (sample,) = encoder(tokenizer, "plain").encode([chat("u:Name a sea.", "a: The Baltic Sea")])
    assert sample.input_ids[[0, -1]].tolist() == [50256, 50256]
    assert sample.trained.tolist() == [False] * 5 + [True] * 4
