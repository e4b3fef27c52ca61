"""Recomputation in some blocks only: the fewest with which a job fits.

Every block that recomputes frees memory and costs time, so the fewest is also the fastest, and it is found by narrowing down.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from sartor.predict import MemoryForecast

FITS = ("fits", "cannot say")
_GUESSES = 3
"""So many steps go by what a block is estimated to free; further ones halve what is left."""


def guess(bytes_none: int, bytes_full: int, room: int, blocks: int) -> int | None:
    """How many blocks should recompute, from what the job is estimated to need if none do and if all do. At least one and not
    all: estimates are not exact. None where recomputation frees nothing."""
    freed = (bytes_none - bytes_full) / blocks
    if freed <= 0:
        return None
    return min(max(math.ceil((bytes_none - room) / freed), 1), blocks - 1)


def fewest(
    forecast: Callable[[int], MemoryForecast], *, blocks: int, start: int, freed: float
) -> tuple[int, MemoryForecast] | None:
    """The least number of blocks between none, which is known not to fit, and all, with which the job fits, and its forecast.
    `freed`: bytes that each is estimated to free. None where all have to recompute."""
    low, high, count, tried = 0, blocks, start, 0
    found: tuple[int, MemoryForecast] | None = None
    while high - low > 1:
        count = min(max(count, low + 1), high - 1)
        made = forecast(count)
        if made.verdict in FITS:
            high, found = count, (count, made)
        else:
            low = count
        tried += 1
        if tried < _GUESSES and made.process_bytes is not None:
            over = made.process_bytes - made.tight_share * made.available_bytes
            count += math.ceil(over / freed) if over > 0 else -math.floor(-over / freed)
        else:
            count = (low + high) // 2
    return found
