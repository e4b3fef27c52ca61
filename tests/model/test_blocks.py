"""Blocks, embeddings and head are found by structure, for every architecture that transformers knows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sartor.errors import ModelError
from sartor.job.schema import ModelJob
from sartor.model import check_trainable, dissect, resolve, skeleton


def test_a_small_llama(tiny: Path) -> None:
    source = resolve(ModelJob(path=str(tiny)))
    anatomy = dissect(skeleton(source, dtype=torch.float32))
    (stack,) = anatomy.stacks
    assert (stack.path, stack.count, stack.kinds) == ("model.layers", 2, ("LlamaDecoderLayer",))
    assert stack.block_paths() == ["model.layers.0", "model.layers.1"]
    assert (anatomy.embeddings, anatomy.head, anatomy.tied) == ("model.embed_tokens", "lm_head", True)
    assert source.max_positions == 128


def test_any_module_with_blocks() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
            self.body = nn.ModuleList(Block() for _ in range(5))

    anatomy = dissect(Net())
    assert [(stack.path, stack.count) for stack in anatomy.stacks] == [("body", 5)]
    assert anatomy.embeddings is None
    assert anatomy.head is None


@pytest.mark.shared
def test_every_real_configuration(shared: Callable[[str], Path]) -> None:
    """The main stack has as many blocks as the configuration says there are layers, for every family, and within it for every
    set of keys: of those that differ in numbers alone, the one with the fewest layers."""
    fewest: dict[Any, tuple[int, Path]] = {}
    for path in sorted(shared("configs").rglob("*.json")):
        keys = json.loads(path.read_text(encoding="utf-8"))
        told = int(keys.get("num_hidden_layers") or keys.get("n_layer") or 0), path
        alike = keys.get("model_type"), frozenset(keys)
        fewest[alike] = min(fewest.get(alike, told), told)
    checked = 0
    for _, path in fewest.values():
        try:
            source = resolve(ModelJob(path=str(path)))
            model = skeleton(source, dtype=torch.bfloat16)
        except ModelError:
            continue  # brings code of its own, or is of a kind that transformers does not know
        anatomy = dissect(model)
        layers = source.config.get_text_config().num_hidden_layers
        assert anatomy.main_stack is not None, path
        assert anatomy.main_stack.count == layers, path
        assert anatomy.embeddings is not None, path
        checked += 1
    assert checked >= 80


@pytest.mark.shared
def test_encoders_are_planned_for_but_not_trained(shared: Callable[[str], Path]) -> None:
    source = resolve(ModelJob(path=str(shared("configs/bert/bert-base-uncased.json"))))
    assert dissect(skeleton(source, dtype=torch.float32)).main_stack is not None
    with pytest.raises(ModelError, match="no decoder"):
        check_trainable(source)
