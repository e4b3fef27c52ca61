"""The head found in real models, and the loss computed with it: what the model's own logits give."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from sartor.data.pack import Batch, collate
from sartor.data.tokens import Sample, TokenSet
from sartor.job import from_mapping
from sartor.methods import apply
from sartor.step import SumLoss, TensorBatch
from sartor.step.head import Unreadable, find_head

SIZES = {
    "vocab_size": 320, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
    "num_hidden_layers": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def model_of(kind: str, *, device: str = "cpu", **changes: Any) -> nn.Module:
    torch.manual_seed(3)
    with torch.device(device):
        model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **changes}))
    return model.eval()


def batch() -> Batch:
    random = np.random.default_rng(5)
    samples = TokenSet.from_samples(
        [
            Sample(input_ids=random.integers(3, 320, length), trained=random.random(length) < 0.5, source="test")
            for length in (20, 31, 9)
        ]
    )
    return collate(samples, [[0], [1], [2]], pad_id=0, packing=False)


def loss_and_gradients(model: nn.Module, loss: SumLoss) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    value = loss(model, TensorBatch.of(batch(), "cpu"), factor=0.1)
    value.backward()
    return float(value.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_as_by_logits(model: nn.Module) -> None:
    together, apart = SumLoss(model), SumLoss(model, device_kind="cuda")
    assert not together.apart
    value, gradients = loss_and_gradients(model, together)
    wanted, of_logits = loss_and_gradients(model, apart)
    assert value == pytest.approx(wanted, rel=1e-5)
    assert gradients.keys() == of_logits.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, of_logits[name], rtol=1e-4, atol=1e-6)


CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "plain": ("llama", {}, ""),
    "tied": ("llama", {"tie_word_embeddings": True}, ""),
    "bias": ("phi", {}, ""),
    "scaled": ("cohere", {}, "times 0.0625"),
    "divided": ("granite", {"logits_scaling": 8.0}, "times 0.125"),
    "capped": ("gemma2", {"final_logit_softcapping": 2.0, "head_dim": 8}, "capped at 2"),
    "no logits_to_keep": ("ctrl", {"n_embd": 32, "n_head": 4, "n_layer": 2, "dff": 48, "n_positions": 64}, ""),
}


@pytest.mark.parametrize("case", CASES)
def test_the_head_is_read_off_the_model_and_gives_the_models_loss(case: str) -> None:
    kind, changes, said = CASES[case]
    model = model_of(kind, **changes)
    assert find_head(model).finish.describe() == find_head(model_of(kind, device="meta", **changes)).finish.describe() == said
    assert_as_by_logits(model)


@pytest.mark.parametrize("method", ["lora", "prefix", "prompt"])
def test_adapters_get_the_same_gradients(method: str) -> None:
    job = from_mapping({"model": "unused", "data": "unused", "method": method, "prefix": {"length": 4}, "prompt": {"length": 4}})
    assert_as_by_logits(apply(model_of("llama"), job, seed=0))


def test_a_head_with_an_adapter_is_left_to_the_model() -> None:
    lora = {"peft_type": "LORA", "target_modules": ["lm_head", "q_proj"], "init_lora_weights": False}
    job = from_mapping({"model": "unused", "data": "unused", "method": "peft", "peft": lora})
    model = apply(model_of("llama"), job, seed=0)
    loss = SumLoss(model)
    assert "no plain linear layer" in loss.apart
    assert loss_and_gradients(model, loss)[0] == loss_and_gradients(model, SumLoss(model, device_kind="cuda"))[0]


def test_logits_that_are_more_than_scaled_are_left_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    original = modeling_llama.LlamaForCausalLM.forward

    def shifted(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        output.logits = output.logits + 1.0
        return output

    model = model_of("llama")
    monkeypatch.setattr(modeling_llama.LlamaForCausalLM, "forward", shifted)
    with pytest.raises(Unreadable, match="add is done to its logits"):
        find_head(model)


def test_a_model_without_a_head_is_said() -> None:
    loss = SumLoss(nn.Linear(3, 3))
    assert "no layers" in loss.apart


def test_a_pass_leaves_no_hooks_behind() -> None:
    model = model_of("llama")
    loss_and_gradients(model, SumLoss(model))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert model(input_ids=torch.zeros(1, 3, dtype=torch.int64)).logits.shape == (1, 3, 320)
