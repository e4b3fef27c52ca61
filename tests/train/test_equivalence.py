"""What must not change the result does not: micro-batches, packing, padding, recomputation, resumption."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sartor.data.pack import fill_rows, step_batches
from sartor.data.tokens import Sample, TokenSet
from sartor.job import from_mapping
from sartor.job.schema import ModelJob
from sartor.kernels.attention import NAME as SEGMENTS
from sartor.model import build, resolve
from sartor.step import Precision, TensorBatch, make_step, make_trainable


def ragged(count: int, *, longest: int = 60, seed: int = 0) -> TokenSet:
    """Samples of very different lengths; some tokens train, the first never counts."""
    random = np.random.default_rng(seed)
    samples = []
    for number in range(count):
        length = int(random.integers(3, longest))
        trained = random.random(length) < 0.6
        trained[-1] = True
        samples.append(Sample(input_ids=random.integers(3, 900, length), trained=trained, source=f"test:{number}"))
    return TokenSet.from_samples(samples)


def one_step(model: torch.nn.Module, samples: TokenSet, **cut: Any) -> tuple[float, dict[str, Tensor]]:
    """Loss per trained token and gradients of all samples as one optimizer step."""
    training = {"clip_norm": 0, "loss": cut.pop("loss", "sartor")}
    job = from_mapping({"model": "unused", "data": "unused", "method": "full", "training": training})
    precision = Precision.of("float32")
    model = make_trainable(copy.deepcopy(model), job, precision, recompute=cut.pop("recompute", False))
    step = make_step(model, job, precision, device_kind="cpu")
    batches = step_batches(samples, np.arange(len(samples)), pad_id=0, **cut)
    trained_tokens = sum(batch.trained_tokens for batch in batches)
    assert trained_tokens == samples.trained_counts.sum()
    gradients = step.backward([TensorBatch.of(batch, "cpu") for batch in batches], trained_tokens)
    loss = float(sum(gradients.losses)) / trained_tokens
    return loss, {name: parameter.grad.clone() for name, parameter in step.parameters.items() if parameter.grad is not None}


def assert_same(one: tuple[float, dict[str, Tensor]], other: tuple[float, dict[str, Tensor]]) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    for name, gradient in one[1].items():
        scale = max(float(gradient.abs().max()), 1e-8)
        assert float((gradient - other[1][name]).abs().max()) / scale < 1e-5, name


@pytest.fixture(scope="module")
def model(tiny: Path) -> torch.nn.Module:
    return build(resolve(ModelJob(path=str(tiny))), dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("packing", [False, True])
def test_micro_batches_do_not_change_loss_or_gradients(model: torch.nn.Module, packing: bool) -> None:
    samples = ragged(8)
    whole = one_step(model, samples, capacity=128, packing=packing, micro_batch=8)
    for micro_batch in (1, 3):
        assert_same(whole, one_step(model, samples, capacity=128, packing=packing, micro_batch=micro_batch))


def test_packed_equals_unpacked(model: torch.nn.Module) -> None:
    samples = ragged(12)
    alone = one_step(model, samples, capacity=128, packing=False, micro_batch=1)
    assert_same(alone, one_step(model, samples, capacity=128, packing=True, micro_batch=2))
    assert_same(alone, one_step(model, samples, capacity=128, packing=False, micro_batch=12))


def test_joined_rows_have_little_padding_and_equal_single_examples(tiny: Path) -> None:
    model = build(resolve(ModelJob(path=str(tiny))), dtype=torch.float32, device="cpu", attention=SEGMENTS)
    samples = ragged(12)
    cut: dict[str, Any] = {"capacity": 128, "packing": True, "micro_batch": 3, "joined": True}
    batches = step_batches(samples, np.arange(12), pad_id=0, **cut)
    assert all(batch.tokens <= batch.input_ids_RT.size <= 1.04 * batch.tokens for batch in batches)
    assert len(batches) == len(step_batches(samples, np.arange(12), pad_id=0, **{**cut, "joined": False}))
    alone = one_step(model, samples, capacity=128, packing=False, micro_batch=1)
    assert_same(alone, one_step(model, samples, **cut))


def alike(count: int) -> TokenSet:
    """Samples that begin in one of two ways, or in one of their own; the beginnings train nothing."""
    random = np.random.default_rng(5)
    heads = [random.integers(3, 900, length) for length in (20, 13)]
    samples = []
    for number in range(count):
        head = heads[number % 3] if number % 3 < 2 else random.integers(3, 900, 15)
        own = random.integers(3, 900, 4 + 5 * number % 17)
        trained = np.arange(len(head) + len(own)) >= len(head) + 2
        samples.append(Sample(input_ids=np.concatenate([head, own]), trained=trained, source=f"test:{number}"))
    return TokenSet.from_samples(samples)


@pytest.mark.parametrize("recompute", [False, True])
def test_shared_beginnings_do_not_change_loss_or_gradients(tiny: Path, recompute: bool) -> None:
    model = build(resolve(ModelJob(path=str(tiny))), dtype=torch.float32, device="cpu", attention=SEGMENTS)
    samples = alike(12)
    cut: dict[str, Any] = {"capacity": 128, "packing": True, "micro_batch": 3, "joined": True}
    plain, shared = (step_batches(samples, np.arange(12), pad_id=0, **cut, share=share) for share in (False, True))
    spared = sum(one.input_ids_RT.size - other.input_ids_RT.size for one, other in zip(plain, shared, strict=True))
    assert spared > 60
    assert [batch.tokens for batch in plain] == [batch.tokens for batch in shared]
    alone = one_step(model, samples, capacity=128, packing=False, micro_batch=1)
    assert_same(alone, one_step(model, samples, **cut, share=True, recompute=recompute))


def test_packed_rows_do_hold_several_examples() -> None:
    samples = ragged(12)
    rows = fill_rows(range(12), samples.lengths, capacity=128, packing=True)
    assert len(rows) < 12
    assert sorted(index for row in rows for index in row) == list(range(12))
    assert all(sum(samples.lengths[index] for index in row) <= 128 for row in rows)


def test_each_packed_sequence_has_the_logits_it_has_alone(model: torch.nn.Module) -> None:
    samples = ragged(6, seed=3)
    row = list(range(6))
    packed_ids = torch.tensor(np.concatenate([samples[index].input_ids for index in row]))[None].long()
    positions = torch.tensor(np.concatenate([np.arange(len(samples[index])) for index in row]))[None]
    with torch.no_grad():
        packed = model(input_ids=packed_ids, position_ids=positions, use_cache=False).logits[0]
        first = 0
        for index in row:
            alone = model(input_ids=torch.tensor(samples[index].input_ids)[None].long(), use_cache=False).logits[0]
            torch.testing.assert_close(packed[first : first + len(alone)], alone, atol=1e-5, rtol=1e-5)
            first += len(alone)


def test_recomputation_does_not_change_loss_or_gradients(model: torch.nn.Module) -> None:
    samples = ragged(6)
    kept = one_step(model, samples, capacity=128, packing=True, micro_batch=2)
    assert_same(kept, one_step(model, samples, capacity=128, packing=True, micro_batch=2, recompute=True))


def test_loss_is_that_of_transformers(model: torch.nn.Module) -> None:
    samples = ragged(1)
    sample = samples[0]
    labels = torch.tensor(np.where(sample.trained, sample.input_ids, -100))[None].long()
    with torch.no_grad():
        theirs = float(model(input_ids=torch.tensor(sample.input_ids)[None].long(), labels=labels).loss)
    ours, _ = one_step(model, samples, capacity=128, packing=False, micro_batch=1)
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_both_losses_agree(model: torch.nn.Module, packing: bool) -> None:
    samples = ragged(8)
    ours = one_step(model, samples, capacity=128, packing=packing, micro_batch=3)
    assert_same(ours, one_step(model, samples, capacity=128, packing=packing, micro_batch=3, loss="hf"))
