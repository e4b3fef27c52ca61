"""Records become conversations or documents: five formats, recognised by their columns, checked value by value."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sartor.data.files import Record
from sartor.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn. `train` overrides `data.train_on` for this turn."""

    role: str
    content: str
    train: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Turns in order, one of the assistant's at least. `tools` are JSON schemas for templates that show tools."""

    messages: tuple[Message, ...]
    source: str
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Document:
    """Plain text; every token of it is trained."""

    text: str
    source: str


# Column pairs that mean prompt and completion, by how often public data sets use them.
_PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("instruction", "response"),
    ("content", "summary"),
    ("document", "summary"),
    ("article", "highlights"),
    ("input", "output"),
    ("query", "response"),
    ("source", "target"),
)
_COLUMNS = {
    "messages": ("messages", "tools"),
    "sharegpt": ("conversations", "system", "tools"),
    "alpaca": ("instruction", "input", "output", "history", "system"),
    "prompt-completion": ("prompt", "completion", "system"),
    "text": ("text",),
}
_ROLES = {
    **dict.fromkeys(("system", "user", "assistant", "tool"), ""),
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
}
TRAIN_KEYS = ("train", "weight", "loss_weight")


@dataclass(frozen=True, kw_only=True)
class Format:
    """How this data is read. `columns`: our name → the file's. `recognised` says how we know."""

    name: str
    columns: Mapping[str, str]
    recognised: str

    def parse(self, record: Record) -> Conversation | Document:
        """The record as a conversation or document. Raises DataError that names its source."""
        if not isinstance(record.value, Mapping):
            raise _wrong(record.source, f"the record is {_kind(record.value)}, not an object with columns")
        row = {**record.value, **{ours: record.value.get(theirs) for ours, theirs in self.columns.items()}}
        return _PARSERS[self.name](row, record.source)


def recognise(head: Iterable[Record], *, format: str = "auto", columns: Mapping[str, str] | None = None) -> Format:
    """The format of data that begins with these records. Raises DataError that lists the columns found and formats known."""
    head, columns = list(head), dict(columns or {})
    names = {column for known in _COLUMNS.values() for column in known}
    if unknown := [ours for ours in columns if ours not in names]:
        raise DataError(
            f"`data.columns` names `{unknown[0]}`, which no format has", remedy=f"our names are {', '.join(sorted(names))}"
        )
    rows = [record.value for record in head if isinstance(record.value, Mapping)]
    if not rows:
        raise _unknown(head, "the first records are not objects with columns")
    found = set.intersection(*(set(row) for row in rows))
    if missing := [theirs for theirs in columns.values() if not any(theirs in row for row in rows)]:
        raise _unknown(head, f"`data.columns` names the column `{missing[0]}`, which the first records do not have")
    if format != "auto":
        pair = _pair(found) if format == "prompt-completion" and not {"prompt", "completion"} & set(columns) else {}
        return Format(name=format, columns={**pair, **columns}, recognised="as `data.format` says")
    # Columns that the user named speak louder than others that happen to be there.
    for names in (set(columns), set(columns) | found):
        if match := _match(names):
            name, ours, pair = match
            shown = ", ".join(f"`{columns.get(column, column)}`" for column in ours)
            how = f"recognised by the column{'s' if len(ours) > 1 else ''} {shown}"
            return Format(name=name, columns={**pair, **columns}, recognised=how)
    raise _unknown(head, "no known format has these columns")


def _match(names: set[str]) -> tuple[str, tuple[str, ...], dict[str, str]] | None:
    """Format, the columns that show it, and the pair of columns where they go by other names."""
    for name, needed in (("messages", ("messages",)), ("sharegpt", ("conversations",)), ("alpaca", ("instruction", "output"))):
        if names.issuperset(needed):
            return name, needed, {}
    if pair := _pair(names):
        return "prompt-completion", (pair["prompt"], pair["completion"]), pair
    return ("text", ("text",), {}) if "text" in names else None


def _pair(names: set[str]) -> dict[str, str]:
    return next(({"prompt": prompt, "completion": answer} for prompt, answer in _PAIRS if {prompt, answer} <= names), {})


def _unknown(head: list[Record], what: str) -> DataError:
    rows = [record.value for record in head if isinstance(record.value, Mapping)]
    found = ", ".join(dict.fromkeys(f"`{str(column)[:40]}`" for row in rows for column in row)) or "none"
    known = "; ".join(f"{name} ({', '.join(columns)})" for name, columns in _COLUMNS.items())
    why = f"columns found: {found}\n       formats known: {known}"
    if "`chosen`" in found and "`rejected`" in found:
        why += "\n       (this looks like preference data; map its chosen answer to `completion` to train on that)"
    return DataError(
        f"{head[0].source if head else 'the data'}: {what}",
        why=why,
        remedy="set `data.format`, or name the columns: `data.columns: {prompt: THEIR_NAME, completion: THEIR_NAME}`",
    )


def _wrong(source: str, what: str, remedy: str = "repair the record or take it out") -> DataError:
    return DataError(f"{source}: {what}", remedy=remedy)


def _kind(value: Any) -> str:
    names = {
        type(None): "null",
        bool: "a truth value",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), f"a {type(value).__name__}")


def _string(row: Mapping[str, Any], key: str, source: str, place: str = "") -> str:
    value = row.get(key)
    if not isinstance(value, str):
        state = (
            f"is {_kind(value)}, not a string"
            if key in row
            else f"is missing (there is {', '.join(map(str, row))[:80] or 'nothing'})"
        )
        raise _wrong(source, f"{place}`{key}` {state}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise _wrong(source, f"{place}`{key}` holds half of a surrogate pair, which is no character") from None
    return value


def _optional(row: Mapping[str, Any], key: str, source: str) -> str:
    return "" if row.get(key) is None else _string(row, key, source)


def _system(row: Mapping[str, Any], source: str) -> list[Message]:
    text = _optional(row, "system", source)
    return [Message(role="system", content=text)] if text else []


def _alpaca(row: Mapping[str, Any], source: str) -> Conversation:
    messages = _system(row, source)
    history = row.get("history")
    if not isinstance(history, list | None):
        raise _wrong(source, f"`history` is {_kind(history)}, not a list of [question, answer] pairs")
    for number, turn in enumerate(history or [], 1):
        if not isinstance(turn, list) or len(turn) != 2:
            raise _wrong(source, f"`history` turn {number} is not a pair [question, answer]")
        pair = dict(zip(("question", "answer"), turn, strict=True))
        place = f"`history` turn {number}: "
        messages += [
            Message(role="user", content=_string(pair, "question", source, place)),
            Message(role="assistant", content=_string(pair, "answer", source, place)),
        ]
    # One line break between the two, as LLaMA-Factory joins them: the same data should mean the same tokens.
    question = "\n".join(filter(None, (_string(row, "instruction", source), _optional(row, "input", source))))
    messages += [Message(role="user", content=question), Message(role="assistant", content=_string(row, "output", source))]
    return Conversation(messages=tuple(messages), source=source)


def _messages(row: Mapping[str, Any], source: str) -> Conversation:
    return _turns(row, "messages", [], source)


def _sharegpt(row: Mapping[str, Any], source: str) -> Conversation:
    return _turns(row, "conversations", _system(row, source), source)


def _turns(row: Mapping[str, Any], key: str, before: list[Message], source: str) -> Conversation:
    turns = row.get(key)
    if not isinstance(turns, list) or not turns:
        raise _wrong(source, f"`{key}` is {'empty' if turns == [] else _kind(turns)}, not a list of turns")
    messages = [*before, *(_turn(turn, f"turn {number}: ", source) for number, turn in enumerate(turns, 1))]
    if not any(message.role == "assistant" for message in messages):
        why = " (preference data is not read; `chosen` would have to be its last turn)" if "chosen" in row else ""
        raise _wrong(source, f"the conversation has no assistant turn{why}", "add the answer or take the record out")
    return Conversation(messages=tuple(messages), source=source, tools=_tools(row.get("tools"), source))


def _turn(turn: Any, place: str, source: str) -> Message:
    """Either spelling: role and content, or from and value."""
    if not isinstance(turn, Mapping):
        raise _wrong(source, f"{place}it is {_kind(turn)}, not an object")
    if turn.get("tool_calls"):
        raise _wrong(source, f"{place}`tool_calls` is not read", "write the call into `content`, the way the model should say it")
    role_key, content_key = ("role" if "role" in turn else "from"), ("content" if "content" in turn else "value")
    role = _string(turn, role_key, source, place)
    if role not in _ROLES:
        raise _wrong(source, f"{place}unknown {role_key} {role[:40]!r}", f"use one of {', '.join(_ROLES)}")
    parts = turn.get(content_key)
    content = _joined(parts, place, source) if isinstance(parts, list) else _string(turn, content_key, source, place)
    return Message(role=_ROLES[role] or role, content=content, train=_train(turn, place, source))


def _joined(parts: list[Any], place: str, source: str) -> str:
    texts = []
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            raise _wrong(source, f"{place}a part of the content is not text", "only text is trained; take images and audio out")
        texts.append(_string(part, "text" if "text" in part else "value", source, place))
    return "".join(texts)


def _train(turn: Mapping[str, Any], place: str, source: str) -> bool | None:
    for key in TRAIN_KEYS:
        value = turn.get(key)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise _wrong(source, f"{place}`{key}` is {str(value)[:40]!r}", "give 0 or 1: a turn counts in the loss or does not")
        return bool(value)
    return None


def _tools(value: Any, source: str) -> tuple[dict[str, Any], ...]:
    """A list of schemas, or the same as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError):
            raise _wrong(source, "`tools` is a string, but not JSON") from None
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise _wrong(source, f"`tools` is {_kind(value)}, not a list of objects")
    _string({"tools": json.dumps(value, ensure_ascii=False, default=str)}, "tools", source)  # templates print them
    return tuple(value)


def _prompt_completion(row: Mapping[str, Any], source: str) -> Conversation:
    prompt, completion = _string(row, "prompt", source), _string(row, "completion", source)
    turns = (Message(role="user", content=prompt), Message(role="assistant", content=completion))
    return Conversation(messages=(*_system(row, source), *turns), source=source)


def _text(row: Mapping[str, Any], source: str) -> Document:
    return Document(text=_string(row, "text", source), source=source)


_PARSERS: dict[str, Callable[[Mapping[str, Any], str], Conversation | Document]] = {
    "alpaca": _alpaca,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "prompt-completion": _prompt_completion,
    "text": _text,
}
