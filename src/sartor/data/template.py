"""Which chat template renders conversations: the tokenizer's own, a built-in one, or a file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sartor.errors import DataError

BUILT_IN = ("alpaca", "chatml", "llama3", "plain", "vicuna")
_FOLDER = Path(__file__).parent / "templates"
_SPECIAL = re.compile(r"<\|[\w.-]+\|>")
# Letters and digits that no template trims or escapes, and no tokenizer knows.
_SENTINEL = "XqZ7sartorZqX"


@dataclass(frozen=True, kw_only=True)
class Template:
    """A chat template. `end` is what it writes after an assistant's words, e.g. `<|im_end|>`, without trailing space."""

    name: str
    text: str
    end: str
    notes: tuple[str, ...] = ()


def choose(name: str, tokenizer: Any, *, format: str) -> Template:
    """The template called `name` (see `data.template`), set on the tokenizer so that saving it takes the template along.

    Raises DataError where there is none, or it does not render.
    """
    label, text, notes = _find(name, tokenizer, format)
    tokenizer.chat_template = text
    end = end_marker(tokenizer, label)
    return Template(name=label, text=text, end=end, notes=(*notes, *_notes(label, text, end, tokenizer)))


def _find(name: str, tokenizer: Any, format: str) -> tuple[str, str, tuple[str, ...]]:
    if name == "auto":
        if own := _own(tokenizer):
            return "the tokenizer's own", own, ()
        if format == "prompt-completion":
            note = "the tokenizer has no chat template; template `plain` puts prompt and completion together with nothing between"
            return "plain", _built_in("plain"), (note,)
        raise DataError(
            "the tokenizer has no chat template, and this data is conversations",
            why="base models bring none",
            remedy=f"set `data.template` to one of {', '.join(BUILT_IN)} (chatml is the usual choice), or to a .jinja file",
        )
    if name in BUILT_IN:
        return name, _built_in(name), ()
    path = Path(name).expanduser()
    try:
        return name, path.read_text(encoding="utf-8"), ()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"there is no chat template `{name}`",
            why=f"it is not built in, and reading it as a file gives: {error}",
            remedy=f"use auto, one of {', '.join(BUILT_IN)}, or the path of a .jinja file",
        ) from None


def _own(tokenizer: Any) -> str | None:
    if not tokenizer.chat_template:
        return None
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise DataError(
            "the tokenizer has several chat templates, none of them the default",
            why=str(error),
            remedy="save one to a .jinja file and name that in `data.template`",
        ) from None


def _built_in(name: str) -> str:
    return (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")


def end_marker(tokenizer: Any, name: str = "in use") -> str:
    """What follows the assistant's words in the shortest conversation, trailing white space taken off."""
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _SENTINEL}]
    render = partial(tokenizer.apply_chat_template, tokenize=False)
    try:
        _, found, after = render(turns).rpartition(_SENTINEL)
    # A template is a program that came with the data: it may raise anything.
    except Exception as error:
        raise DataError(f"the chat template `{name}` does not render a conversation", why=str(error)) from None
    if not found:
        raise DataError(
            f"the chat template `{name}` leaves the assistant's words out", remedy="set `data.template` to another one"
        )
    return str(after).rstrip()


def _notes(name: str, text: str, end: str, tokenizer: Any) -> list[str]:
    notes = []
    code = re.sub(r"\{#.*?#\}", "", text, flags=re.DOTALL)
    special = dict.fromkeys(_SPECIAL.findall(code))
    if strange := [token for token in special if tokenizer.backend_tokenizer.token_to_id(token) is None]:
        shown = ", ".join(strange[:4]) + (" …" if len(strange) > 4 else "")
        notes.append(f"template {name}: {shown} are not tokens of this tokenizer; they become ordinary text")
    if not end:
        notes.append(f"template {name} writes nothing after the assistant's words: the model will not learn to stop")
    elif (
        not (tokenizer.eos_token and tokenizer.eos_token in end) and tokenizer.backend_tokenizer.token_to_id(end.strip()) is None
    ):
        notes.append(f"answers end with {end!r}, which is ordinary text here: whatever generates must be told to stop there")
    return notes
