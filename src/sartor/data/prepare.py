"""From a job's `data` section to token sets: read, recognise, render, tokenise, mask, cache, hold out."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from typing import Any

import numpy as np

from sartor.data import cache, files, formats, template
from sartor.data.cache import Counts
from sartor.data.formats import Conversation, Document, Format
from sartor.data.mask import Encoder
from sartor.data.summary import DataSets, DataSummary, Lengths
from sartor.data.synthetic import synthetic
from sartor.data.template import Template
from sartor.data.tokens import Sample, TokenSet
from sartor.errors import DataError
from sartor.job.schema import DataJob, Job

# Raise it whenever the same data would become other tokens or another mask.
_VERSION = 1
_HEAD = 16
# Enough for the tokenizer's threads, little enough for memory, whether items are tweets or books.
_CHUNK_ITEMS, _CHUNK_CHARACTERS = 1024, 2**22


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    tokens: TokenSet
    counts: Counts
    format: Format
    template: Template | None
    notes: tuple[str, ...]
    cached: bool


def prepare(job: Job, tokenizer: Any, *, max_length: int, vocab_size: int | None = None) -> DataSets:
    """The job's data as samples of at most `max_length` tokens, from the cache where it was made before.

    Sets the chat template it used on `tokenizer`. `vocab_size` is the model's: ids beyond it are an error.
    Synthetic data needs no tokenizer, but `vocab_size`.
    Raises DataError, which says what to change, where data is missing, malformed, or leaves nothing to train on.
    """
    if job.data.synthetic is not None:
        assert vocab_size is not None, "synthetic tokens come from the model's vocabulary"
        return synthetic(job.data.synthetic, max_length=max_length, vocab_size=vocab_size, seed=job.training.seed)
    started = time.perf_counter()
    loaded = _load(job.data, tokenizer, max_length)
    train, held_out, notes, cached = loaded.tokens, None, loaded.notes, loaded.cached
    if job.evaluation.path:
        other = _load(replace(job.data, path=job.evaluation.path, limit=None), tokenizer, max_length)
        held_out, cached = other.tokens, cached and other.cached
        notes = tuple(dict.fromkeys((*notes, *(f"held out: {note}" for note in other.notes if note not in notes))))
    elif job.evaluation.fraction > 0:
        train, held_out = _split(train, job.evaluation.fraction, job.training.seed)
    for tokens in filter(None, (train, held_out)):
        _check_vocabulary(tokens, vocab_size)
    summary = DataSummary(
        format=loaded.format.name,
        recognised=loaded.format.recognised,
        template=loaded.template.name if loaded.template else "none (plain text)",
        samples=len(train),
        held_out_samples=len(held_out) if held_out else 0,
        tokens=int(train.lengths.sum()),
        trained_tokens=int(train.trained_counts.sum()),
        truncated=int(train.truncated.sum()),
        dropped=loaded.counts.dropped,
        untrained=loaded.counts.untrained,
        max_length=max_length,
        lengths=Lengths.of(train.lengths),
        notes=notes,
        cached=cached,
        seconds=time.perf_counter() - started,
    )
    return DataSets(train=train, held_out=held_out, summary=summary)


def _load(job: DataJob, tokenizer: Any, max_length: int) -> _Loaded:
    corpus = files.find(job)
    records = islice(corpus.records(), job.limit)
    head = list(islice(records, _HEAD))
    form = formats.recognise(head, format=job.format, columns=job.columns)
    chat = None if form.name == "text" else template.choose(job.template, tokenizer, format=form.name)
    encoder = Encoder.make(tokenizer, chat, train_on=job.train_on, max_length=max_length)
    options = asdict(replace(job, path="", packing="auto", template="", max_length=max_length))
    special = [tokenizer.special_tokens_map, tokenizer.bos_token_id, tokenizer.eos_token_id, encoder.bos]
    parts = {"version": _VERSION, "options": options, "special": special, "template": chat.text if chat else None}
    name = cache.key({**parts, "data": corpus.fingerprint(), "tokenizer": tokenizer.backend_tokenizer.to_str()})
    notes = (*corpus.notes, *(chat.notes if chat else _text_notes(tokenizer)))
    kept = cache.load(name)
    if kept is None:
        items = (_with_system(form.parse(record), job.system) for record in chain(head, records))
        tokens, counts = _encode(items, encoder, job)
        if note := cache.save(name, tokens, counts):
            notes = (*notes, note)
    else:
        tokens, counts = kept
    if counts.untrained:
        notes = (*notes, _untrained_note(counts, max_length))
    return _Loaded(tokens=tokens, counts=counts, format=form, template=chat, notes=notes, cached=kept is not None)


def _text_notes(tokenizer: Any) -> tuple[str, ...]:
    return () if tokenizer.eos_token else ("the tokenizer has no end-of-sequence token: documents end without a mark",)


def _untrained_note(counts: Counts, max_length: int) -> str:
    many = counts.untrained > 1
    cut = {0: "", counts.untrained: f" (cut at {max_length:,} tokens, before the answer)"}.get(
        counts.untrained_truncated, f" ({counts.untrained_truncated:,} of them cut at {max_length:,} tokens, before the answer)"
    )
    return f"{counts.untrained:,} sample{'s' * many} without a trained token {'were' if many else 'was'} left out{cut}"


def _with_system(item: Conversation | Document, system: str | None) -> Conversation | Document:
    if system and isinstance(item, Conversation) and item.messages[0].role != "system":
        return replace(item, messages=(formats.Message(role="system", content=system), *item.messages))
    return item


def _encode(items: Iterable[Conversation | Document], encoder: Encoder, job: DataJob) -> tuple[TokenSet, Counts]:
    """The samples worth keeping, and what became of the others. Raises DataError where none is left."""
    dropped = untrained = untrained_truncated = 0

    def kept() -> Iterator[Sample]:
        nonlocal dropped, untrained, untrained_truncated
        for sample in chain.from_iterable(encoder.encode(chunk) for chunk in _chunks(items)):
            if sample.truncated and job.overlong == "drop":
                dropped += 1
            elif not sample.trained[1:].any():  # nothing predicts the first token
                untrained += 1
                untrained_truncated += sample.truncated
            else:
                yield sample

    tokens = TokenSet.from_samples(kept())
    counts = Counts(dropped=dropped, untrained=untrained, untrained_truncated=untrained_truncated)
    if not len(tokens):
        raise _nothing_left(job, counts, encoder)
    return tokens, counts


def _chunks(items: Iterable[Conversation | Document]) -> Iterator[list[Conversation | Document]]:
    chunk: list[Conversation | Document] = []
    characters = 0
    for item in items:
        chunk.append(item)
        characters += len(item.text) if isinstance(item, Document) else sum(len(turn.content) for turn in item.messages)
        if len(chunk) >= _CHUNK_ITEMS or characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _nothing_left(job: DataJob, counts: Counts, encoder: Encoder) -> DataError:
    length = encoder.max_length
    if counts.dropped and not counts.untrained:
        return DataError(
            f"{job.path}: all {counts.dropped:,} samples are longer than {length:,} tokens",
            why="`data.overlong: drop` leaves such samples out",
            remedy="raise `data.max_length`, or set `data.overlong: truncate`",
        )
    what = f"{job.path}: not one token of {counts.untrained:,} samples would count in the loss"
    if counts.untrained_truncated:
        return DataError(
            what,
            why=f"{counts.untrained_truncated:,} samples were cut at {length:,} tokens, before the answer begins",
            remedy="raise `data.max_length`",
        )
    if encoder.template is None:
        return DataError(what, why="the documents are shorter than two tokens", remedy="check the file, or `data.columns`")
    return DataError(
        what,
        why=f"`data.train_on: {job.train_on}`, the records' own flags ({', '.join(formats.TRAIN_KEYS)}) and the template "
        f"({encoder.template.name}) choose what is trained",
        remedy="look at the flags in the records; or set `data.train_on: all`",
    )


def _split(tokens: TokenSet, fraction: float, seed: int) -> tuple[TokenSet, TokenSet]:
    """Train and held-out set: which samples are held out depends on their number and the seed alone."""
    if len(tokens) < 2:
        raise DataError(
            "there is one sample only: nothing can be held out",
            remedy="set `evaluation.fraction` to 0, or give `evaluation.path`",
        )
    held = min(max(1, round(len(tokens) * fraction)), len(tokens) - 1)
    order = np.random.default_rng(seed).permutation(len(tokens))
    return tokens.take(np.sort(order[held:])), tokens.take(np.sort(order[:held]))


def _check_vocabulary(tokens: TokenSet, vocab_size: int | None) -> None:
    if vocab_size is not None and tokens.largest_id >= vocab_size:
        raise DataError(
            f"the tokenizer gives token id {tokens.largest_id:,}, the model knows {vocab_size:,} tokens only",
            why="the tokenizer does not belong to this model, or tokens were added to it",
            remedy="check `model.tokenizer`",
        )
