"""A placed step is the plain step, bit for bit, wherever things live."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from sartor.data.pack import step_batches
from sartor.data.tokens import Sample, TokenSet
from sartor.job import from_mapping
from sartor.placement import DiskTier, Engine, HostTier, PlacedStep, find_rows
from sartor.plan.table import RowPlaces, Sizes, Table, uniform
from sartor.step import Precision, TensorBatch, TrainStep, make_step, make_trainable

STEPS = 3


def make_llama(*, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
    )


def samples() -> TokenSet:
    random = np.random.default_rng(0)
    made = []
    for number in range(8 * STEPS):
        length = int(random.integers(6, 20))
        trained = random.random(length) < 0.6
        trained[-1] = True
        made.append(Sample(input_ids=random.integers(3, 64, length), trained=trained, source=f"test:{number}"))
    return TokenSet.from_samples(made)


def batches(micro_batches: int) -> Iterator[tuple[list[TensorBatch], int]]:
    """Of every step."""
    for step in range(STEPS):
        cut = step_batches(
            samples(), np.arange(8 * step, 8 * step + 8), pad_id=0, capacity=64, packing=False, micro_batch=8 // micro_batches
        )
        yield [TensorBatch.of(batch, "cpu") for batch in cut], sum(batch.trained_tokens for batch in cut)


def make(model: nn.Module, *, method: str, mode: str, recompute: bool = False, **training: Any) -> TrainStep:
    job = from_mapping({"model": "unused", "data": "unused", "method": method, "training": training, "lora": {"rank": 4}})
    precision = Precision.of(mode)
    model = model.to(precision.load_dtype(adapter=method == "lora"))
    trainable = make_trainable(model, job, precision, recompute=recompute, seed=0)
    return make_step(trainable, job, precision, device_kind="cpu")


def run(step: TrainStep, micro_batches: int) -> tuple[list[Tensor], list[Tensor]]:
    """Losses and norms."""
    losses, norms = [], []
    for cut, trained_tokens in batches(micro_batches):
        gradients = step.backward(cut, trained_tokens)
        losses += gradients.losses
        norms.append(gradients.norm)
        step.update(1e-2)
    return losses, norms


def placed(step: TrainStep, tmp_path: Path, place: str, *, activations: str = "device") -> PlacedStep:
    tiers = {"host": HostTier(), "disk": DiskTier(tmp_path)}
    rows = find_rows(step.model)
    sizes = [Sizes.of(row) for row in rows]
    if place == "mixed":
        places = ("disk", "host", "device")
        table = Table(
            rows=tuple(
                RowPlaces(
                    name=size.name,
                    weights=places[number % 3],
                    gradients=places[(number + 1) % 3],
                    state=places[(number + 2) % 3],
                    activations=places[number % 3],
                )
                for number, size in enumerate(sizes)
            )
        )
    else:
        table = uniform(sizes, place, activations=activations)
    return PlacedStep(step, Engine(step.model, rows, table, tiers))


def assert_same(
    tmp_path: Path, place: str, *, micro_batches: int, activations: str = "device", tied: bool = True, **job: Any
) -> None:
    model = make_llama(tied=tied)
    plain = make(copy.deepcopy(model), **job)
    wanted = run(plain, micro_batches)
    moved = placed(make(model, **job), tmp_path, place, activations=activations)
    got = run(moved, micro_batches)
    assert all(map(torch.equal, wanted[0], got[0])), "losses"
    assert all(map(torch.equal, wanted[1], got[1])), "norms"
    if place != "device":
        moved.engine.mover.settle()
        here = [live for live in moved.engine.rows if live.weights is not None and live.weights.state != "free"]
        assert len(here) <= 2, "rows that are used do not go"
        masters = job["mode"] == "bf16-master"
        sizes = [Sizes.of(row, state_bytes=10 if masters else 8, gradient_bytes=4) for row in find_rows(moved.model)]
        assert 0 < moved.engine.gauge.peak_bytes <= moved.engine.table.moving_bytes(sizes)
    moved.engine.detach()
    for name, parameter in plain.parameters.items():
        assert torch.equal(parameter, moved.parameters[name]), name
        for key, value in plain.optimizer.state[parameter].items():
            assert torch.equal(value, moved.optimizer.state[moved.parameters[name]][key]), (name, key)


@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("place", ["device", "host", "disk", "mixed"])
def test_every_tier(tmp_path: Path, place: str, method: str, micro_batches: int) -> None:
    assert_same(tmp_path, place, method=method, mode="float32", micro_batches=micro_batches, clip_norm=0.1)


@pytest.mark.parametrize("mode", ["bf16-master", "bf16-mixed"])
def test_precisions(tmp_path: Path, mode: str) -> None:
    assert_same(tmp_path, "disk", method="full", mode=mode, micro_batches=4, clip_norm=0.1)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_recompute(tmp_path: Path, method: str) -> None:
    assert_same(tmp_path, "host", method=method, mode="float32", micro_batches=2, recompute=True)


@pytest.mark.parametrize("activations", ["host", "disk"])
def test_activations_away(tmp_path: Path, activations: str) -> None:
    assert_same(tmp_path, "host", method="full", mode="float32", micro_batches=2, activations=activations)


@pytest.mark.parametrize("changes", [{"clip_norm": 0}, {"optimizer": "sgd"}, {"loss": "hf"}])
def test_untied_head_and_other_steps(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert_same(tmp_path, "host", method="full", mode="float32", micro_batches=2, tied=False, **changes)
