"""The forecast of any module is what the same tracker counts over its real execution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sartor.errors import ModelError
from sartor.predict import StorageTracker, forecast_module
from sartor.predict.module import run_module_steps
from sartor.predict.target import Target


def _cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(16, 10),
    )


def _classify(module: nn.Module, batch: Any) -> Tensor:
    images, labels = batch
    return nn.functional.cross_entropy(module(images), labels)


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(vocab_size=100, **sizes))


def _own_loss(module: nn.Module, batch: Any) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss: Tensor = module(**batch).loss
    return loss


IMAGES = (torch.zeros(4, 3, 32, 32), torch.zeros(4, dtype=torch.long))
TEXTS = {
    "input_ids": torch.ones(3, 17, dtype=torch.long),
    "attention_mask": torch.ones(3, 17, dtype=torch.long),
    "labels": torch.tensor([0, 1, 0]),
}
CASES = [(_cnn, IMAGES, _classify), (_bert, TEXTS, _own_loss)]
OPTIMIZERS = [lambda p: torch.optim.SGD(p, momentum=0.9), lambda p: torch.optim.AdamW(p, foreach=True)]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=["sgd", "adamw"])
@pytest.mark.parametrize(("make", "sample", "loss"), CASES, ids=["cnn", "bert"])
def test_the_forecast_is_the_measurement(make: Callable[[], nn.Module], sample: Any, loss: Any, optimizer: Any) -> None:
    forecast = forecast_module(make, sample, loss, optimizer)
    module, tracker = make(), StorageTracker()
    with tracker:
        run_module_steps(tracker, module, lambda: torch.utils._pytree.tree_map(Tensor.clone, sample), loss, optimizer)
    measured = tracker.ledger.peak()
    assert (forecast.total_bytes, forecast.by_kind) == (measured.total_bytes, measured.by_kind)
    assert forecast.by_kind["optimizer"] > 0


def test_nothing_is_allocated_for_a_large_module() -> None:
    """16 TiB of weights."""
    peak = forecast_module(
        lambda: nn.Linear(2**21, 2**21, bias=False),
        torch.empty(1, 2**21, device="meta"),
        lambda module, batch: module(batch).sum(),
        torch.optim.SGD,
    )
    assert peak.by_kind["weights"] == peak.by_kind["gradients"] == 2**44


def test_a_target_device_has_its_own_scratch_memory() -> None:
    arguments: Any = (
        lambda: nn.Linear(8, 256),
        torch.zeros(64, 8),
        lambda module, batch: module(batch).softmax(-1).sum(),
        torch.optim.SGD,
    )
    on_cpu, on_cuda = forecast_module(*arguments), forecast_module(*arguments, target=Target(kind="cuda", sm=80))
    assert on_cuda.total_bytes > on_cpu.total_bytes, "softmax's backward makes a product first"


def test_a_step_that_asks_for_values_is_refused() -> None:
    def loss(module: nn.Module, batch: Tensor) -> Tensor:
        output: Tensor = module(batch)
        return output.sum() if output.mean().item() > 0 else output.abs().sum()

    with pytest.raises(ModelError, match="cannot be traced") as caught:
        forecast_module(lambda: nn.Linear(4, 4), torch.zeros(2, 4), loss, torch.optim.SGD)
    assert "values" in caught.value.why
