"""A gated MLP as one function (Shazeer 2020, arXiv 2002.05202): y = W (silu(G x) * U x), with adapters or without.

Its products and the gate between them run in one call (`calls.py`), forward and backward, and the gradient of x is summed up
where the products write it. What is kept for backward is what the layers keep by themselves.

Shapes: M rows, K channels of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sartor.kernels.calls import in_one_call
from sartor.kernels.fused import gated, gated_backward
from sartor.kernels.native import apply


def mlp(x: Tensor, of: Any, layers: Sequence[Any]) -> Tensor:
    """`layers`: those of gate, up and down, of the module `of`: `linear`, or `lora` where they have adapters."""
    result: Tensor = apply(_MLP, x, of, of.scales(layers), *of.tensors(layers))
    return result


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, of: Any, scales: Sequence[float], *tensors: Tensor | None) -> Tensor:
        x_MK, layers = x.reshape(-1, x.shape[-1]).contiguous(), of.layers_of(tensors, scales)
        with in_one_call(x_MK, when=of.may_wait(layers, len(x_MK))):
            (gate, up), first = of.compute(layers[:2], x_MK)
            inner = gated(gate, up)
            (y_MK,), last = of.compute(layers[2:], inner)
        ctx.save_for_backward(x_MK, gate, up, inner, *first, *last, *tensors)
        ctx.of, ctx.scales, ctx.kept = of, scales, (len(first), len(last))
        return y_MK.view(*x.shape[:-1], -1)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *given: Any) -> Any:
        x_MK, gate, up, inner, *saved = ctx.saved_tensors
        first, last, tensors = _cut(saved, *ctx.kept)
        layers, wanted = ctx.of.layers_of(tensors, ctx.scales), ctx.needs_input_grad
        half = 3 + len(tensors) // 3 * 2
        gradient = given[0].reshape(-1, given[0].shape[-1]).contiguous()
        with in_one_call(x_MK, when=ctx.of.may_wait(layers, len(x_MK))):
            to_inner, to_last = ctx.of.differentiate(layers[2:], [gradient], inner, last, (True, *wanted[half:]))
            to_both = gated_backward(to_inner, gate, up)
            to_x_MK, to_first = ctx.of.differentiate(layers[:2], to_both, x_MK, first, (wanted[0], *wanted[3:half]))
        return None if to_x_MK is None else to_x_MK.view(*given[0].shape[:-1], -1), None, None, *to_first, *to_last


def _cut(saved: Sequence[Any], first: int, last: int) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    return saved[:first], saved[first : first + last], saved[first + last :]
