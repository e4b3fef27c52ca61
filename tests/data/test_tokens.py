"""Token sets: what goes in comes out, from memory and from disk."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sartor.data.tokens import Sample, TokenSet

SAMPLES = st.lists(st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), max_size=6), max_size=8)


def build(rows: list[list[tuple[int, bool]]]) -> list[Sample]:
    return [
        Sample(
            input_ids=np.array([token for token, _ in row], dtype=np.int32),
            trained=np.array([flag for _, flag in row], dtype=bool),
            source=f"f:{number}",
            truncated=number % 2 == 0,
        )
        for number, row in enumerate(rows)
    ]


def same(tokens: TokenSet, samples: list[Sample]) -> None:
    assert len(tokens) == len(samples)
    for index, sample in enumerate(samples):
        got = tokens[index]
        assert got.input_ids.tolist() == sample.input_ids.tolist()
        assert got.trained.tolist() == sample.trained.tolist()
        assert (got.source, got.truncated) == (sample.source, sample.truncated)
        assert tokens.lengths[index] == len(sample)
        assert tokens.trained_counts[index] == sample.trained[1:].sum(), "the first token is never a target"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=SAMPLES, seed=st.integers(0, 99))
def test_round_trip(tmp_path: Path, rows: list[list[tuple[int, bool]]], seed: int) -> None:
    samples = build(rows)
    tokens = TokenSet.from_samples(samples)
    same(tokens, samples)
    assert tokens.largest_id == max((token for row in rows for token, _ in row), default=-1)
    tokens.save(tmp_path / "a.arrow")
    same(TokenSet.open(tmp_path / "a.arrow"), samples)
    assert [path.name for path in tmp_path.iterdir()] == ["a.arrow"]
    chosen = np.random.default_rng(seed).permutation(len(samples))[: len(samples) // 2]
    same(tokens.take(chosen), [samples[index] for index in chosen])


def test_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    TokenSet.from_samples(build([[(1, True)] * 500])).save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(pa.ArrowException):
        TokenSet.open(path)
    with pytest.raises(OSError):
        TokenSet.open(tmp_path / "none.arrow")


@pytest.mark.skipif(importlib.util.find_spec("pandas") is None, reason="pandas is not installed")
def test_reading_and_taking_samples_imports_no_pandas(tmp_path: Path) -> None:
    TokenSet.from_samples(build([[(1, True), (2, False)], [(3, True)]])).save(tmp_path / "tokens")
    script = (
        "import sys\nfrom pathlib import Path\nfrom sartor.data.tokens import TokenSet\n"
        "tokens = TokenSet.open(Path(sys.argv[1])).take([1])\n"
        "assert tokens[0].input_ids.tolist() == [3] and tokens.lengths.tolist() == [1]\n"
        "assert 'pandas' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "tokens")], check=True)
