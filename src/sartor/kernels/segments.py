"""Where the examples of a batch lie, and which of them are computed together: what attention by segments goes through.

A segment is an example, or a part of one: a segment may continue another one, the beginning that several examples share, and then
attends to that as well. Everything is Python integers, so that no shape depends on a tensor's values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from sartor.kernels.attend import LONGEST
from sartor.kernels.native import products_library

GROUPED_LENGTH = 64
"""Examples up to this length are computed several at once; longer ones fill the cores alone."""

GROUPED_TOKENS = 1024
"""Positions of a group at most."""

GRID = 16
"""Lengths are rounded up to multiples of it, those of long examples to multiples of twice as much."""


@dataclass(frozen=True, slots=True)
class Group:
    """Segments computed at once."""

    where: tuple[tuple[int, int], ...]
    """First position, counted over all rows, and length of each."""
    length: int
    """With padding."""
    before: tuple[int, int]
    """First position and length of the segment that all of them continue; its length is 0 where there is none."""
    index: Tensor | None
    """Of every position of every segment, its number among those of all rows, one past their end for padding; None for a single
    segment without."""
    keys: Tensor | None
    """The same for the positions that are attended to: those of the segment before come first."""
    padding: Tensor | None
    """Where padding is, segments x L; None where there is none."""


class Wanted:
    """Positions whose hidden states are wanted after `block`, the last of a model: their numbers among those of all rows."""

    def __init__(self, block: nn.Module, places_N: Tensor) -> None:
        self.block, self.places_N = block, places_N
        self.taken = False
        """Whether the block gave these positions alone, 1 x N."""

    def of(self, hidden_RTH: Tensor) -> Tensor:
        self.taken = True
        return hidden_RTH.flatten(0, 1)[self.places_N][None]


class Segments:
    """Where the segments of a batch are. Opaque to models: it goes through them in the place of an attention mask."""

    def __init__(
        self,
        lengths: Sequence[Sequence[int]],
        width: int,
        *,
        continues: Sequence[Sequence[int]] = (),
        device: str | torch.device = "cpu",
    ) -> None:
        """`lengths`: of every row's segments, in their order from its start; what is left of `width` is padding. `continues`: for
        each, the number of the segment in its row that it continues, or -1."""
        self.rows, self.width, self.window = len(lengths), width, 0
        self.uses: list[str] = []
        """Classes of the modules that attended with these segments, one entry a time."""
        self.wanted: Wanted | None = None
        """What the block at the end may leave out; nothing where all positions are wanted."""
        self.padding: list[tuple[int, int]] = []
        """First position and number of what is left of a row, where something is."""
        where: list[_Entry] = []
        for row, inside in enumerate(lengths):
            first, own = row * width, len(where)
            for number, length in enumerate(inside):
                parent = continues[row][number] if continues else -1
                where.append((first, length, *(where[own + parent][:2] if parent >= 0 else (0, 0))))
                first += length
            if first < (row + 1) * width:
                self.padding.append((first, (row + 1) * width - first))
        longest = LONGEST if products_library() is not None else 0
        by_length = sorted(where, key=lambda entry: -entry[1])
        short = [entry for entry in by_length if entry[1] + entry[3] <= longest]
        offsets = [0, *accumulate(entry[3] for entry in short)]
        self.short = [number for entry, offset in zip(short, offsets, strict=False) for number in (*entry, offset)]
        """Where the segments are that the compiled loops attend to, as `attend_` takes it."""
        self.more = [(entry[2], entry[3]) for entry in short if entry[3]]
        """Of those of them that continue another one, in their order, its first position and its length."""
        others = [entry for entry in by_length if entry[1] + entry[3] > longest]
        self._by_products = tuple(_group(length, members, self.rows * width, device) for length, members in _alike(others))
        self._whole: tuple[Group, ...] | None = None if self.short else self._by_products
        self._by_length, self._device = by_length, device

    def groups(self, *, compiled: bool) -> tuple[Group, ...]:
        """The segments that products attend to; all of them where there are no compiled loops for the format."""
        if compiled:
            return self._by_products
        if self._whole is None:
            end = self.rows * self.width
            self._whole = tuple(_group(length, members, end, self._device) for length, members in _alike(self._by_length))
        return self._whole

    def windowed(self, window: int) -> Segments:
        """The same for layers whose positions see the last `window` ones only, themselves included."""
        other = Segments.__new__(Segments)
        other.__dict__.update(self.__dict__, window=window)
        return other


_Entry = tuple[int, int, int, int]
"""First position and length of a segment, and of the one that it continues."""


def _alike(where: Sequence[_Entry]) -> Iterator[tuple[int, list[_Entry]]]:
    """Of segments from the longest to the shortest: lengths, and those that are computed together at this length. Lengths are few
    and counts are powers of two: what PyTorch compiles for a product in bfloat16 is for its sizes alone, and takes milliseconds
    and the better part of a MiB."""
    by_length: dict[tuple[int, int, int], list[_Entry]] = {}
    for entry in where:
        step = GRID if entry[1] <= GROUPED_LENGTH else 2 * GRID
        by_length.setdefault((-(-entry[1] // step) * step, *entry[2:]), []).append(entry)
    for (length, *_), members in by_length.items():
        most = GROUPED_TOKENS // length if length <= GROUPED_LENGTH else 1
        while members:
            size = 1 << (min(len(members), most).bit_length() - 1)
            yield length, members[:size]
            members = members[size:]


def _group(length: int, members: Sequence[_Entry], end: int, device: str | torch.device) -> Group:
    where, before = tuple(entry[:2] for entry in members), members[0][2:]
    own = [[first + t if t < real else end for t in range(length)] for first, real in where]
    exact = len(where) == 1 and where[0][1] == length
    padding = None
    if any(real < length for _, real in where):
        padding = torch.tensor([[t >= real for t in range(length)] for _, real in where], device=device)
    ahead = [before[0] + t for t in range(before[1])]
    index = None if exact else torch.tensor([number for numbers in own for number in numbers], device=device)
    keys = torch.tensor([number for numbers in own for number in (*ahead, *numbers)], device=device) if ahead else index
    return Group(where=where, length=length, before=before, index=index, keys=keys, padding=padding)
