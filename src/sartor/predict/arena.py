"""Replay a ledger through the arena that tensors on a CPU come from (`sartor.kernels.arena`): the memory that it takes.

The arena is one stretch of addresses that never shrinks while a run goes on, and holds nothing but tensors. So what it takes is
a matter of the tensors' sizes and order alone, and the replay is exact.
"""

from __future__ import annotations

import bisect

from sartor.kernels.arena import GROWS_BY, LEAST_BYTES, ROUND_BYTES


class Arena:
    """Best fit, the lowest place among equals, neighbours joined; `arena.cpp` does the same."""

    def __init__(self) -> None:
        self.top_bytes = 0
        """All up to here has been in use at some time."""
        self._by_size: list[tuple[int, int]] = []
        """Free blocks: size, first byte."""
        self._starts: dict[int, int] = {}
        """First byte of a free block: its size."""
        self._ends: dict[int, int] = {}

    @property
    def resident_bytes(self) -> int:
        """Of the process: memory comes in huge pages."""
        return -(-self.top_bytes // GROWS_BY) * GROWS_BY

    def take(self, size_bytes: int) -> tuple[int, int]:
        """A block: first byte, size."""
        size = -(-size_bytes // ROUND_BYTES) * ROUND_BYTES
        place = bisect.bisect_left(self._by_size, (size, 0))
        if place < len(self._by_size):
            whole, start = self._by_size[place]
            self._forget(start, whole)
            if whole > size:
                self._note(start + size, whole - size)
            return start, size
        start = self.top_bytes
        if (last := self._ends.get(start)) is not None:
            self._forget(start - last, last)
            start -= last
        self.top_bytes = start + size
        return start, size

    def give(self, block: tuple[int, int]) -> None:
        """It is free again."""
        start, size = block
        if (before := self._ends.get(start)) is not None:
            self._forget(start - before, before)
            start, size = start - before, size + before
        if (after := self._starts.get(start + size)) is not None:
            self._forget(start + size, after)
            size += after
        self._note(start, size)

    def _note(self, start: int, size: int) -> None:
        bisect.insort(self._by_size, (size, start))
        self._starts[start] = self._ends[start + size] = size

    def _forget(self, start: int, size: int) -> None:
        del self._by_size[bisect.bisect_left(self._by_size, (size, start))]
        del self._starts[start], self._ends[start + size]


def takes(size_bytes: int) -> bool:
    """Whether a tensor of this size comes from the arena; smaller ones come from malloc."""
    return size_bytes >= LEAST_BYTES
