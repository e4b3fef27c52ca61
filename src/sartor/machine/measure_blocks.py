"""What an operator takes in a model beside its work: the Python and the modules around it, measured with a small decoder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sartor.machine.clock import Clock
from sartor.machine.operands import noise

AsRun = Callable[[nn.Module, int], contextlib.AbstractContextManager[bool]]
"""Within it a model computes rows of so many tokens with the kernels that jobs use; whether there are any."""


class _Count(TorchDispatchMode):
    """Counts operators that do work, and views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators = self.views = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.is_view or func is torch.ops.aten._unsafe_view.default:
            self.views += 1
        else:
            self.operators += 1
        return func(*args, **(kwargs or {}))


def block_operators(clock: Clock, view_seconds: tuple[float, float]) -> tuple[float, float]:
    """Seconds of an operator among those of a decoder's blocks, forward and backward; views are counted by themselves."""
    return _of_blocks(clock, view_seconds, _small_decoder())


def compiled_block_operators(
    clock: Clock, view_seconds: tuple[float, float], as_run: AsRun | None
) -> tuple[float, float] | tuple[None, None]:
    """The same with Sartor's own kernels, where there are any."""
    if as_run is None or clock.device.type != "cpu":
        return None, None
    model = _small_decoder()
    with as_run(model, _TOKENS) as compiled:
        return _of_blocks(clock, view_seconds, model) if compiled else (None, None)


_TOKENS, _LAYERS, _WIDTH, _INNER = 48, 4, 96, 256


def _small_decoder() -> nn.Module:
    """transformers' Llama, so small that most of what it takes is Python, modules and autograd."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": _WIDTH, "intermediate_size": _INNER, "num_attention_heads": 2, "num_key_value_heads": 2}
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=_LAYERS, vocab_size=16))
    return model


def _of_blocks(clock: Clock, view_seconds: tuple[float, float], model: nn.Module) -> tuple[float, float]:
    """What a pass of the model takes beyond views, and beyond its products where nothing is between them; an operator's share."""
    tokens = torch.zeros(1, _TOKENS, dtype=torch.int64)
    weights = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "layers." in name]
    inputs = {size: noise(_TOKENS, size) for size in (_WIDTH, _INNER)}

    def forward() -> Tensor:
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
        return logits.sum()

    trained = list(model.parameters())

    def both() -> None:
        forward().backward()
        for weight in trained:
            weight.grad = None

    @torch.no_grad()
    def products() -> None:
        for weight in weights:
            F.linear(inputs[weight.shape[1]], weight)

    @torch.no_grad()
    def backward_products() -> None:
        for weight in weights:
            gradient = inputs[weight.shape[0]]
            torch.mm(gradient, weight)
            torch.mm(gradient.t(), inputs[weight.shape[1]])

    with _Count() as going:
        end = forward()
    with _Count() as back:
        end.backward()
    shares = []
    ahead = clock.seconds(forward, budget=0.3)
    behind = max(clock.seconds(both, budget=0.4) - ahead, ahead / 4)  # with freeing what forward kept
    passes = (ahead, products, going), (behind, backward_products, back)
    for (taken, part, count), view in zip(passes, view_seconds, strict=True):
        rest = taken - clock.seconds(part, budget=0.3) - count.views * view
        shares.append(max(rest, taken / 4) / count.operators)
    return shares[0], shares[1]
