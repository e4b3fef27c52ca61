"""Positions without a target are left out of the last block's MLP, and nothing else changes."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaModel

from sartor.data.pack import step_batches
from sartor.data.tokens import Sample, TokenSet
from sartor.job import from_mapping
from sartor.kernels import native
from sartor.kernels.attention import NAME, register
from sartor.kernels.fuse import watching
from sartor.step import Precision, SumLoss, TensorBatch, make_step, make_trainable
from sartor.step.head import last_block

pytestmark = pytest.mark.skipif(native.library() is None, reason="there is no C++ compiler")

SIZES = {
    "vocab_size": 320, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48,
    "num_hidden_layers": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def model_of(kind: str, **changes: Any) -> Any:
    register()
    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, **{**SIZES, **changes}, attn_implementation=NAME)
    return AutoModelForCausalLM.from_config(config).eval()


def samples(share: float = 0.4) -> TokenSet:
    """All begin with the same ten tokens, which do not train."""
    random = np.random.default_rng(5)
    made = []
    for length in (30, 41, 19, 64):
        ids = random.integers(3, 320, length)
        trained = random.random(length) < share
        ids[:10], trained[:11] = np.arange(3, 13), False
        made.append(Sample(input_ids=ids, trained=trained, source="test"))
    return TokenSet.from_samples(made)


class Seen(list[int]):
    """Positions that the MLP of each block was given."""

    def watch(self, model: nn.Module) -> None:
        for module in model.modules():
            if type(module).__name__.endswith("MLP"):
                module.register_forward_pre_hook(watching(lambda _, given: self.append(given[0].shape[:-1].numel())))


def one_step(
    model: Any, data: TokenSet, *, method: str = "full", recompute: bool = False, **cut: Any
) -> tuple[dict[str, Tensor], Seen]:
    """The loss and all gradients of a step, and what the MLPs were given."""
    job = from_mapping({"model": "unused", "data": "unused", "method": method, "training": {"clip_norm": 0}})
    precision = Precision.of("float32")
    torch.manual_seed(7)
    made = make_trainable(copy.deepcopy(model), job, precision, recompute=recompute)
    if method == "lora":
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    seen = Seen()
    seen.watch(made)
    step = make_step(made, job, precision, device_kind="cpu")
    batches = step_batches(data, np.arange(len(data)), pad_id=0, **({"capacity": 256, "packing": True, "micro_batch": 4} | cut))
    made.train()
    found = step.backward([TensorBatch.of(batch, "cpu") for batch in batches], int(data.trained_counts.sum()))
    gradients = {name: parameter.grad for name, parameter in step.parameters.items() if parameter.grad is not None}
    return {"loss": sum(found.losses), **gradients}, seen  # type: ignore[dict-item]


def assert_alike(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, one in wanted.items():
        assert (found[name] - one).norm() <= 1e-5 * one.norm(), name


CUTS: dict[str, dict[str, Any]] = {
    "packed": {},
    "padded": {"packing": False},
    "recomputed": {"recompute": True},
    "shared beginnings": {"share": True},
}


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("cut", CUTS)
def test_the_step_is_the_same(method: str, cut: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = model_of("llama"), samples()
    found, seen = one_step(model, data, method=method, **CUTS[cut])
    monkeypatch.setattr("sartor.step.loss.last_block", lambda _: None)
    wanted, all_of_them = one_step(model, data, method=method, **CUTS[cut])
    assert_alike(found, wanted)
    trained = int(data.trained_counts.sum())
    first, last, *again = seen
    assert (last, first) == (trained, all_of_them[0])
    assert trained < first == all_of_them[1]
    assert again == ([last, first] if cut == "recomputed" else [])


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_models_whose_code_is_known(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = model_of(kind), samples()
    assert last_block(model) is model.model.layers[-1]
    found, seen = one_step(model, data)
    assert seen[1] < seen[0]
    monkeypatch.setattr("sartor.step.loss.last_block", lambda _: None)
    assert_alike(found, one_step(model, data)[0])


@pytest.mark.parametrize("kind", ["gemma2", "olmo2", "glm4", "cohere"])
def test_others_compute_all_positions(kind: str) -> None:
    model, data = model_of(kind, attn_logit_softcapping=None), samples()
    found, seen = one_step(model, data)
    assert len(set(seen)) == 1
    apart = SumLoss(model, device_kind="cuda")
    batches = step_batches(data, np.arange(len(data)), pad_id=0, capacity=256, packing=True, micro_batch=4)
    with torch.no_grad():
        wanted = sum(float(apart(model, TensorBatch.of(batch, "cpu"))) for batch in batches)
    assert float(found["loss"]) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("share", [0.02, 1.0])
def test_few_positions_or_nearly_all(share: float) -> None:
    data = (
        samples(share)
        if share < 1
        else TokenSet.from_samples([Sample(input_ids=np.arange(3, 60), trained=np.ones(57, dtype=bool), source="test")])
    )
    _, seen = one_step(model_of("llama"), data)
    assert len(set(seen)) == 1


def test_a_model_that_does_more_after_its_blocks() -> None:
    class Mixing(LlamaModel):
        def forward(self, *args: Any, **named: Any) -> Any:
            answer = super().forward(*args, **named)
            answer.last_hidden_state = F.pad(answer.last_hidden_state, (0, 0, 1, 0))[:, :-1]
            return answer

    model = model_of("llama")
    model.model.__class__ = Mixing
    assert last_block(model) is None


def test_a_module_that_somebody_listens_to_is_given_all() -> None:
    model, data = model_of("llama"), samples()
    given: list[int] = []
    model.model.layers[-1].mlp.register_forward_hook(lambda _, inputs, __: given.append(inputs[0].shape[:-1].numel()))
    _, seen = one_step(model, data)
    assert given == [seen[0]]
