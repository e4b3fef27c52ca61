"""Which examples of a row share their beginning."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sartor.data.pack import IGNORE, collate, row_width
from sartor.data.prefix import LEAST, branches
from sartor.data.tokens import Sample, TokenSet


def samples_of(examples: list[tuple[list[int], int]]) -> TokenSet:
    """Tokens, and how many of them come before the first that counts."""
    return TokenSet.from_samples(
        Sample(input_ids=np.array(ids), trained=np.arange(len(ids)) >= prompt, source="test") for ids, prompt in examples
    )


def test_the_grouping_that_spares_most() -> None:
    """Two that share 30 tokens with each other and 10 with three others: the pair is worth more than all five together."""
    head, more = list(range(10)), list(range(100, 120))
    row = [([*head, *more, 1, 2], 31), ([*head, 5, 6, 7], 11), ([*head, *more, 3, 4], 31), ([*head, 8, 9], 11), ([7, 7], 1)]
    found = branches(samples_of(row), range(5))
    assert sorted((branch.length, sorted(branch.members)) for branch in found) == [(0, [4]), (10, [1, 3]), (30, [0, 2])]


def test_what_predicts_a_trained_token_is_not_shared() -> None:
    ids = list(range(30))
    (branch,) = branches(samples_of([(ids, 20), (ids, 15)]), range(2))
    assert branch.length == 14
    assert [branch.length for branch in branches(samples_of([(ids, LEAST), (ids, LEAST)]), range(2))] == [0, 0]


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(1, 9), st.integers(1, 30)), min_size=1, max_size=9),
)
def test_a_row_holds_every_example_once(choices: list[tuple[int, int, int, int]]) -> None:
    examples = [([*([one] * 9), *([two] * 6), *range(50, 50 + own)], min(prompt, 14 + own)) for one, two, own, prompt in choices]
    samples = samples_of(examples)
    row = list(range(len(examples)))
    assert sorted(index for branch in branches(samples, row) for index in branch.members) == row
    batch = collate(samples, [row], pad_id=0, packing=False, share=True)
    assert batch.input_ids_RT.shape[1] == row_width(samples, row, share=True) == sum(batch.segments[0])
    assert (batch.targets_RT != IGNORE).sum() == batch.trained_tokens == sum(samples.trained_counts)
    starts = np.cumsum([0, *batch.segments[0]])
    pieces = [batch.input_ids_RT[0, first:last] for first, last in pairwise(starts)]
    parents = batch.continues[0]
    whole = [[*(pieces[parent] if parent >= 0 else ()), *piece] for parent, piece in zip(parents, pieces, strict=True)]
    found = [ids for number, ids in enumerate(whole) if number not in parents]
    assert sorted(map(tuple, found)) == sorted(tuple(ids) for ids, _ in examples)
