"""Tokenised data on disk, named by everything it depends on."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from sartor.data.tokens import TokenSet
from sartor.folders import cache_folder


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What became of the records. Kept beside the tokens, which do not tell it."""

    dropped: int = 0
    untrained: int = 0
    untrained_truncated: int = 0


def key(parts: dict[str, Any]) -> str:
    """A file name for these parts; any change gives another."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode("utf-8", "surrogatepass")).hexdigest()[:40]


def folder() -> Path | None:
    """Where tokens are kept; None where there is no home."""
    return cache_folder("tokens")


def load(name: str) -> tuple[TokenSet, Counts] | None:
    """The tokens kept under `name`; None where there are none, or they are damaged."""
    place = folder()
    if place is None:
        return None
    try:
        beside = json.loads((place / f"{name}.json").read_text(encoding="utf-8"))
        counts, shape = Counts(**beside["counts"]), beside["shape"]
        tokens = TokenSet.open(place / f"{name}.arrow")
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None
    return (tokens, counts) if shape == _shape(tokens) else None


def save(name: str, tokens: TokenSet, counts: Counts) -> str:
    """Keep them; a note where that cannot be done, else an empty string."""
    place = folder()
    if place is None:
        return "the tokens are not cached: there is no home folder; set SARTOR_CACHE"
    try:
        tokens.save(place / f"{name}.arrow")
        beside = json.dumps({"counts": asdict(counts), "shape": _shape(tokens)})
        partial = place / f".{name}.json.{os.getpid()}"
        partial.write_text(beside, encoding="utf-8")
        partial.replace(place / f"{name}.json")
    except OSError as error:
        return f"the tokens are not cached: {error.strerror or error} ({place}); set SARTOR_CACHE to a folder you can write"
    return ""


def _shape(tokens: TokenSet) -> list[int]:
    """What a damaged file would most likely get wrong: samples, tokens, trained tokens."""
    return [len(tokens), int(tokens.lengths.sum()), int(tokens.trained_counts.sum())]
