"""Random weights that are made when their turn comes are those of a model that is made at once."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig

from sartor.model import ModelSource, build, build_lazily
from sartor.model.lazy import SMALLEST, LazyWeights

KINDS = {
    "llama": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "mixtral": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    config = AutoConfig.for_model(kind, vocab_size=200, **KINDS[kind])
    source = ModelSource(path="", config=config, has_weights=False)
    whole = build(source, dtype=dtype, device="cpu", seed=3)
    after = torch.get_rng_state()
    lazy, weights = build_lazily(source, dtype=dtype, seed=3)
    assert torch.equal(torch.get_rng_state(), after), "what is random later stays the same"
    large = [parameter for parameter in lazy.parameters() if parameter.nbytes >= SMALLEST]
    there = [parameter for parameter in large if parameter.untyped_storage().nbytes()]
    assert large
    assert len(there) <= len(large) // 4, "most take no memory yet"
    for (name, wanted), parameter in reversed(list(zip(whole.named_parameters(), lazy.parameters(), strict=True))):
        weights.fill(parameter)
        assert torch.equal(wanted, parameter), name


def test_what_is_read_on_the_way_is_there() -> None:
    torch.manual_seed(0)
    wanted = torch.nn.init.orthogonal_(torch.empty(64, 64)) * 2
    torch.manual_seed(0)
    with LazyWeights():
        got = torch.nn.init.orthogonal_(torch.empty(64, 64)) * 2
        padded = torch.nn.Embedding(64, 32, padding_idx=1).weight
        assert float(padded.detach()[1].abs().sum()) == 0
    assert torch.equal(wanted, got)
