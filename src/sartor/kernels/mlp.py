"""A gated MLP as one function (Shazeer 2020, arXiv 2002.05202): y = W (silu(G x) * U x), with adapters or without; or the second
half of a decoder's block, y = x + MLP(norm(x)).

All loops of it run in one call (`calls.py`), forward and backward, and what is summed up is summed where products write it. What
is kept for backward is what the layers keep by themselves. Where a backward pass computes it again, the last product is left out.

Shapes: M rows, K channels of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sartor.kernels.calls import in_one_call
from sartor.kernels.fused import gated, gated_backward, norm, norm_backward
from sartor.kernels.native import apply, is_computed_again, keep


class Norm(NamedTuple):
    """What `fused.rms_norm` takes beside x."""

    weight_K: Tensor
    epsilon: float
    offset: float


def mlp(x: Tensor, of: Any, layers: Sequence[Any], before: Norm | None = None) -> Tensor:
    """`layers`: those of gate, up and down, of the module `of`: `linear`, or `lora` where they have adapters. `before`: the norm
    of a block's half, which is added to its input; only where the layers `may_wait`."""
    weight_K, *numbers = before or (None,)
    result: Tensor = apply(_MLP, x, weight_K, numbers, of, of.scales(layers), *of.tensors(layers))
    return result


_BESIDE = 5
"""Arguments of the function before the layers' tensors."""


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_K: Tensor | None,
        numbers: Sequence[float],
        of: Any,
        scales: Sequence[float],
        *tensors: Tensor | None,
    ) -> Tensor:
        x_MK, layers = x.reshape(-1, x.shape[-1]).contiguous(), of.layers_of(tensors, scales)
        whole = weight_K is not None
        made: Sequence[Tensor] = ()
        with in_one_call(x_MK, when=of.may_wait(layers, len(x_MK))):
            z_MK, inverse_M = norm(x_MK, weight_K, *numbers) if whole else (x_MK, None)
            (gate, up), first = of.compute(layers[:2], z_MK)
            inner = gated(gate, up)
            last = of.kept_of(layers[2:], inner) if is_computed_again() else None
            if last is None:
                made, last = of.compute(layers[2:], inner, x_MK.clone() if whole else None)
        saved = weight_K, x_MK if whole else None, inverse_M, z_MK, gate, up, inner, *first, *last, *tensors
        ctx.of, ctx.scales, ctx.kept, ctx.numbers = of, scales, (len(first), len(last)), numbers
        if made:
            ctx.keeper = None
            ctx.save_for_backward(*saved)
        else:
            ctx.keeper = keep(*saved)
            made, _ = of.compute(layers[2:], inner, x_MK.clone() if whole else None, last)
        return made[0].view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *given: Any) -> Any:
        weight_K, x_MK, inverse_M, z_MK, gate, up, inner, *saved = (ctx.keeper or ctx).saved_tensors
        of, wanted = ctx.of, ctx.needs_input_grad
        first, last, tensors = _cut(saved, *ctx.kept)
        layers, half = of.layers_of(tensors, ctx.scales), _BESIDE + len(tensors) // 3 * 2
        gradient_MK = given[0].reshape(-1, given[0].shape[-1]).contiguous()
        into, to_weight_K = wanted[0] or wanted[1], None
        with in_one_call(z_MK, when=of.may_wait(layers, len(z_MK))):
            to_inner, to_last = of.differentiate(layers[2:], [gradient_MK], inner, last, (True, *wanted[half:]))
            to_both = gated_backward(to_inner, gate, up)
            to_x_MK, to_first = of.differentiate(layers[:2], to_both, z_MK, first, (into, *wanted[_BESIDE:half]))
            if into and weight_K is not None:
                offset = ctx.numbers[1]
                to_x_MK, to_weight_K = norm_backward(to_x_MK, x_MK, weight_K, inverse_M, offset, wanted[1], gradient_MK)
        to_x = None if to_x_MK is None else to_x_MK.view(*given[0].shape[:-1], -1)
        return to_x, to_weight_K if wanted[1] else None, None, None, None, *to_first, *to_last


def _cut(saved: Sequence[Any], first: int, last: int) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    return saved[:first], saved[first : first + last], saved[first + last :]
