"""A tiny model, three steps of ragged examples, and the steps of a job: plain or placed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from sartor.data.pack import step_batches
from sartor.data.tokens import Sample, TokenSet
from sartor.job import from_mapping
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


def make(
    model: nn.Module, *, method: str, mode: str, recompute: bool = False, rounding: str = "nearest", **training: Any
) -> TrainStep:
    job = from_mapping({"model": "unused", "data": "unused", "method": method, "training": training, "lora": {"rank": 4}})
    precision = dataclasses.replace(Precision.of(mode), rounding=rounding)
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
