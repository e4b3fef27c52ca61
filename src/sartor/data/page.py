"""Samples as the model sees them: what it reads, and what it is trained to say."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sartor.data.mask import common_length
from sartor.data.summary import DataSets, DataSummary
from sartor.data.tokens import Sample, TokenSet
from sartor.errors import writing
from sartor.job.units import format_count

_TEMPLATES = Path(__file__).parent / "templates"
_TRAINED, _READ = "bold green", "dim"
_TERMINAL_TOKENS = 400
_HTML_TOKENS = 4000
_BAR = 40
# Control characters of the data must not reach the terminal: ␛ for ESC and so on.
_VISIBLE = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Adjacent tokens with the same flag, as text."""

    text: str
    trained: bool


@dataclass(frozen=True, kw_only=True)
class ShownSample:
    """One sample for a page. `hidden` tokens at its end are not shown."""

    pieces: tuple[Piece, ...]
    source: str
    tokens: int
    trained_tokens: int
    truncated: bool
    hidden: int


def show(sample: Sample, tokenizer: Any, *, most_tokens: int = _HTML_TOKENS) -> ShownSample:
    """The sample's first tokens as text, special tokens included."""
    ids, trained = sample.input_ids[:most_tokens], sample.trained[:most_tokens]
    ends = [*(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(ids)]
    text = _decode(tokenizer, ids)
    pieces, begin = [], 0
    for end in ends:
        # Decoding piece by piece would lose spaces and split characters: cut the whole text instead, where a character is
        # complete. What its last bytes make of it is shown with the token that completes it.
        stop = len(text) if end == len(ids) else max(begin, common_length(text, _decode(tokenizer, ids[:end])))
        if stop > begin:
            pieces.append(Piece(text=text[begin:stop], trained=bool(trained[end - 1])))
        begin = stop
    return ShownSample(
        pieces=tuple(pieces),
        source=sample.source,
        tokens=len(sample),
        trained_tokens=int(sample.trained[1:].sum()),
        truncated=sample.truncated,
        hidden=len(sample) - len(ids),
    )


def _decode(tokenizer: Any, ids: np.ndarray) -> str:
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _spread(tokens: TokenSet, count: int) -> Sequence[int]:
    """Indices over the whole set, the first sample among them."""
    return sorted({int(index) for index in np.linspace(0, len(tokens) - 1, min(count, len(tokens)))})


def facts(summary: DataSummary) -> list[tuple[str, str]]:
    """Name and value of everything worth a row in a table."""

    def share(part: int, whole: int) -> str:
        return f"{part:,} ({part / whole:.1%})" if whole else f"{part:,}"

    read = summary.samples + summary.dropped + summary.untrained
    return [
        ("format", f"{summary.format} ({summary.recognised})"),
        ("template", summary.template),
        ("samples", f"{summary.samples:,}" + (f", held out {summary.held_out_samples:,}" if summary.held_out_samples else "")),
        ("tokens", f"{format_count(summary.tokens)}, of these trained {share(summary.trained_tokens, summary.tokens)}"),
        ("truncated", f"{share(summary.truncated, summary.samples)} at {summary.max_length:,} tokens"),
        ("left out", f"{share(summary.dropped, read)} too long, {share(summary.untrained, read)} without a trained token"),
        ("lengths", ", ".join(f"{name} {value:,}" for name, value in summary.lengths.quantiles.items())),
        ("time", f"{summary.seconds:.1f} s" + (" (tokens from the cache)" if summary.cached else "")),
    ]


def render_terminal(datasets: DataSets, tokenizer: Any, console: Console, count: int = 3) -> None:
    """Samples, shares and a histogram of lengths. Without colours, trained text stands in ⟦…⟧."""
    colours = console.color_system is not None and not console.no_color
    legend = Text("what the model reads, and ") + _text(Piece(text="what it is trained to say", trained=True), colours)
    console.print(legend, "")
    for index in _spread(datasets.train, count):
        shown = show(datasets.train[index], tokenizer, most_tokens=_TERMINAL_TOKENS)
        title = f"sample {index + 1} · {shown.source} · {shown.tokens:,} tokens, {shown.trained_tokens:,} trained"
        console.rule(Text(title + (" · truncated" if shown.truncated else "")), align="left", style="dim")
        console.print(Text.assemble(*(_text(piece, colours) for piece in shown.pieces)), soft_wrap=True)
        if shown.hidden:
            console.print(Text(f"… {shown.hidden:,} more tokens", style=_READ))
    console.rule(style="dim")
    table = Table.grid(padding=(0, 2))
    for name, value in facts(datasets.summary):
        table.add_row(Text(name, style="bold"), Text(value))
    console.print(table, "", _histogram(datasets.summary), sep="\n")
    for note in datasets.summary.notes:
        console.print(Text(f"note: {note}", style="yellow"))


def _text(piece: Piece, colours: bool) -> Text:
    text = piece.text.translate(_VISIBLE)
    if colours:
        return Text(text, style=_TRAINED if piece.trained else _READ)
    return Text(f"⟦{text}⟧" if piece.trained else text)


def _histogram(summary: DataSummary) -> Table:
    lengths = summary.lengths
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right")
    table.add_column()
    table.add_column(justify="right")
    most = max(lengths.counts)
    for first, end, number in zip(lengths.edges, lengths.edges[1:], lengths.counts, strict=False):
        bar = "█" * round(_BAR * number / most) or ("▏" if number else "")
        table.add_row(f"{first:,}–{end - 1:,} tokens", Text(bar, style="cyan"), f"{number:,}")
    return table


def render_html(datasets: DataSets, tokenizer: Any, path: Path, count: int = 20) -> None:
    """The same as one self-contained HTML file, written whole or not at all. Raises UsageError."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    lengths = datasets.summary.lengths
    html = environment.get_template("page.html.jinja").render(
        samples=[(index + 1, show(datasets.train[index], tokenizer)) for index in _spread(datasets.train, count)],
        facts=facts(datasets.summary),
        notes=datasets.summary.notes,
        buckets=[(first, end - 1, n) for first, end, n in zip(lengths.edges, lengths.edges[1:], lengths.counts, strict=False)],
        most=max(lengths.counts),
    )
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(html, encoding="utf-8", errors="replace")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
