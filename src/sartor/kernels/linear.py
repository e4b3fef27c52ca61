"""Linear layers in bfloat16 on a CPU by the products of `matmul.py`.

Where an input has fewer rows than a tile, as when a model answers, the weight is multiplied by the input instead, which takes one
pass over the weight as it lies in memory (`thin.py`).

Shapes: M rows, K input and N output channels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sartor.kernels.matmul import has_tiles, multiplies, multiply, takes
from sartor.kernels.native import apply
from sartor.kernels.prepack import Laid, prepacked
from sartor.kernels.thin import narrow

LEAST_ROWS = 16
"""Of an input; with fewer, laying out the weight is most of the work."""


def linear_of(module: Any) -> Callable[[Tensor], Tensor] | None:
    """A forward for a plain linear layer in bfloat16; None for anything else, and on processors that cannot."""
    if type(module) is not nn.Linear or module.weight.dtype != torch.bfloat16 or not multiplies():
        return None
    return functools.partial(_run, module)


def _run(module: nn.Linear, x: Tensor) -> Tensor:
    weight = module.weight
    usual = x.dtype != torch.bfloat16 or torch.is_autocast_enabled(x.device.type) or not takes(weight)
    if usual or (math.prod(x.shape[:-1]) < LEAST_ROWS and not has_tiles()):
        return nn.Linear.forward(module, x)
    return linear(x, weight, module.bias, prepacked(module))


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, laid: Laid = (None, None)) -> Tensor:
    """x W^T + bias for x … K, all bfloat16. `laid`: the weight as `prepack` lays it out."""
    result: Tensor = apply(_Linear, x, weight_NK, bias_N, *laid)
    return result


def product_with(
    weight_NK: Tensor,
    x_MK: Tensor,
    more: tuple[Tensor, Tensor] | None = None,
    bias_N: Tensor | None = None,
    laid: Tensor | None = None,
) -> Tensor:
    """x W^T + a' b' + bias, `more` being a' (M x R) and b' (R x N). Of few rows what is added is added to what was rounded."""
    few = len(x_MK) < LEAST_ROWS <= len(weight_NK) and weight_NK.stride(1) == 1 and has_tiles()
    if not few:
        return multiply(x_MK, weight_NK.t(), more=more, bias_N=bias_N, laid=laid)
    y_NM = x_MK.new_empty(len(weight_NK), len(x_MK))
    narrow(weight_NK, x_MK.t(), y_NM)
    y_MN = y_NM.t().contiguous()
    if more is not None:
        multiply(*more, y_MN, adds=True)
    return y_MN if bias_N is None else y_MN.add_(bias_N)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_NK: Tensor, bias_N: Tensor | None, forward: Tensor | None, backward: Tensor | None
    ) -> Tensor:
        x_MK = x.reshape(-1, x.shape[-1]).contiguous()
        ctx.save_for_backward(x_MK, weight_NK, backward)
        return product_with(weight_NK, x_MK, bias_N=bias_N, laid=forward).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *given: Any) -> Any:
        x_MK, weight_NK, laid = ctx.saved_tensors
        gradient_MN = given[0].reshape(-1, given[0].shape[-1]).contiguous()
        to_x = multiply(gradient_MN, weight_NK, laid=laid).view(*given[0].shape[:-1], -1) if ctx.needs_input_grad[0] else None
        to_weight_NK = None
        if ctx.needs_input_grad[1]:  # where results are taller than wide PyTorch's products by pairs are faster
            tall = weight_NK.shape[0] > weight_NK.shape[1] and not has_tiles()
            to_weight_NK = torch.mm(gradient_MN.t(), x_MK) if tall else multiply(gradient_MN.t(), x_MK)
        return to_x, to_weight_NK, gradient_MN.sum(0) if ctx.needs_input_grad[2] else None, None, None
