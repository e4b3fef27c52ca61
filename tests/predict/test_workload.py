"""The average step of a run, and the time forecast that follows from it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig

import sartor
from sartor.data.order import BatchOrder
from sartor.predict.workload import sample_workload

LENGTHS = np.array([100, 10, 20, 30] * 8)
TOKENIZER = Path(sartor.__file__).parent / "demo/model"
ORDER = BatchOrder(examples=len(LENGTHS), global_batch=8, epochs=1, max_steps=None, seed=0)


def sampled(**changes: Any) -> Any:
    given: dict[str, Any] = {"capacity": 100, "packing": False, "micro_batch": 1} | changes
    return sample_workload(SimpleNamespace(lengths=LENGTHS, trained_counts=LENGTHS - 1), ORDER, **given)  # type: ignore[arg-type]


def test_what_a_step_holds_on_average() -> None:
    alone = sampled()
    assert alone.micro_batches == alone.sequences == 8
    assert alone.tokens == 8 * alone.average.positions == LENGTHS.sum() / 4
    assert LENGTHS[alone.typical[0][0]] == 30, "nearest to 40"
    together = sampled(micro_batch=8)
    assert together.micro_batches == 1
    assert together.average.trained == LENGTHS.sum() / 4 - 8 == 8 * alone.average.trained
    assert 8 * 30 <= together.average.positions <= 8 * 100, "padded to the longest of each step"
    assert sampled(micro_batch=1, data_ranks=3).micro_batches == 3
    assert sampled(packing=True, micro_batch=8).average.positions < together.average.positions


def test_short_examples_take_less_than_long_ones(tmp_path: Path) -> None:
    """Memory is for the longest example, time for all of them."""
    LlamaConfig(
        vocab_size=512, hidden_size=2048, intermediate_size=5504, num_hidden_layers=4, num_attention_heads=16
    ).save_pretrained(tmp_path)  # fmt: skip

    def plan(words: list[int]) -> Any:
        data = tmp_path / f"{words[1]}.txt"
        data.write_text("\n".join("a " * count for count in words), encoding="utf-8")
        return sartor.plan({
            "model": {"path": str(tmp_path / "config.json"), "tokenizer": str(TOKENIZER), "random_weights": True},
            "data": {"path": str(data), "documents": "lines", "max_length": 1024, "packing": False},
            "training": {"epochs": 1, "global_batch": 8},
            "strategy": {"micro_batch": 1, "recompute": "none"},
            "machine": "A10-24GB",
        })  # fmt: skip

    ragged, even = plan([900] + [450] * 15), plan([900] * 16)
    assert ragged.forecast.process_bytes == pytest.approx(even.forecast.process_bytes, rel=0.01)
    assert ragged.time.step_seconds / even.time.step_seconds == pytest.approx(17 / 32, rel=0.15)
