"""The fewest blocks to recompute are found, however wrong the estimate is that the search starts from."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sartor.plan.partial import FITS, fewest, guess
from sartor.predict import MemoryForecast
from sartor.predict.memory import NOTHING

ROOM = 1000
KNOWN = MemoryForecast(
    **NOTHING, verdict="fits", reason="", baseline_bytes=0, available_bytes=ROOM, tight_share=1.0, trace_seconds=0.0
)


def needing(size: int) -> MemoryForecast:
    return dataclasses.replace(KNOWN, process_bytes=size, verdict="fits" if size <= ROOM else "does not fit")


@given(
    st.lists(st.integers(1, 40), min_size=3, max_size=60),
    st.integers(0, 200),
    st.floats(0.1, 500.0),
    st.integers(1, 100),
)
def test_the_fewest_are_found(frees: list[int], short: int, freed: float, start: int) -> None:
    """Blocks free different amounts; the job is `short` of memory if none recomputes."""
    needs = [ROOM + 1 + short - sum(frees[:count]) for count in range(len(frees))]
    tried: list[int] = []

    def forecast(count: int) -> MemoryForecast:
        tried.append(count)
        return needing(needs[count])

    found = fewest(forecast, blocks=len(frees), start=start, freed=freed)
    enough = [count for count in range(1, len(frees)) if needing(needs[count]).verdict in FITS]
    assert (found[0] if found else None) == (enough[0] if enough else None)
    assert len(tried) == len(set(tried)) <= 3 + len(frees).bit_length()


@pytest.mark.parametrize(("room", "count"), [(990, 1), (950, 5), (500, 9), (2000, 1)])
def test_a_guess_is_on_the_line_between_none_and_all(room: int, count: int) -> None:
    assert guess(1000, 900, room, 10) == count


def test_no_guess_where_recomputation_frees_nothing() -> None:
    assert guess(1000, 1000, 900, 10) is None
