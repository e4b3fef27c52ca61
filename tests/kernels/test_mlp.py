"""A block's gated MLP, with its norm and what it is added to, as one function."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from matrices import FORMAT, OURS
from sartor.kernels import fuse as module
from sartor.kernels import linear, lora
from sartor.kernels.fuse import fuse, unfuse, watching
from sartor.kernels.linear import enough
from sartor.kernels.matmul import has_tiles
from sartor.step.step import enable_recompute

pytestmark = OURS

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}


def llama(method: str, dtype: torch.dtype = FORMAT, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A model, and the same as transformers has it."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SIZES | options))
    if method == "lora":
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    model = model.to(dtype).train()
    return model, copy.deepcopy(model)


def gradients(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    logits = model(input_ids=tokens, use_cache=False).logits
    (logits.float() ** 2).mean().backward()
    made = {name: parameter.grad.float() for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"logits": logits.detach().float(), **made}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of every call of the function, whether it had the norm."""
    calls: list[bool] = []
    computed = module.mlp
    monkeypatch.setattr(module, "mlp", lambda *args: calls.append(len(args) > 3) or computed(*args))
    return calls


def is_whole(method: str, *, bias: bool = False) -> bool:
    """Whether the norm and the sum are part of the function."""
    return method == "lora" or (not bias and (has_tiles() or torch.float32 == FORMAT))


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("rows", [5, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_it_is_what_the_model_computes(method: str, rows: int, bias: bool, seen: list[bool]) -> None:
    model, usual = llama(method, mlp_bias=bias)
    assert fuse(model)
    tokens = torch.randint(50, (1, rows))
    found, wanted = gradients(model, tokens), gradients(usual, tokens)
    whole = rows == 40 and is_whole(method, bias=bias)
    ours = method == "lora" or enough(rows, FORMAT)
    assert seen == ([whole, whole] if ours else [])
    assert found.keys() == wanted.keys()
    for name, one in wanted.items():
        assert (found[name] - one).norm() <= 6e-2 * one.norm(), name
    unfuse(model)
    assert not any("forward" in vars(part) for part in model.modules())


@pytest.mark.skipif(torch.bfloat16 != FORMAT, reason="this processor's products are in float32")
def test_it_is_nearer_to_float32_than_the_model_in_bfloat16() -> None:
    model, usual = llama("full")
    exact = copy.deepcopy(usual).float()
    fuse(model)
    tokens = torch.randint(50, (2, 30))
    found, wanted, right = (gradients(one, tokens) for one in (model, usual, exact))
    off, usually_off = (
        sum(float((one[name] - right[name]).norm() / right[name].norm()) for name in right) for one in (found, wanted)
    )
    assert off < 1.05 * usually_off


@pytest.mark.parametrize("place", ["mlp", "mlp.down_proj", "post_attention_layernorm"])
def test_a_module_with_a_hook_is_called(place: str, seen: list[bool]) -> None:
    model, usual = llama("full", num_hidden_layers=1)
    fuse(model)
    called: list[str] = []
    layer: Any = model.model.layers[0]  # type: ignore[union-attr]
    layer.get_submodule(place).register_forward_hook(lambda *_: called.append(place))
    found, wanted = (gradients(one, torch.arange(40)[None]) for one in (model, usual))
    assert (found["logits"] - wanted["logits"]).norm() <= 3e-2 * wanted["logits"].norm()
    assert called == [place]
    assert True not in seen


def test_one_that_only_watches_changes_nothing(seen: list[bool]) -> None:
    model, _ = llama("lora", num_hidden_layers=1)
    fuse(model)
    for part in model.modules():
        part.register_forward_hook(watching(lambda *_: None))
    gradients(model, torch.arange(40)[None])
    assert seen == [True]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_block_is_recomputed_but_for_its_last_product(method: str, seen: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    model, kept = llama(method)
    for one in (model, kept):
        fuse(one)
    products: list[tuple[int, ...]] = []
    computed = linear.product_with

    def noted(weight: torch.Tensor, *args: Any, **named: Any) -> torch.Tensor:
        products.append(weight.shape)
        return computed(weight, *args, **named)

    for where in (linear, lora):
        monkeypatch.setattr(where, "product_with", noted)
    enable_recompute(model)
    tokens = torch.arange(40)[None]
    found = gradients(model, tokens)
    assert seen == [is_whole(method)] * 4  # two blocks, and both again
    assert products.count((96, 64)) == 4 * 2  # gate and up
    assert products.count((64, 96)) == 2
    wanted = gradients(kept, tokens)
    assert found.keys() == wanted.keys()
    for name, one in wanted.items():
        assert torch.equal(found[name], one), name


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("how", ["to its end", "by the old function", "with what follows"])
def test_one_that_is_recomputed_and_used(method: str, how: str, seen: list[bool]) -> None:
    model, kept = llama(method, num_hidden_layers=1)
    for one in (model, kept):
        fuse(one)
    block, usual = (next(part for part in one.modules() if isinstance(part, LlamaDecoderLayer)) for one in (model, kept))
    torch.manual_seed(1)
    x_BLK = torch.randn(1, 40, 64, dtype=FORMAT)
    angles_BLK = torch.randn(1, 40, 16, dtype=FORMAT)

    def compute(one: nn.Module, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = one(x, position_embeddings=(angles_BLK.cos(), angles_BLK.sin()))
        return made.sin() if how == "with what follows" else made

    found, wanted = (x_BLK.clone().requires_grad_() for _ in range(2))
    with set_checkpoint_early_stop(how != "to its end"):
        checkpoint(compute, block, found, use_reentrant=how == "by the old function").square().sum().backward()
    compute(usual, wanted).square().sum().backward()
    assert seen == [is_whole(method)] * 3
    assert torch.equal(found.grad, wanted.grad)
    for one, other in zip(block.parameters(), usual.parameters(), strict=True):
        assert one.grad is other.grad is None or torch.equal(one.grad, other.grad)
