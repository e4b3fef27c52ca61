"""A frozen linear layer and its low-rank adapter as one function (Hu et al. 2021, arXiv 2106.09685): y = x W^T + s (x A^T) B^T.

PEFT's own layer takes two small products, a scaling and a sum more for the adapter, each over memory of its own, and backward
seven.
Where products are those of `matmul.py`, all of it is: they add that of low rank on their way. Elsewhere the product with W is
PyTorch's, and what the adapter adds is compiled (`lora.cpp`), summed in float32 and rounded once.

Shapes: M rows, K input channels, N output channels, R rank.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sartor.kernels.calls import in_one_call
from sartor.kernels.fused import FORMATS, suited
from sartor.kernels.linear import LEAST_ROWS, enough, product_with
from sartor.kernels.matmul import multiply, takes
from sartor.kernels.native import Operator, apply, products_library
from sartor.kernels.prepack import prepacked
from sartor.kernels.thin import gradient, narrow, narrow_and_gradient

MOST_RANK = 64
"""Above it general products are as good."""


class _Sizes(ctypes.Structure):
    """`struct sizes` of lora.cpp."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("rows", "in", "out", "rank", "threads"))


def lora_of(module: Any) -> Callable[..., Tensor] | None:
    """A forward for a module that is PEFT's plain LoRA beside a plain linear layer; None for anything else."""
    loaded = sys.modules.get("peft.tuners.lora.layer")
    if loaded is None or type(module) is not loaded.Linear or products_library() is None:
        return None
    layer, names = module.base_layer, module.active_adapters
    if type(layer) is not nn.Linear or layer.weight.requires_grad or len(names) != 1 or module.fan_in_fan_out:
        return None
    (name,) = names
    if name not in module.lora_A or name in module.lora_variant or module.lora_B[name].bias is not None:
        return None
    dropout = module.lora_dropout[name]
    if module.r[name] > MOST_RANK or not (isinstance(dropout, nn.Identity) or getattr(dropout, "p", 1.0) == 0):
        return None
    return functools.partial(run, module, name)


def run(module: Any, name: str, x: Tensor, *args: Any, **named: Any) -> Tensor:
    layer = None if args or named else ready(module, name, x)
    if layer is None:
        result: Tensor = type(module).forward(module, x, *args, **named)
        return result
    return linears(x, [layer])[0]


def ready(module: Any, name: str, x: Tensor) -> Layer | None:
    """The module's layer and adapter, where nothing keeps them from being one function now."""
    layer, a, b = module.base_layer, module.lora_A[name].weight, module.lora_B[name].weight
    usual = module.disable_adapters or module.merged or torch.is_autocast_enabled(x.device.type)
    if usual or not suited(x, layer.weight, a, b):
        return None
    return Layer(layer.weight, layer.bias, a, b, *prepacked(layer), float(module.scaling[name]))


class Layer(NamedTuple):
    """A frozen layer, and its adapter; the layer's weight as `prepack` lays it out, for either pass."""

    weight_NK: Tensor
    bias_N: Tensor | None
    a_RK: Tensor
    b_NR: Tensor
    forward: Tensor | None = None
    backward: Tensor | None = None
    scale: float = 1.0


_TENSORS = len(Layer._fields) - 1


def linears(x: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """x W^T + bias + scale (x A^T) B^T of each layer for x … K, one of the formats of `fused.suited`; W and bias get no
    gradient."""
    result: tuple[Tensor, ...] = apply(_LoRALinears, x, scales(layers), *tensors(layers))
    return result


def tensors(layers: Sequence[Layer]) -> list[Any]:
    """Of all layers."""
    return [tensor for layer in layers for tensor in layer[:_TENSORS]]


def scales(layers: Sequence[Layer]) -> tuple[float, ...]:
    """What belongs to them beside the tensors."""
    return tuple(layer.scale for layer in layers)


def layers_of(given: Sequence[Any], scales: Sequence[float]) -> list[Layer]:
    """What these are the tensors and scales of."""
    return [Layer._make((*given[_TENSORS * i : _TENSORS * (i + 1)], scale)) for i, scale in enumerate(scales)]


class _LoRALinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scales: tuple[float, ...], *of: Tensor | None) -> tuple[Tensor, ...]:
        x_MK = x.reshape(-1, x.shape[-1]).contiguous()
        y_MNs, lows = compute(layers_of(of, scales), x_MK)
        ctx.save_for_backward(x_MK, *lows, *of)
        ctx.scales = scales
        return tuple(y_MN.view(*x.shape[:-1], -1) for y_MN in y_MNs)

    @staticmethod
    def backward(ctx: Any, *given: Any) -> Any:
        x_MK, *saved = ctx.saved_tensors
        count = _TENSORS * len(ctx.scales)
        layers = layers_of(saved[-count:], ctx.scales)
        gradients = [gradient.reshape(-1, gradient.shape[-1]).contiguous() for gradient in given]
        to_x_MK, to_tensors = differentiate(layers, gradients, x_MK, saved[:-count], ctx.needs_input_grad)
        return None if to_x_MK is None else to_x_MK.view(*given[0].shape[:-1], -1), None, *to_tensors


def may_wait(layers: Sequence[Layer], rows: int) -> bool:
    """Whether nothing of `compute` and `differentiate` reads what they are given before it runs itself."""
    return rows >= LEAST_ROWS and _are_ours(layers, rows)


def _are_ours(layers: Sequence[Layer], rows: int) -> bool:
    """Whether all of it is products of our own."""
    return enough(rows, layers[0].weight_NK.dtype) and all(takes(layer.weight_NK) for layer in layers)


def kept_of(layers: Sequence[Layer], x_MK: Tensor) -> list[Tensor] | None:
    """What `compute` keeps for backward, if it can be had by itself."""
    return [_low(layers, x_MK)] if _are_ours(layers, len(x_MK)) else None


def compute(
    layers: Sequence[Layer], x_MK: Tensor, into: Tensor | None = None, kept: list[Tensor] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """The layers, and what they keep for backward. `into`: what is added to, where they `may_wait`. `kept`: by `kept_of`."""
    if not _are_ours(layers, len(x_MK)):
        return _by_loops(layers, x_MK)
    with in_one_call(x_MK, when=len(x_MK) >= LEAST_ROWS):
        low_MR = _low(layers, x_MK) if kept is None else kept[0]
        made = [
            product_with(layer.weight_NK, x_MK, (low, layer.b_NR.t()), layer.bias_N, layer.forward, into)
            for layer, low in zip(layers, _beside(low_MR, layers), strict=True)
        ]
    return made, [low_MR]


def differentiate(
    layers: Sequence[Layer], gradients: Sequence[Tensor], x_MK: Tensor, kept: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of x, if that is `wanted`, and of the tensors of all layers."""
    ours = _are_ours(layers, len(x_MK))
    with in_one_call(x_MK, when=ours):
        back = _by_products_backward if ours else _by_loops_backward
        to_x_MK, to_abs = back(layers, gradients, x_MK, kept, wanted=wanted[0])
    return to_x_MK, [tensor for to_a, to_b in to_abs for tensor in (None, None, to_a, to_b, None, None)]


_Gradients = list[tuple[Tensor, Tensor]]
"""Of A and B of every layer."""


def _beside(low_MR: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """The layers' columns of what has those of all."""
    return _parts(low_MR, 1, layers)


def _parts(whole: Tensor, dimension: int, layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """The ranks of each layer, of those of all; `split` takes ten times as long."""
    if len(layers) == 1:
        return (whole,)
    parts, first = [], 0
    for layer in layers:
        rank = layer.a_RK.shape[0]
        parts.append(whole.narrow(dimension, first, rank))
        first += rank
    return tuple(parts)


def _low(layers: Sequence[Layer], x_MK: Tensor) -> Tensor:
    """scale x A^T of all layers, in their format."""
    low_MR = x_MK.new_empty(x_MK.shape[0], sum(layer.a_RK.shape[0] for layer in layers))
    if len({layer.scale for layer in layers}) == 1:  # in one pass over x
        a_RK = layers[0].a_RK if len(layers) == 1 else torch.cat([layer.a_RK for layer in layers])
        narrow(x_MK, a_RK.t(), low_MR, scale=layers[0].scale)
    else:
        for layer, low in zip(layers, _beside(low_MR, layers), strict=True):
            narrow(x_MK, layer.a_RK.t(), low, scale=layer.scale)
    return low_MR


def _by_products_backward(
    layers: Sequence[Layer], gradients: Sequence[Tensor], x_MK: Tensor, lows: Sequence[Tensor], *, wanted: bool
) -> tuple[Tensor | None, _Gradients]:
    to_low_MR, to_x_MK = torch.empty_like(lows[0]), None
    to_a_RK = x_MK.new_empty(to_low_MR.shape[1], x_MK.shape[1])
    to_b_NRs = [torch.empty_like(layer.b_NR) for layer in layers]
    each = zip(layers, gradients, _beside(lows[0], layers), _beside(to_low_MR, layers), to_b_NRs, strict=True)
    for layer, gradient_MN, low, to_low, to_b_NR in each:
        narrow_and_gradient(gradient_MN, layer.b_NR, to_low, low, to_b_NR.t(), scale=layer.scale)
        if wanted:
            more, adds = (to_low, layer.a_RK), to_x_MK is not None
            to_x_MK = multiply(gradient_MN, layer.weight_NK, to_x_MK, more=more, adds=adds, laid=layer.backward)
    gradient(to_low_MR, x_MK, to_a_RK)
    return to_x_MK, list(zip(_parts(to_a_RK, 0, layers), to_b_NRs, strict=True))


def _by_loops(layers: Sequence[Layer], x_MK: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The layers, and x A^T of each in float32."""
    made = [F.linear(x_MK, layer.weight_NK, layer.bias_N) for layer in layers]
    lows = [add_low_rank_(x_MK, layer.a_RK, layer.b_NR, y_MN, layer.scale) for layer, y_MN in zip(layers, made, strict=True)]
    return made, lows


def _by_loops_backward(
    layers: Sequence[Layer], gradients: Sequence[Tensor], x_MK: Tensor, lows: Sequence[Tensor], *, wanted: bool
) -> tuple[Tensor | None, _Gradients]:
    to_x_MK: Tensor | None = None
    to_abs = []
    for layer, gradient_MN, low_MR in zip(layers, gradients, lows, strict=True):
        if wanted and to_x_MK is None:
            to_x_MK = torch.mm(gradient_MN, layer.weight_NK)
        elif to_x_MK is not None:
            to_x_MK.addmm_(gradient_MN, layer.weight_NK)
        to_abs.append(low_rank_backward_(gradient_MN, x_MK, low_MR, layer.a_RK, layer.b_NR, to_x_MK, layer.scale))
    return to_x_MK, to_abs


def _sizes(x_MK: Tensor, b_NR: Tensor) -> _Sizes:
    return _Sizes(*x_MK.shape, *b_NR.shape, torch.get_num_threads())


def _call(name: str, sizes: _Sizes, tensors: tuple[Tensor | None, ...], scale: float, *, back: bool) -> None:
    loaded = products_library()
    if loaded is None:
        raise RuntimeError(f"sartor::{name} has to be compiled, and there is no C++ compiler")
    loaded.lora_room.restype = ctypes.c_int64
    room = torch.empty(loaded.lora_room(ctypes.byref(sizes), ctypes.c_int(back)), dtype=torch.float32)
    places = [None if tensor is None else ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    kernel = getattr(loaded, f"{name}_{FORMATS[tensors[0].dtype]}")  # type: ignore[union-attr]
    kernel(*places, ctypes.c_float(scale), ctypes.byref(sizes), ctypes.c_void_p(room.data_ptr()))


def _add_low_rank(x_MK: Tensor, a_RK: Tensor, b_NR: Tensor, y_MN: Tensor, scale: float) -> Tensor:
    low_MR = x_MK.new_empty((x_MK.shape[0], len(a_RK)), dtype=torch.float32)
    tensors = x_MK, a_RK.contiguous(), b_NR.contiguous(), y_MN, low_MR
    _call("lora", _sizes(x_MK, b_NR), tensors, scale, back=False)
    return low_MR


def _low_rank_backward(
    gradient_MN: Tensor, x_MK: Tensor, low_MR: Tensor, a_RK: Tensor, b_NR: Tensor, to_x_MK: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    to_a_RK, to_b_NR = (torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in (a_RK, b_NR))
    tensors = gradient_MN, x_MK, low_MR, a_RK.contiguous(), b_NR.contiguous(), to_x_MK, to_a_RK, to_b_NR
    _call("lora_backward", _sizes(x_MK, b_NR), tensors, scale, back=True)
    return to_a_RK, to_b_NR


add_low_rank_ = Operator(
    "add_low_rank_(Tensor x, Tensor a, Tensor b, Tensor(a!) y, float scale) -> Tensor",
    _add_low_rank,
    lambda x, a, b, y, scale: x.new_empty((len(x), len(a)), dtype=torch.float32),
)
"""y += scale (x A^T) B^T; gives x A^T, float32."""
low_rank_backward_ = Operator(
    "low_rank_backward_(Tensor gradient, Tensor x, Tensor low, Tensor a, Tensor b, Tensor(a!)? to_x, float scale) "
    "-> (Tensor, Tensor)",
    _low_rank_backward,
    lambda gradient, x, low, a, b, to_x, scale: (
        a.new_empty(a.shape),
        b.new_empty(b.shape),
    ),
)
"""The gradients of A and B; that of x is added to what the frozen layer gave."""
