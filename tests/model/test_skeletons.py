"""Skeletons are built once for a plan: read whole, and copied where they are shortened."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from sartor.model import ModelSource, outline, short_skeleton, skeleton
from sartor.model.regions import reduce_depth

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 100}


@pytest.fixture
def source() -> ModelSource:
    config = AutoConfig.for_model("llama", num_hidden_layers=12, tie_word_embeddings=True, **SIZES)
    return ModelSource(path="llama", config=config, has_weights=False)


def look(model: Any) -> list[tuple[str, tuple[int, ...], torch.dtype, bool]]:
    return [(name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in model.named_parameters()]


def test_a_skeleton_has_the_parameters_ties_and_buffers_of_the_model(source: ModelSource) -> None:
    from transformers import AutoModelForCausalLM

    model, own = AutoModelForCausalLM.from_config(source.config, dtype=torch.bfloat16), skeleton(source, dtype=torch.bfloat16)
    assert look(own) == look(model)
    assert [name for name, _ in own.named_buffers()] == [name for name, _ in model.named_buffers()]
    assert own.lm_head.weight is own.model.embed_tokens.weight  # type: ignore[union-attr]
    assert all(parameter.is_meta for parameter in own.parameters())


def test_everybody_reads_the_same_outline(source: ModelSource) -> None:
    whole = outline(source, dtype=torch.float32)
    assert outline(source, dtype=torch.float32) is whole
    assert outline(source, dtype=torch.bfloat16) is not whole
    assert look(whole) == look(skeleton(source, dtype=torch.float32))


def test_a_short_skeleton_is_the_callers_own(source: ModelSource) -> None:
    expected = skeleton(source, dtype=torch.float32)
    cut = reduce_depth(expected)
    first, reduction = short_skeleton(source, dtype=torch.float32)
    for layer in first.model.layers:  # type: ignore[union-attr]
        layer.mlp = torch.nn.Linear(2, 3)
    first.requires_grad_(False)
    second, again = short_skeleton(source, dtype=torch.float32)
    assert look(second) == look(expected)
    assert second.config.num_hidden_layers == expected.config.num_hidden_layers == 5  # type: ignore[union-attr]
    assert second.lm_head.weight is second.model.embed_tokens.weight  # type: ignore[union-attr]
    assert [layer for layers in again.units.values() for layer in layers] == list(second.model.layers)  # type: ignore[arg-type,union-attr]
    assert again.regions == reduction.regions == cut.regions
    assert again.pattern == cut.pattern


def test_what_cannot_be_copied_is_built_again(source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Any) -> Any:
        raise TypeError("cannot pickle '_thread.lock' object")

    monkeypatch.setattr("sartor.model.skeletons.copy", SimpleNamespace(deepcopy=refuse))
    one, other = (short_skeleton(source, dtype=torch.float32)[0] for _ in range(2))
    assert one is not other
    assert look(one) == look(other)


def test_skeletons_go_with_their_source(source: ModelSource) -> None:
    from sartor.model.skeletons import _KEPT

    outline(source, dtype=torch.float32)
    assert source in _KEPT
    gc.collect()
    before = len(_KEPT)
    copy = ModelSource(path="llama", config=source.config, has_weights=False)
    short_skeleton(copy, dtype=torch.float32)
    assert len(_KEPT) == before + 1
    del copy
    gc.collect()
    assert len(_KEPT) == before
