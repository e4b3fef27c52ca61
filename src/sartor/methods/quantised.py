"""PEFT's LoRA layers beside quantised weights, for the forecast: they do what peft/tuners/lora/bnb.py does, on our stand-ins."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor

from sartor.model import quantised


class Linear4bit(Linear):  # type: ignore[misc]
    """`peft.tuners.lora.bnb.Linear4bit`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = self.base_layer(x)
        result = result.clone()
        return _with_adapters(self, x, result)


class Linear8bitLt(Linear):  # type: ignore[misc]
    """`peft.tuners.lora.bnb.Linear8bitLt`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _with_adapters(self, x, self.base_layer(x))


def register(config: Any) -> None:
    """Have PEFT put these layers around the stand-ins."""
    config._register_custom_module({quantised.Linear4bit: Linear4bit, quantised.Linear8bitLt: Linear8bitLt})


def _with_adapters(layer: Any, x: Tensor, result: Tensor) -> Tensor:
    for adapter in layer.active_adapters:
        if adapter not in layer.lora_A:
            continue
        lora_A, lora_B = layer.lora_A[adapter], layer.lora_B[adapter]
        converts = not _peft_sees_autocast(layer.base_layer.kind)
        expected = result.dtype
        if converts:
            x = layer._cast_input_dtype(x, lora_A.weight.dtype)
        output = lora_B(lora_A(layer.lora_dropout[adapter](x))) * layer.scaling[adapter]
        if converts:
            output = output.to(expected)
        result = result + output
    return result


def _peft_sees_autocast(kind: str) -> bool:
    """PEFT asks whether autocast is on for CUDA, also on a CPU. The trace of a CUDA step has the CPU's on instead."""
    return torch.is_autocast_enabled("cpu" if kind == "cuda" else "cuda")
