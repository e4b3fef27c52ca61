"""Conversations and documents become token ids and a loss mask.

A conversation is rendered whole and tokenised once, so tokens are those that inference sees. The mask is found in the
characters of the rendered text, never in token ids: which id pads, ends or repeats has no say in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sartor.data.formats import Conversation, Document, Message
from sartor.data.template import Template
from sartor.data.tokens import Sample
from sartor.errors import DataError

Span = tuple[int, int]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """A conversation as text. `spans` are the characters that are trained, [first, end)."""

    text: str
    spans: tuple[Span, ...]
    source: str


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Turns conversations and documents into samples of `max_length` tokens at most."""

    tokenizer: Any
    template: Template | None
    train_on: str
    max_length: int
    bos: bool
    """Whether this tokenizer begins sequences with its BOS token."""

    @classmethod
    def make(cls, tokenizer: Any, template: Template | None, *, train_on: str, max_length: int) -> Encoder:
        """Raises DataError where the tokenizer cannot tell which characters a token covers."""
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                f"{type(tokenizer).__name__} is a slow tokenizer",
                why="the loss mask needs to know which characters a token covers; only fast tokenizers tell",
                remedy="name a model or folder with a tokenizer.json in `model.tokenizer`",
            )
        bos = begins_with_bos(tokenizer)
        return cls(tokenizer=tokenizer, template=template, train_on=train_on, max_length=max_length, bos=bos)

    def encode(self, items: Sequence[Conversation | Document]) -> Iterator[Sample]:
        """Samples in the order of the items. Raises DataError naming the source of what does not render."""
        conversations = [item for item in items if isinstance(item, Conversation)]
        documents = [item for item in items if isinstance(item, Document)]
        return self._documents(documents) if documents else self._conversations(conversations)

    def _tokenise(self, texts: list[str], *, offsets: bool) -> Any:
        # No special tokens here: the template has written them, or the code below adds the one that lacks.
        options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
        return self.tokenizer(texts, **options, return_offsets_mapping=offsets, verbose=False)

    def _conversations(self, conversations: list[Conversation]) -> Iterator[Sample]:
        rendered = self.render(conversations)
        encoded = self._tokenise([chat.text for chat in rendered], offsets=True)
        for chat, ids, offsets in zip(rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            trained = trained_tokens(offsets, chat.spans, len(chat.text))
            if self.bos and ids[:1] != [self.tokenizer.bos_token_id]:
                ids, trained = [self.tokenizer.bos_token_id, *ids], np.concatenate([[False], trained])
            kept = slice(0, self.max_length)
            yield Sample(
                input_ids=np.array(ids[kept], dtype=np.int32),
                trained=trained[kept],
                source=chat.source,
                truncated=len(ids) > self.max_length,
            )

    def _documents(self, documents: list[Document]) -> Iterator[Sample]:
        """Windows of at most `max_length` tokens without overlap; all is trained, the end of the document too."""
        eos = self.tokenizer.eos_token_id
        encoded = self._tokenise([document.text for document in documents], offsets=False)
        for document, ids in zip(documents, encoded["input_ids"], strict=True):
            if self.bos and ids[:1] != [self.tokenizer.bos_token_id]:
                ids.insert(0, self.tokenizer.bos_token_id)
            if eos is not None and ids[-1:] != [eos]:
                ids.append(eos)
            for window in windows(np.array(ids, dtype=np.int32), self.max_length):
                yield Sample(input_ids=window, trained=np.ones(len(window), dtype=bool), source=document.source)

    def render(self, conversations: list[Conversation]) -> list[Rendered]:
        """The texts and their trained characters. All texts are rendered in one call, all prompts in a second."""
        assert self.template is not None, "conversations need a template"
        if _GENERATION.search(self.template.text):
            return [self._render_marked(chat) for chat in conversations]
        texts = self._apply(conversations, [chat.messages for chat in conversations])
        turns = [(chat, index) for chat in conversations for index, turn in enumerate(chat.messages) if turn.role == "assistant"]
        prompts = iter(self._apply([chat for chat, _ in turns], [chat.messages[:index] for chat, index in turns], prompt=True))
        rendered = []
        for chat, text in zip(conversations, texts, strict=True):
            heads = {index: next(prompts) for index, turn in enumerate(chat.messages) if turn.role == "assistant"}
            located = locate(chat, text, heads, self.template.end)
            rendered.append(Rendered(text=text, spans=self._trained(chat, located, len(text)), source=chat.source))
        return rendered

    def _apply(self, chats: list[Conversation], messages: list[Sequence[Message]], *, prompt: bool = False) -> list[str]:
        """`messages[i]`, the beginning of `chats[i]`, as text; `prompt` adds what invites the assistant to speak."""
        if not any(chat.tools for chat in chats):
            try:
                return self._apply_template([_as_dicts(turns) for turns in messages], prompt)
            except Exception:  # one of them fails: the loop below finds which
                pass
        texts = []
        for chat, turns in zip(chats, messages, strict=True):
            try:
                texts += self._apply_template([_as_dicts(turns)], prompt, list(chat.tools) or None)
            # A template is a program that came with the model: it may raise anything.
            except Exception as error:
                raise self._does_not_render(chat, error) from None
        return texts

    def _apply_template(self, chats: list[list[dict[str, str]]], prompt: bool, tools: list[Any] | None = None) -> list[str]:
        if not chats or not all(chats):  # a conversation that the assistant opens has no prompt; templates choke on that
            texts = iter(self._apply_template([chat for chat in chats if chat], prompt, tools)) if any(chats) else iter(())
            return [next(texts) if chat else "" for chat in chats]
        texts = self.tokenizer.apply_chat_template(chats, tools=tools, tokenize=False, add_generation_prompt=prompt)
        return list(texts)

    def _does_not_render(self, chat: Conversation, error: Exception) -> DataError:
        assert self.template is not None
        return DataError(
            f"{chat.source}: the chat template ({self.template.name}) does not render this conversation",
            why=f"it says: {str(error) or type(error).__name__}; the roles are {', '.join(turn.role for turn in chat.messages)}",
            remedy="change the record, or `data.template`",
        )

    def _render_marked(self, chat: Conversation) -> Rendered:
        """For templates that mark what the assistant says by {% generation %}."""
        from transformers.utils.chat_template_utils import render_jinja_template

        assert self.template is not None
        options = {"chat_template": self.template.text, "return_assistant_tokens_mask": True, "tools": list(chat.tools) or None}
        try:
            texts, marked = render_jinja_template([_as_dicts(chat.messages)], **options, **self.tokenizer.special_tokens_map)
        except Exception as error:
            raise self._does_not_render(chat, error) from None
        text, end = texts[0], self.template.end
        # Marks that leave the end marker out would train a model that never stops.
        spans = [(first, stop + (len(end) if text.startswith(end, stop) else 0)) for first, stop in marked[0]]
        assistants = [index for index, turn in enumerate(chat.messages) if turn.role == "assistant"]
        if self.train_on == "assistant" and all(turn.train is None for turn in chat.messages):
            return Rendered(text=text, spans=tuple(spans), source=chat.source)
        if len(assistants) != len(spans):
            raise DataError(
                f"{chat.source}: the template marks {len(spans)} answers, the conversation has {len(assistants)}",
                remedy="drop `train` flags and `data.train_on`, or set `data.template` to another one",
            )
        located = dict(zip(assistants, spans, strict=True))
        return Rendered(text=text, spans=self._trained(chat, located, len(text)), source=chat.source)

    def _trained(self, chat: Conversation, located: dict[int, Span], length: int) -> tuple[Span, ...]:
        """The spans of the turns that `train_on` and the turns' own flags choose."""
        assistants = [index for index, turn in enumerate(chat.messages) if turn.role == "assistant"]
        if self.train_on == "all":
            left_out = sorted(
                located[index] for index, turn in enumerate(chat.messages) if turn.train is False and index in located
            )
            edges = [0, *(edge for span in left_out for edge in span), length]
            return tuple((first, end) for first, end in zip(edges[::2], edges[1::2], strict=True) if first < end)
        chosen = set(assistants[-1:] if self.train_on == "last" else assistants)
        chosen |= {index for index, turn in enumerate(chat.messages) if turn.train}
        chosen -= {index for index, turn in enumerate(chat.messages) if turn.train is False}
        return tuple(located[index] for index in sorted(chosen & located.keys()))


def begins_with_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer, asked for special tokens, puts its BOS token in front."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a", add_special_tokens=True).input_ids[:1] == [bos]


def locate(chat: Conversation, text: str, heads: dict[int, str], end: str) -> dict[int, Span]:
    """The characters of every turn in the rendered `text`.

    An assistant turn begins where its prompt (`heads`: what the model is given before it speaks) stops, and ends with the
    template's end marker, without the white space after it. Raises DataError where an assistant's words are not there.
    """
    spans: dict[int, Span] = {}
    cursor = 0
    for index, turn in enumerate(chat.messages):
        head = heads.get(index, "")
        given = bool(head) and text.startswith(head)
        # A template that renders history differently each time (dates, dropped thoughts) still agrees up to somewhere.
        start = len(head) if given else max(cursor, 0 if turn.role != "assistant" else _agreed(head, text, cursor))
        following = [len(heads[later]) for later in heads if later > index and text.startswith(heads[later])]
        limit = min(following, default=len(text))
        marker = end if turn.role == "assistant" else ""
        found = _find(text, turn.content, start, limit, marker)
        if given and found is None:  # the prompt itself holds the first words, such as `<think>`
            found = _find(text, turn.content, cursor, limit, marker)
        if found is None and (turn.role == "assistant" or turn.train):
            raise DataError(
                f"{chat.source}: turn {index + 1}, by the {turn.role}, is not found in what the chat template renders",
                why=f"looked for {turn.content[:60]!r} after character {start:,}",
                remedy="a template that rewrites answers needs {% generation %} marks; or set `data.template` to another one",
            )
        if found:
            first, stop = (start if given else found[0]), found[1]
            spans[index] = first, stop + (len(marker) if text.startswith(marker, stop) else 0)
            cursor = spans[index][1]
    return spans


def _agreed(head: str, text: str, cursor: int) -> int:
    """How far the prompt and the whole agree, where that is beyond the turns already found."""
    return max(cursor, common_length(head, text))


def common_length(first: str, second: str) -> int:
    """How many characters two texts share at their beginning."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (one, other) in pairs if one != other), min(len(first), len(second)))


def _find(text: str, content: str, start: int, limit: int, marker: str) -> Span | None:
    """Where `content` stands, as written or as templates trim it: spaces off the ends, thoughts before `</think>` dropped."""
    answer = content.rpartition("</think>")[2]
    variants = list(dict.fromkeys((content, content.strip(), answer.lstrip("\n"), answer.strip())))
    # With its end marker first: a word as short as `think` also stands in other places.
    for tail in dict.fromkeys((marker, "")):
        for variant in variants:
            if (first := text.find(variant + tail, start, limit)) >= 0:
                return first, first + len(variant)
    return None


def trained_tokens(offsets: Sequence[Span], spans: Sequence[Span], length: int) -> np.ndarray:
    """Which tokens touch a trained character, bool, (tokens,). `offsets`: the characters of each token, of `length` in all."""
    if not offsets:
        return np.zeros(0, dtype=bool)
    first, end = np.array(offsets, dtype=np.int64).T
    # Some byte-level tokenizers leave spaces out of the offsets; the gap belongs to the token after it.
    end = np.maximum.accumulate(end)
    first = np.minimum(first, np.concatenate([[0], end[:-1]]))
    characters = np.zeros(length + 1, dtype=np.int64)
    for start, stop in spans:
        characters[start + 1 : stop + 1] = 1
    counts = np.cumsum(characters)
    return np.asarray(counts[end] > counts[first])


def windows(ids: np.ndarray, max_length: int) -> list[np.ndarray]:
    """`ids` in pieces of `max_length`; never a last piece of one token, which would have nothing to predict."""
    cuts = list(range(max_length, len(ids), max_length))
    if cuts and len(ids) - cuts[-1] == 1 and max_length > 2:
        cuts[-1] -= 1
    return np.split(ids, cuts)


def _as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]
