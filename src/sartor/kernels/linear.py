"""Linear layers on a CPU by the products of `matmul.py`.

Where an input has fewer rows than a tile, as when a model answers, the weight is multiplied by the input instead, which takes one
pass over the weight as it lies in memory (`thin.py`).

Shapes: M rows, K input and N output channels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sartor.kernels.calls import in_one_call
from sartor.kernels.matmul import has_tiles, multiplies, multiply, takes
from sartor.kernels.native import apply
from sartor.kernels.prepack import Laid, prepacked
from sartor.kernels.thin import narrow

LEAST_ROWS = 16
"""Of an input; with fewer, laying out the weight is most of the work."""


def linear_of(module: Any) -> Callable[[Tensor], Tensor] | None:
    """A forward for a plain linear layer; None for anything else, and where products of its format are not ours."""
    if type(module) is not nn.Linear or not multiplies(module.weight.dtype):
        return None
    return functools.partial(run, module)


def run(module: nn.Linear, x: Tensor) -> Tensor:
    layer = ready(module, x)
    return nn.Linear.forward(module, x) if layer is None else linears(x, [layer])[0]


def ready(module: nn.Linear, x: Tensor) -> Layer | None:
    """The module's weights, where its products are ours for this input."""
    weight = module.weight
    usual = x.dtype != weight.dtype or torch.is_autocast_enabled(x.device.type) or not takes(weight)
    if usual or not enough(math.prod(x.shape[:-1]), x.dtype):
        return None
    return Layer(weight, module.bias, *prepacked(module))


def enough(rows: int, dtype: torch.dtype) -> bool:
    """Whether our products are for inputs of so many rows: of few, where weights can be read as they lie."""
    return rows >= LEAST_ROWS or has_tiles() or dtype == torch.float32


class Layer(NamedTuple):
    """A linear layer; its weight as `prepack` lays it out, for either pass."""

    weight_NK: Tensor
    bias_N: Tensor | None = None
    forward: Tensor | None = None
    backward: Tensor | None = None


_TENSORS = len(Layer._fields)


def linears(x: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """x W^T + bias of each layer, for x … K; all of one format."""
    result: tuple[Tensor, ...] = apply(_Linears, x, *tensors(layers))
    return result


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, laid: Laid = (None, None)) -> Tensor:
    """`linears` of one. `laid`: the weight as `prepack` lays it out."""
    return linears(x, [Layer(weight_NK, bias_N, *laid)])[0]


def product_with(
    weight_NK: Tensor,
    x_MK: Tensor,
    more: tuple[Tensor, Tensor] | None = None,
    bias_N: Tensor | None = None,
    laid: Tensor | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """x W^T + a' b' + bias, `more` being a' (M x R) and b' (R x N). Of few rows what is added is added to what was rounded.
    `into`: what it is added to, of many rows."""
    few = len(x_MK) < LEAST_ROWS <= len(weight_NK) and weight_NK.stride(1) == 1 and has_tiles()
    if not few:
        return multiply(x_MK, weight_NK.t(), into, more=more, bias_N=bias_N, adds=into is not None, laid=laid)
    assert into is None
    y_NM = x_MK.new_empty(len(weight_NK), len(x_MK))
    narrow(weight_NK, x_MK.t(), y_NM)
    y_MN = y_NM.t().contiguous()
    if more is not None:
        multiply(*more, y_MN, adds=True)
    return y_MN if bias_N is None else y_MN.add_(bias_N)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *of: Tensor | None) -> tuple[Tensor, ...]:
        x_MK = x.reshape(-1, x.shape[-1]).contiguous()
        ctx.save_for_backward(x_MK, *of)
        made, _ = compute(layers_of(of), x_MK)
        return tuple(y_MN.view(*x.shape[:-1], -1) for y_MN in made)

    @staticmethod
    def backward(ctx: Any, *given: Any) -> Any:
        x_MK, *of = ctx.saved_tensors
        gradients = [gradient.reshape(-1, gradient.shape[-1]).contiguous() for gradient in given]
        to_x_MK, to_tensors = differentiate(layers_of(of), gradients, x_MK, (), ctx.needs_input_grad)
        return None if to_x_MK is None else to_x_MK.view(*given[0].shape[:-1], -1), *to_tensors


def tensors(layers: Sequence[Layer]) -> list[Tensor | None]:
    """Of all layers."""
    return [tensor for layer in layers for tensor in layer]


def scales(_: Sequence[Layer]) -> tuple[float, ...]:
    """Beside the tensors nothing belongs to them."""
    return ()


def layers_of(given: Sequence[Any], _: Sequence[float] = ()) -> list[Layer]:
    """What these are the tensors of."""
    return [Layer._make(given[first : first + _TENSORS]) for first in range(0, len(given), _TENSORS)]


def may_wait(layers: Sequence[Layer], rows: int) -> bool:
    """Whether nothing of `compute` and `differentiate` reads what they are given before it runs itself."""
    ours = has_tiles() or layers[0].weight_NK.dtype == torch.float32
    return rows >= LEAST_ROWS and ours and all(layer.bias_N is None for layer in layers)


def kept_of(layers: Sequence[Layer], x_MK: Tensor) -> list[Tensor] | None:
    """What `compute` keeps for backward, if it can be had by itself."""
    return []


def compute(
    layers: Sequence[Layer], x_MK: Tensor, into: Tensor | None = None, kept: list[Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """The layers, and what they keep for backward. `into`: what is added to, where they `may_wait`."""
    with in_one_call(x_MK, when=len(x_MK) >= LEAST_ROWS):
        return [product_with(of.weight_NK, x_MK, bias_N=of.bias_N, laid=of.forward, into=into) for of in layers], []


def differentiate(
    layers: Sequence[Layer], gradients: Sequence[Tensor], x_MK: Tensor, _: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of x and of the tensors of all layers, of which those are `wanted`."""
    to_x_MK: Tensor | None = None
    to_tensors: list[Tensor | None] = []
    with in_one_call(x_MK):
        for number, (layer, gradient_MN) in enumerate(zip(layers, gradients, strict=True)):
            if wanted[0]:
                adds = to_x_MK is not None
                to_x_MK = multiply(gradient_MN, layer.weight_NK, to_x_MK, adds=adds, laid=layer.backward)
            weight, bias = wanted[1 + _TENSORS * number :][:2]
            to_tensors += [_to_weight(gradient_MN, x_MK) if weight else None, gradient_MN.sum(0) if bias else None, None, None]
    return to_x_MK, to_tensors


def _to_weight(gradient_MN: Tensor, x_MK: Tensor) -> Tensor:
    """The gradient of a weight. Where results are taller than wide, PyTorch's products by pairs are faster."""
    by_pairs = x_MK.dtype == torch.bfloat16 and not has_tiles()
    if by_pairs and gradient_MN.shape[1] > x_MK.shape[1]:
        return torch.mm(gradient_MN.t(), x_MK)
    return multiply(gradient_MN.t(), x_MK)
