"""The sample page: every character once, trained ones marked, nothing from the data taken as markup."""

from __future__ import annotations

import io
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from sartor.data import DataSets, Sample, page, prepare, render_html, render_terminal

ROWS = [{"prompt": "Hi <b>&</b> [red]", "completion": "fine 你好 🙂\x1b[2J"}, {"prompt": "p", "completion": "c"}]


def sets_for(write: Any, job_for: Any, tokenizer: Any) -> DataSets:
    return prepare(job_for(write(ROWS), template="chatml"), tokenizer, max_length=128)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text("aä你🙂 \n<", max_size=20), seed=st.integers(0, 1000))
def test_pieces_are_the_whole_text(byte_level_once: Any, text: str, seed: int) -> None:
    ids = np.array([1, *byte_level_once(text).input_ids], dtype=np.int32)
    trained = np.random.default_rng(seed).random(len(ids)) < 0.5
    shown = page.show(Sample(input_ids=ids, trained=trained, source="f:1"), byte_level_once)
    assert "".join(piece.text for piece in shown.pieces) == "<s>" + text


def test_pieces_of_sentencepiece_keep_their_spaces(sentencepiece: Any) -> None:
    ids = np.array(sentencepiece("How are you").input_ids, dtype=np.int32)
    trained = np.arange(len(ids)) % 2 == 0
    shown = page.show(Sample(input_ids=ids, trained=trained, source="f:1"), sentencepiece)
    assert "".join(piece.text for piece in shown.pieces).split() == sentencepiece.decode(ids).split()
    assert "are you" in "".join(piece.text for piece in shown.pieces)


def test_terminal(write: Callable[..., Path], job_for: Any, byte_level: Any) -> None:
    tokenizer = byte_level()
    sets = sets_for(write, job_for, tokenizer)
    plain = io.StringIO()
    render_terminal(sets, tokenizer, Console(file=plain, width=100))
    assert "Hi <b>&</b> [red]<|im_end|>" in plain.getvalue()
    assert "⟦fine 你好 🙂␛[2J<|im_end|></s>⟧" in plain.getvalue()
    assert "\x1b" not in plain.getvalue()
    assert "chatml" in plain.getvalue()
    coloured = io.StringIO()
    render_terminal(
        sets, tokenizer, Console(file=coloured, width=100, force_terminal=True, color_system="standard", no_color=False)
    )
    assert "⟦" not in coloured.getvalue()
    assert "\x1b[2J" not in coloured.getvalue()


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.marked: list[str] = []
        self.attributes: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attributes]

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "mark":
            self.marked.append(data)
            self.tags.append("")


def test_html(write: Callable[..., Path], job_for: Any, byte_level: Any, tmp_path: Path) -> None:
    tokenizer = byte_level()
    path = tmp_path / "out" / "page.html"
    render_html(sets_for(write, job_for, tokenizer), tokenizer, path)
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert "b" not in reader.tags
    assert not {"src", "href"} & set(reader.attributes), "self-contained"
    assert reader.marked[1:] == ["fine 你好 🙂\x1b[2J<|im_end|></s>", "c<|im_end|></s>"]
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]
