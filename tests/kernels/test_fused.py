"""The compiled loops against the same in float64, and models that use them against themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from sartor.kernels import fused
from sartor.kernels.fuse import fuse
from sartor.kernels.native import library

pytestmark = pytest.mark.skipif(library() is None, reason="needs a C++ compiler")

FORMATS = [(torch.float32, 5e-7), (torch.bfloat16, 8e-3)]
"""With the largest error, relative to the largest value: two roundings."""


def _norm(x: Tensor, w: Tensor, offset: float) -> Tensor:
    return (w + offset) * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def assert_like(
    ours: Callable[..., Any], usual: Callable[..., Any], inputs: list[Tensor], dtype: torch.dtype, error: float
) -> None:
    """Values and gradients of both on the same inputs, the usual one in float64."""
    own = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    wide = [tensor.detach().double().requires_grad_() for tensor in own]
    results, references = ours(*own), usual(*wide)
    results = results if isinstance(results, tuple) else (results,)
    references = references if isinstance(references, tuple) else (references,)
    given = [torch.randn(result.shape).to(dtype) for result in results]
    gradients = torch.autograd.grad(results, own, given)
    expected = torch.autograd.grad(references, wide, [tensor.double() for tensor in given])
    for found, right in zip((*results, *gradients), (*references, *expected), strict=True):
        found, right = found.detach(), right.detach()
        assert float((found.double() - right).abs().max() / right.abs().max()) < error


@pytest.mark.parametrize(("dtype", "error"), FORMATS)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("rows", [1, 3, 700])
def test_norm(dtype: torch.dtype, error: float, offset: float, rows: int) -> None:
    torch.manual_seed(rows)
    inputs = [torch.randn(2, rows, 100), torch.randn(100)]
    ours = lambda x, w: fused.rms_norm(x, w, epsilon=1e-6, offset=offset)  # noqa: E731
    assert_like(ours, lambda x, w: _norm(x, w, offset), inputs, dtype, error)


@pytest.mark.parametrize(("dtype", "error"), FORMATS)
def test_gate(dtype: torch.dtype, error: float) -> None:
    torch.manual_seed(0)
    inputs = [torch.linspace(-100, 100, 3001).view(1, -1), torch.randn(1, 3001)]
    assert_like(fused.silu_mul, lambda gate, up: nn.functional.silu(gate) * up, inputs, dtype, error)


@pytest.mark.parametrize(("dtype", "error"), FORMATS)
@pytest.mark.parametrize("angle_rows", [1, 2])
def test_rotary(dtype: torch.dtype, error: float, angle_rows: int) -> None:
    torch.manual_seed(0)
    cosine, sine = (torch.randn(angle_rows, 5, 6).to(dtype) for _ in range(2))
    inputs = [torch.randn(2, 4, 5, 6), torch.randn(2, 5, 2, 6).transpose(1, 2)]
    usual = lambda q, k: apply_rotary_pos_emb(q, k, cosine.double(), sine.double())  # noqa: E731
    assert_like(lambda q, k: fused.rotary(q, k, cosine, sine), usual, inputs, dtype, error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 4])
def test_causal_softmax(dtype: torch.dtype, window: int) -> None:
    torch.manual_seed(0)
    ours = torch.randn(6, 10, 12).to(dtype)
    usual = ours.clone()
    fused.causal_softmax_(ours, 5, 3, window)
    fused._softmax(usual, 5, 3, window)
    torch.testing.assert_close(ours, usual)
    gradient = torch.randn(6, 10, 12).to(dtype)
    expected = torch._softmax_backward_data(gradient.double(), ours.double(), -1, torch.float64)
    fused.softmax_backward_(gradient, ours)
    torch.testing.assert_close(gradient, expected.to(dtype), atol=1e-6 if dtype == torch.float32 else 2e-3, rtol=1e-2)


SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
MODELS = {
    "llama": {"norms": 5, "gates": 2, "rotary positions": 2},
    "qwen3": {"norms": 9, "gates": 2, "rotary positions": 2},
    "gemma2": {"norms": 9, "rotary positions": 2},
    "gpt2": {},
}


@pytest.mark.parametrize("kind", MODELS)
def test_models_compute_the_same(kind: str) -> None:
    torch.manual_seed(0)
    size = (
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 60}
        if kind == "gpt2"
        else {**SHAPE, "num_key_value_heads": 2, "head_dim": 8}
    )
    config = AutoConfig.for_model(kind, **size, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()  # no dropout
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    other = copy.deepcopy(model)
    assert {part: count for part, count in fuse(other).items() if part != "linear layers"} == MODELS[kind]
    results = []
    for each in (model, other, copy.deepcopy(other)):
        loss = each(input_ids=torch.arange(40).view(2, 20), labels=torch.arange(40).view(2, 20), use_cache=False).loss
        loss.backward()
        results.append((loss, [parameter.grad for parameter in each.parameters()]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[2], results[1])


class _Halved(nn.Module):
    """A norm that is not quite one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(4)), 1e-6

    def forward(self, hidden_states: Tensor) -> Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True) / 2
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


def test_code_that_is_not_known_stays() -> None:
    assert fuse(nn.Sequential(_Halved())) == {}
