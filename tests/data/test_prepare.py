"""The whole way from a job to token sets: counts, cache, held-out data, and every way to end with nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sartor.data import Lengths, prepare
from sartor.errors import DataError

Write = Callable[..., Path]
Make = Callable[..., Any]
PAIRS = [{"prompt": f"Question {number}?", "completion": f" Answer {number}."} for number in range(40)]


def refused(*arguments: Any, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        prepare(*arguments, **options)
    return str(caught.value)


def test_summary(write: Write, job_for: Make, byte_level: Make) -> None:
    tokenizer = byte_level()
    sets = prepare(job_for(write(PAIRS)), tokenizer, max_length=64, vocab_size=len(tokenizer))
    summary = sets.summary
    assert (summary.format, summary.template, summary.samples, summary.held_out_samples) == ("prompt-completion", "plain", 40, 0)
    assert summary.recognised == "recognised by the columns `prompt`, `completion`"
    assert summary.tokens == sum(len(sets.train[index]) for index in range(40))
    assert summary.trained_tokens == sum(int(sets.train[index].trained.sum()) for index in range(40))
    assert 0 < summary.trained_tokens < summary.tokens
    assert sum(summary.lengths.counts) == 40
    assert (summary.truncated, summary.dropped, summary.untrained, summary.cached) == (0, 0, 0, False)
    assert tokenizer.chat_template, "the template travels with the tokenizer"
    assert sets.train[3].source.endswith("data.jsonl:4")


def test_cached_until_something_changes(write: Write, job_for: Make, byte_level: Make) -> None:
    path = write(PAIRS)

    def cached(length: int = 256, adds_bos: bool = False, **options: Any) -> bool:
        return prepare(job_for(path, **options), byte_level(adds_bos=adds_bos), max_length=length).summary.cached

    assert [cached(), cached()] == [False, True]
    assert cached(evaluation={"fraction": 0.5}, training={"seed": 3}), "holding out does not tokenise again"
    assert not cached(length=255)
    assert not cached(train_on="all")
    assert not cached(template="vicuna")
    assert not cached(limit=10)
    assert not cached(adds_bos=True)
    assert cached()
    write(PAIRS[1:])
    assert not cached()


def test_cached_is_the_same(write: Write, job_for: Make, byte_level: Make) -> None:
    job = job_for(write([*PAIRS, {"prompt": "long " * 100, "completion": "never seen"}]), evaluation={"fraction": 0.25})
    first, second = (prepare(job, byte_level(), max_length=64) for _ in range(2))
    assert second.summary.cached
    assert second.summary.untrained == first.summary.untrained == 1
    assert second.summary.notes == (*first.summary.notes,)
    assert first.held_out is not None
    assert second.held_out is not None
    for one, other in ((first.train, second.train), (first.held_out, second.held_out)):
        assert len(one) == len(other)
        for index in range(len(one)):
            assert np.array_equal(one[index].input_ids, other[index].input_ids)
            assert np.array_equal(one[index].trained, other[index].trained)
            assert one.source(index) == other.source(index)


@pytest.mark.parametrize("damage", [b"", b"ARROW1 and then nothing", None])
def test_damaged_cache_is_made_again(write: Write, job_for: Make, byte_level: Make, damage: bytes | None) -> None:
    job, tokenizer = job_for(write(PAIRS)), byte_level()
    before = prepare(job, tokenizer, max_length=64)
    (kept,) = Path(os.environ["SARTOR_CACHE"]).glob("tokens/*.arrow")
    kept.write_bytes(kept.read_bytes()[:-200] if damage is None else damage)
    again = prepare(job, tokenizer, max_length=64)
    assert not again.summary.cached
    assert again.summary.tokens == before.summary.tokens
    assert prepare(job, tokenizer, max_length=64).summary.cached


def test_cache_that_cannot_be_written(write: Write, job_for: Make, byte_level: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SARTOR_CACHE", str(write("a file, no folder", "taken")))
    sets = prepare(job_for(write(PAIRS)), byte_level(), max_length=64)
    assert len(sets.train) == 40
    assert "the tokens are not cached" in sets.summary.notes[-1]


def test_cache_folder(write: Write, job_for: Make, byte_level: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SARTOR_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    prepare(job_for(write(PAIRS)), byte_level(), max_length=64)
    assert {path.suffix for path in (tmp_path / "xdg/sartor/tokens").iterdir()} == {".arrow", ".json"}


def test_held_out_share(write: Write, job_for: Make, byte_level: Make) -> None:
    job = job_for(write(PAIRS), evaluation={"fraction": 0.2})
    sets = prepare(job, byte_level(), max_length=64)
    assert sets.held_out is not None
    parts = [[part.source(index) for index in range(len(part))] for part in (sets.train, sets.held_out)]
    assert [len(part) for part in parts] == [32, 8]
    assert len({*parts[0], *parts[1]}) == 40
    other = prepare(
        job_for(write(PAIRS), evaluation={"fraction": 0.2}, training={"seed": 1}), byte_level(), max_length=64
    ).held_out
    assert other is not None
    assert parts[1] != [other.source(index) for index in range(len(other))]
    assert "one sample only" in refused(job_for(write(PAIRS), limit=1, evaluation={"fraction": 0.5}), byte_level(), max_length=64)


def test_held_out_file(write: Write, job_for: Make, byte_level: Make) -> None:
    train = write([{"q": row["prompt"], "a": row["completion"]} for row in PAIRS])
    held = write([{"q": "x", "a": "y"}], "held.jsonl")
    job = job_for(train, columns={"prompt": "q", "completion": "a"}, limit=7, evaluation={"path": str(held)})
    sets = prepare(job, byte_level(), max_length=64)
    assert (sets.summary.samples, sets.summary.held_out_samples) == (7, 1)
    assert sets.held_out is not None
    assert sets.held_out.source(0) == f"{held}:1"


def test_system_message_for_those_without(write: Write, job_for: Make, byte_level: Make) -> None:
    rows = [{"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": "c", "system": "Mine"}]
    tokenizer = byte_level()
    sets = prepare(job_for(write(rows), system="Yours", template="chatml"), tokenizer, max_length=64)
    texts = [tokenizer.decode(sets.train[index].input_ids) for index in range(2)]
    assert "system\nYours<|im_end|>" in texts[0]
    assert "system\nMine<|im_end|>" in texts[1]
    assert "Yours" not in texts[1]


def test_truncated_dropped_untrained(write: Write, job_for: Make, byte_level: Make) -> None:
    rows = [PAIRS[0], {"prompt": "p", "completion": "q" * 200}, {"prompt": "q" * 200, "completion": "p"}]
    cut = prepare(job_for(write(rows)), byte_level(), max_length=100).summary
    assert (cut.samples, cut.truncated, cut.dropped, cut.untrained) == (2, 1, 0, 1)
    assert "1 sample without a trained token was left out (cut at 100 tokens, before the answer)" in cut.notes
    dropped = prepare(job_for(write(rows), overlong="drop"), byte_level(), max_length=100).summary
    assert (dropped.samples, dropped.truncated, dropped.dropped, dropped.untrained) == (1, 0, 2, 0)


def test_nothing_left(write: Write, job_for: Make, byte_level: Make) -> None:
    path = write(PAIRS)
    assert "all 40 samples are longer than 4 tokens" in refused(job_for(path, overlong="drop"), byte_level(), max_length=4)
    message = refused(job_for(path), byte_level(), max_length=4)
    assert "not one token of 40 samples" in message
    assert "before the answer begins" in message
    silent = write([{"messages": [{"role": "assistant", "content": "a", "train": False}]}], "silent.jsonl")
    assert "the records' own flags" in refused(job_for(silent, template="chatml"), byte_level(), max_length=64)
    empty = write([{"text": ""}], "empty.jsonl")
    assert "shorter than two tokens" in refused(job_for(empty), byte_level(), max_length=64)


def test_a_bad_record_deep_in_the_file(write: Write, job_for: Make, byte_level: Make) -> None:
    path = write([*PAIRS, {"prompt": "p", "completion": None}])
    assert f"{path}:41: `completion` is null" in refused(job_for(path), byte_level(), max_length=64)


def test_tokenizer_of_another_model(write: Write, job_for: Make, byte_level: Make) -> None:
    assert "the model knows 100 tokens only" in refused(job_for(write(PAIRS)), byte_level(), max_length=64, vocab_size=100)


def test_plain_text(write: Write, job_for: Make, byte_level: Make) -> None:
    tokenizer = byte_level()
    text = "How are you today? " * 50
    sets = prepare(job_for(write(text, "a.txt")), tokenizer, max_length=32)
    joined = np.concatenate([sets.train[index].input_ids for index in range(len(sets.train))])
    assert tokenizer.decode(joined) == text + "</s>"
    assert sets.summary.truncated == 0
    assert sets.summary.template == "none (plain text)"
    assert tokenizer.chat_template is None


def test_lengths() -> None:
    lengths = Lengths.of(np.array([3, 8, 12, 40, 159]))
    assert lengths.edges == tuple(range(0, 161, 10))
    assert lengths.counts[:5] == (2, 1, 0, 0, 1)
    assert (sum(lengths.counts), lengths.quantiles["50%"], lengths.quantiles["longest"]) == (5, 12, 159)


@pytest.mark.shared
def test_conversations_with_tools(shared: Path, job_for: Make) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers/qwen2")
    job = job_for(shared / "data/llamafactory/glaive_toolcall_en_demo.json", limit=20)
    sets = prepare(job, tokenizer, max_length=2048, vocab_size=len(tokenizer))
    assert sets.summary.samples == 20
    assert "# Tools" in tokenizer.decode(sets.train[0].input_ids)
