"""What the data turned out to be: counts, lengths, and what was chosen or left out on the way."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sartor.data.tokens import TokenSet

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_MOST_BUCKETS = 16


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Distribution of sample lengths in tokens. Bucket i holds lengths from edges[i] to edges[i + 1] - 1."""

    edges: tuple[int, ...]
    counts: tuple[int, ...]
    quantiles: dict[str, int]
    """`5%`, `25%`, `50%`, `75%`, `95%` and `longest` → tokens."""

    @classmethod
    def of(cls, lengths: np.ndarray) -> Lengths:
        """Buckets of equal, round width."""
        longest = int(lengths.max())
        width = next(w for power in range(20) for w in (10**power, 2 * 10**power, 5 * 10**power) if longest < w * _MOST_BUCKETS)
        first = int(lengths.min()) // width * width
        edges = np.arange(first, longest + width + 1, width)
        counts, _ = np.histogram(lengths, bins=edges)
        values = np.quantile(lengths, _QUANTILES, method="nearest")
        quantiles = {f"{share:.0%}": int(value) for share, value in zip(_QUANTILES, values, strict=True)}
        return cls(edges=tuple(map(int, edges)), counts=tuple(map(int, counts)), quantiles={**quantiles, "longest": longest})


@dataclass(frozen=True, kw_only=True)
class DataSummary:
    """The counts are of the training set; `held_out_samples` alone is of the other."""

    format: str
    recognised: str
    """How the format was known, e.g. `recognised by the columns instruction, output`."""
    template: str
    samples: int
    held_out_samples: int
    tokens: int
    trained_tokens: int
    truncated: int
    """Samples cut at the maximum length."""
    dropped: int
    """Samples left out because they are longer than that (`data.overlong: drop`)."""
    untrained: int
    """Samples left out because none of their tokens count in the loss."""
    max_length: int
    lengths: Lengths
    notes: tuple[str, ...]
    cached: bool
    seconds: float


@dataclass(frozen=True, kw_only=True)
class DataSets:
    """Everything that training and evaluation read."""

    train: TokenSet
    held_out: TokenSet | None
    summary: DataSummary
