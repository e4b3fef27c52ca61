"""Examples of a row that begin with the same tokens: which ones, and with how many of them.

Such a beginning (a template's head, a system prompt) is laid into the row once, and the examples continue it. Only tokens whose
successors nobody is trained on are shared: then its hidden states, keys and values are the same for all, and so is the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from sartor.data.tokens import TokenSet

LEAST = 8
"""Tokens that are worth laying out by themselves."""


@dataclass(frozen=True, kw_only=True)
class Branch:
    """Examples that begin with the same `length` tokens; 0 where it is an example by itself."""

    length: int
    members: tuple[int, ...]


def branches(samples: TokenSet, row: Sequence[int]) -> list[Branch]:
    """A row's examples by their beginnings, so that as few tokens as can be lie in it.

    Examples are put in the order of their tokens; each branch is a run of neighbours, and shares what all of them begin with.
    """
    if len(row) < 2:
        return [Branch(length=0, members=(index,)) for index in row]
    heads = [(_head(samples, index), index) for index in row]
    heads.sort(key=lambda head: (head[0].astype(">i4").tobytes(), head[1]))
    alike = [_alike(one, other) for (one, _), (other, _) in pairwise(heads)]
    # saved[n]: tokens spared among the first n examples at most; start[n]: where the last branch of these begins
    saved, start = [0], [0]
    for end in range(1, len(heads) + 1):
        best, where, common = saved[end - 1], end - 1, np.iinfo(np.int64).max
        for first in range(end - 2, -1, -1):
            common = min(common, alike[first])
            if common < LEAST:
                break
            spared = saved[first] + (end - first - 1) * common
            if spared > best:
                best, where = spared, first
        saved.append(int(best))
        start.append(where)
    found, end = [], len(heads)
    while end:
        first = start[end]
        length = min(alike[first : end - 1], default=0)
        found.append(Branch(length=length, members=tuple(index for _, index in heads[first:end])))
        end = first
    return found[::-1]


def spared_tokens(samples: TokenSet, row: Sequence[int]) -> int:
    """Of a row whose examples share their beginnings."""
    return sum((len(branch.members) - 1) * branch.length for branch in branches(samples, row))


def _head(samples: TokenSet, index: int) -> np.ndarray:
    """The tokens of an example that may be shared: none of them predicts one that counts, and at least one is left."""
    sample = samples[index]
    counted = np.flatnonzero(sample.trained[1:])
    last = int(counted[0]) if len(counted) else len(sample) - 1
    return sample.input_ids[:last]


def _alike(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two heads have in common from their start."""
    shortest = min(len(one), len(other))
    apart = np.flatnonzero(one[:shortest] != other[:shortest])
    return int(apart[0]) if len(apart) else shortest
