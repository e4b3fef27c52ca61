"""What products and other operators are measured with: random numbers, so many that caches are no warmer than in a step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_BLOCK = 2**16
"""So many random numbers, repeated: drawing them all takes longer than measuring."""
_BYTES, _MOST_TURNS = 2**25, 256
"""Of all operands, and how many sets of them are made."""
_Shape = tuple[int, ...]


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers that are not zero: some processors are quicker with zeros, and denormal ones are slow."""
    count = math.prod(shape)
    block = torch.randn(min(count, _BLOCK)).mul_(0.5).to(dtype)
    return block.repeat(-(-count // len(block)))[:count].view(shape)


class Operands:
    """Random numbers that calls take by turns, on a CPU so many that they are not in its second caches when they are taken again:
    in a step the weights were last used a pass ago, and inputs come from other cores and operators."""

    def __init__(self, dtype: torch.dtype) -> None:
        count = _BYTES // dtype.itemsize
        self._numbers = torch.ones(count, dtype=dtype) if dtype == torch.int8 else noise(count, dtype=dtype)
        self._results = torch.zeros(count, dtype=dtype)

    def by_turns(self, operands: Sequence[_Shape], results: Sequence[_Shape]) -> Iterator[tuple[Tensor, ...]]:
        """Tensors of these shapes, without end; what is written to results does not come to be an operand."""
        room = self._numbers.numel() // sum(map(math.prod, (*operands, *results)))
        count = min(room, _MOST_TURNS) if self._numbers.device.type == "cpu" else 0
        if count < 2:
            given = [_repeated(self._numbers, math.prod(shape)).view(shape) for shape in operands]
            return itertools.repeat((*given, *(self._results.new_zeros(shape) for shape in results)))
        turns = zip(_parts(self._numbers, operands, count), _parts(self._results, results, count), strict=True)
        return itertools.cycle([(*given, *made) for given, made in turns])


def _parts(numbers: Tensor, shapes: Sequence[_Shape], count: int) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of these shapes one after the other, `count` times."""
    for turn in numbers[: count * sum(map(math.prod, shapes))].chunk(count) if shapes else [numbers] * count:
        parts = turn.split([math.prod(shape) for shape in shapes]) if shapes else ()
        yield tuple(part.view(shape) for part, shape in zip(parts, shapes, strict=True))


def _repeated(numbers: Tensor, count: int) -> Tensor:
    return numbers.repeat(-(-count // len(numbers)))[:count]
