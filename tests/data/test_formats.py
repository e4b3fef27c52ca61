"""Recognition and parsing: public shapes are understood, anything else is a DataError with its source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sartor.data import files, formats
from sartor.data.files import Record
from sartor.data.formats import Conversation, Document, Message
from sartor.errors import DataError
from sartor.job.schema import DataJob


def parse(value: Any, **options: Any) -> Conversation | Document:
    record = Record(value=value, source="f:7")
    return formats.recognise([record], **options).parse(record)


def turns(value: Any, **options: Any) -> list[tuple[str, str]]:
    item = parse(value, **options)
    assert isinstance(item, Conversation)
    return [(turn.role, turn.content) for turn in item.messages]


def refused(value: Any, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        parse(value, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"instruction": "i", "output": "o"}, "user i|assistant o"),
        ({"instruction": "i", "input": "", "output": "o", "history": [], "system": None}, "user i|assistant o"),
        (
            {"instruction": "i", "input": "x", "output": "o", "history": [["q", "a"]], "system": "s"},
            "system s|user q|assistant a|user i\nx|assistant o",
        ),
        ({"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}, "user u|assistant a"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "value": "b"}]}]},
            "assistant ab",
        ),
        (
            {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}], "system": "s"},
            "system s|user u|assistant a",
        ),
        (
            {"conversations": [{"from": "function_call", "value": "f"}, {"from": "observation", "value": "o"}]},
            "assistant f|tool o",
        ),
        ({"conversations": [{"role": "developer", "content": "d"}, {"role": "model", "content": "a"}]}, "system d|assistant a"),
        ({"prompt": "p", "completion": "c"}, "user p|assistant c"),
        ({"question": "p", "answer": "c", "id": 3}, "user p|assistant c"),
        ({"content": "p", "summary": "c"}, "user p|assistant c"),
        ({"input": "p", "output": "c"}, "user p|assistant c"),
    ],
)
def test_recognised(value: Any, expected: str) -> None:
    assert "|".join(f"{role} {content}" for role, content in turns(value)) == expected


def test_text_and_what_recognition_says() -> None:
    assert parse({"text": "t"}) == Document(text="t", source="f:7")
    head = [Record(value={"question": "q", "answer": "a"}, source="f:1")]
    assert formats.recognise(head).recognised == "recognised by the columns `question`, `answer`"
    assert formats.recognise(head, format="text", columns={"text": "answer"}).recognised == "as `data.format` says"


def test_columns_of_the_user_come_first() -> None:
    row = {"instruction": "i", "output": "o", "body": "b", "label": "l"}
    assert parse(row, columns={"text": "body"}) == Document(text="b", source="f:7")
    assert turns(row, columns={"prompt": "body", "completion": "label"}) == [("user", "b"), ("assistant", "l")]
    assert turns(row, columns={"output": "label"}) == [("user", "i"), ("assistant", "l")]
    assert "the column `nope`" in refused(row, columns={"text": "nope"})
    assert "which no format has" in refused(row, columns={"body": "text"})


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [("train", False, False), ("weight", 0, False), ("weight", 1, True), ("loss_weight", 0.0, False), ("train", None, None)],
)
def test_flags_of_a_turn(key: str, value: Any, expected: bool | None) -> None:
    item = parse({"messages": [{"role": "assistant", "content": "a", key: value}]})
    assert item == Conversation(messages=(Message(role="assistant", content="a", train=expected),), source="f:7")


def test_tools_as_text_or_list() -> None:
    turn = {"conversations": [{"from": "gpt", "value": "a"}]}
    for tools in ('[{"name": "n"}]', [{"name": "n"}]):
        item = parse({**turn, "tools": tools})
        assert isinstance(item, Conversation)
        assert item.tools == ({"name": "n"},)
    assert "not JSON" in refused({**turn, "tools": "{"})


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"a": 1, "b": 2}, "columns found: `a`, `b`"),
        ("text", "not objects"),
        ({"messages": []}, "`messages` is empty"),
        ({"messages": None}, "null, not a list"),
        ({"messages": [None]}, "turn 1: it is null"),
        ({"messages": [{"role": "user", "content": "u"}]}, "no assistant turn"),
        ({"messages": [{"role": "assistant", "content": None}]}, "turn 1: `content` is null, not a string"),
        ({"messages": [{"role": "assistant"}]}, "turn 1: `value` is missing"),
        ({"messages": [{"role": "king", "content": "a"}]}, "unknown role 'king'"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}, "`weight` is '0.5'"),
        ({"messages": [{"role": "assistant", "content": [{"type": "image"}]}]}, "not text"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "`tool_calls` is not read"),
        ({"instruction": "i", "output": 3}, "`output` is a number, not a string"),
        ({"instruction": "i", "output": "o", "history": [["q"]]}, "turn 1 is not a pair"),
        ({"text": "\ud800"}, "surrogate"),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "preference data"),
    ],
)
def test_wrong_records_are_named(value: Any, says: str) -> None:
    message = refused(value)
    assert says in message
    assert "f:7" in message


def test_a_later_record_of_another_shape() -> None:
    form = formats.recognise([Record(value={"text": "t"}, source="f:1")])
    with pytest.raises(DataError, match="f:2: the record is a list"):
        form.parse(Record(value=[1], source="f:2"))
    with pytest.raises(DataError, match="f:3: `text` is missing"):
        form.parse(Record(value={"body": "t"}, source="f:3"))


KEYS = ["messages", "conversations", "instruction", "input", "output", "history", "prompt", "completion", "text", "tools"]
KEYS += ["role", "content", "from", "value", "train", "weight", "loss_weight", "type", "tool_calls"]
NAMES = st.sampled_from([*KEYS, "system", "user", "assistant", "gpt"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | NAMES | st.text(max_size=5) | st.just("\udc00"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(value=JSON, format=st.sampled_from(["auto", "alpaca", "messages", "sharegpt", "prompt-completion", "text"]))
def test_any_json_is_understood_or_refused(value: Any, format: str) -> None:
    try:
        item = parse(value, format=format)
    except DataError as error:
        item, refusal = None, str(error)
    if item is None:
        assert "f:7" in refusal
    else:
        texts = [turn.content for turn in item.messages] if isinstance(item, Conversation) else [item.text]
        assert "".join(texts).encode() is not None


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("llamafactory/alpaca_en_demo.json", "alpaca"),
        ("llamafactory/alpaca_zh_demo.json", "alpaca"),
        ("llamafactory/identity.json", "alpaca"),
        ("llamafactory/glaive_toolcall_en_demo.json", "sharegpt"),
        ("llamafactory/v1_sft_demo.jsonl", "messages"),
        ("llamafactory/dpo_en_demo.json", "sharegpt"),
        ("alpaca/alpaca_random_9k.json", "alpaca"),
        ("dolly/dolly_3k.json", "alpaca"),
        ("oasst/oaast_sft_zh.json", "alpaca"),
        ("fastchat/dummy_conversation.json", "sharegpt"),
        ("gsm8k/test.jsonl", "prompt-completion"),
        ("advertisegen/dev.json", "prompt-completion"),
        ("text/llamafactory_c4_demo.jsonl", "text"),
        ("text/sotu.txt", "text"),
    ],
)
def test_public_data(shared: Path, name: str, format: str) -> None:
    records = list(files.find(DataJob(path=str(shared / "data" / name))).records())
    form = formats.recognise(records[:16])
    assert form.name == format
    if "dpo" in name:
        with pytest.raises(DataError, match="no assistant turn"):
            form.parse(records[0])
    else:
        assert len([form.parse(record) for record in records]) == len(records)


@pytest.mark.shared
def test_public_tables(shared: Path) -> None:
    corpus = files.find(DataJob(path=str(shared / "data/classification/MRPC/train.tsv")))
    records = list(corpus.records())
    assert len(records) == 3667  # one a line, quotes or not
    with pytest.raises(DataError, match="columns found: `Quality`, `#1 ID`"):
        formats.recognise(records[:16])
    form = formats.recognise(records[:16], columns={"prompt": "#1 String", "completion": "#2 String"})
    assert form.name == "prompt-completion"
    assert isinstance(form.parse(records[0]), Conversation)
