"""LoRA on `all-linear` of models whose layers are linear by class only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sartor.job import from_mapping
from sartor.methods import apply

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def _llama4() -> nn.Module:
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(**_SIZES, intermediate_size_mlp=48, head_dim=8, num_local_experts=4, interleave_moe_layer_step=1)
    return Llama4ForCausalLM(config)


def _falcon() -> nn.Module:
    from transformers import FalconConfig, FalconForCausalLM

    sizes: dict[str, Any] = {
        name: size for name, size in _SIZES.items() if "key_value" not in name and "intermediate" not in name
    }
    return FalconForCausalLM(FalconConfig(**sizes))


def _lora(model: nn.Module) -> nn.Module:
    job = from_mapping({"model": "unused", "method": "lora", "data": {"synthetic": {"length": 4}}})
    return apply(model, job, seed=0)


def _layers_with_adapters(model: nn.Module) -> set[str]:
    return {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_parameters() if ".lora_A" in name}


def test_a_router_that_returns_a_pair_gets_no_adapter() -> None:
    torch.manual_seed(0)
    model = _lora(_llama4())
    assert {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"} <= _layers_with_adapters(model)
    assert "router" not in _layers_with_adapters(model)
    loss = model(input_ids=torch.arange(8)[None]).logits.float().logsumexp(-1).sum()
    loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_B" in name)


def test_a_linear_layer_of_the_models_own_class_keeps_its_adapter() -> None:
    assert {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"} <= _layers_with_adapters(_lora(_falcon()))


@pytest.mark.parametrize("make", [_llama4, _falcon])
def test_a_skeleton_gets_the_adapters_of_the_real_model(make: Any) -> None:
    with torch.device("meta"):
        skeleton = make()
    assert _layers_with_adapters(_lora(skeleton)) == _layers_with_adapters(_lora(make()))


def test_a_layer_of_mamba_that_peft_refuses_gets_no_adapter() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    model = _lora(MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=2)))
    assert _layers_with_adapters(model) == {"in_proj", "x_proj", "dt_proj"}
    model(input_ids=torch.arange(8)[None]).logits.float().logsumexp(-1).sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "in_proj.lora_B" in name)


def test_adapters_of_a_skeleton_take_no_memory() -> None:
    with torch.device("meta"):
        skeleton = _falcon()
    job = from_mapping({"model": "unused", "method": "lora", "data": {"synthetic": {"length": 4}}})
    assert all(parameter.is_meta for parameter in apply(skeleton, job, meta=True).parameters())
