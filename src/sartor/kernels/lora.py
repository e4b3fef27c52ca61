"""A frozen linear layer and its low-rank adapter as one function (Hu et al. 2021, arXiv 2106.09685): y = x W^T + s (x A^T) B^T.

PEFT's own layer takes two small products, a scaling and a sum more for the adapter, each over memory of its own, and backward
seven.
Where the processor multiplies pairs of bfloat16 numbers, all of it is the products of `matmul.py`, which add that of low rank on
their way; elsewhere the product with W is PyTorch's, and what the adapter adds is compiled (`lora.cpp`), summed in float32 and
rounded once.

Shapes: M rows, K input channels, N output channels, R rank.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sartor.kernels.fused import FORMATS, suited
from sartor.kernels.matmul import multiply, takes
from sartor.kernels.native import operator, products_library

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
    return functools.partial(_run, module, name)


def _run(module: Any, name: str, x: Tensor, *args: Any, **named: Any) -> Tensor:
    layer, a, b = module.base_layer, module.lora_A[name].weight, module.lora_B[name].weight
    usual = bool(args or named) or module.disable_adapters or module.merged or torch.is_autocast_enabled(x.device.type)
    if usual or not suited(x, layer.weight, a, b):
        result: Tensor = type(module).forward(module, x, *args, **named)
        return result
    return lora_linear(x, layer.weight, a, b, bias=layer.bias, scale=float(module.scaling[name]))


def lora_linear(
    x: Tensor, weight_NK: Tensor, a_RK: Tensor, b_NR: Tensor, *, bias: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """x W^T + bias + scale (x A^T) B^T for x … K, one of the formats of `fused.suited`; W and bias get no gradient."""
    result: Tensor = _LoRALinear.apply(x, weight_NK, bias, a_RK, b_NR, scale)  # type: ignore[no-untyped-call]
    return result


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_NK: Tensor, bias: Tensor | None, a_RK: Tensor, b_NR: Tensor, scale: float) -> Tensor:
        x_MK = x.reshape(-1, x.shape[-1]).contiguous()
        layer = _Layer(weight_NK, a_RK, b_NR, scale)
        y_MN, low_MR = (_in_pairs if takes(weight_NK) else _in_floats)(layer, x_MK, bias)
        ctx.save_for_backward(x_MK, low_MR, weight_NK, a_RK, b_NR)
        ctx.scale = scale
        return y_MN.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *given: Any) -> Any:
        x_MK, low_MR, weight_NK, a_RK, b_NR = ctx.saved_tensors
        layer = _Layer(weight_NK, a_RK, b_NR, ctx.scale)
        gradient_MN = given[0].reshape(-1, given[0].shape[-1]).contiguous()
        back = _in_pairs_backward if takes(weight_NK) else _in_floats_backward
        to_x_MK, *to_ab = back(layer, gradient_MN, x_MK, low_MR, wanted=ctx.needs_input_grad[0])
        to_x = None if to_x_MK is None else to_x_MK.view(*given[0].shape[:-1], -1)
        return to_x, None, None, *to_ab, None


class _Layer(NamedTuple):
    """The frozen weight, and its adapter."""

    weight_NK: Tensor
    a_RK: Tensor
    b_NR: Tensor
    scale: float


def _in_pairs(layer: _Layer, x_MK: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The layer, and scale x A^T in bfloat16."""
    low_MR = multiply(x_MK, layer.a_RK.t(), scale=layer.scale)
    return multiply(x_MK, layer.weight_NK.t(), more=(low_MR, layer.b_NR.t()), bias_N=bias), low_MR


def _in_pairs_backward(
    layer: _Layer, gradient_MN: Tensor, x_MK: Tensor, low_MR: Tensor, *, wanted: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    to_low_MR = multiply(gradient_MN, layer.b_NR, scale=layer.scale)
    to_x_MK = multiply(gradient_MN, layer.weight_NK, more=(to_low_MR, layer.a_RK)) if wanted else None
    to_b_NR = torch.empty_like(layer.b_NR)
    multiply(low_MR.t(), gradient_MN, to_b_NR.t())
    return to_x_MK, multiply(to_low_MR.t(), x_MK), to_b_NR


def _in_floats(layer: _Layer, x_MK: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The layer, and x A^T in float32."""
    y_MN = F.linear(x_MK, layer.weight_NK, bias)
    return y_MN, add_low_rank_(x_MK, layer.a_RK, layer.b_NR, y_MN, layer.scale)


def _in_floats_backward(
    layer: _Layer, gradient_MN: Tensor, x_MK: Tensor, low_MR: Tensor, *, wanted: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    to_x_MK = torch.mm(gradient_MN, layer.weight_NK) if wanted else None
    _, a_RK, b_NR, scale = layer
    return to_x_MK, *low_rank_backward_(gradient_MN, x_MK, low_MR, a_RK, b_NR, to_x_MK, scale)


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
    low_MR = x_MK.new_empty((len(x_MK), len(a_RK)), dtype=torch.float32)
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


add_low_rank_ = operator(
    "add_low_rank_(Tensor x, Tensor a, Tensor b, Tensor(a!) y, float scale) -> Tensor",
    _add_low_rank,
    lambda x, a, b, y, scale: x.new_empty((len(x), len(a)), dtype=torch.float32),
)
"""y += scale (x A^T) B^T; gives x A^T, float32."""
low_rank_backward_ = operator(
    "low_rank_backward_(Tensor gradient, Tensor x, Tensor low, Tensor a, Tensor b, Tensor(a!)? to_x, float scale) "
    "-> (Tensor, Tensor)",
    _low_rank_backward,
    lambda gradient, x, low, a, b, to_x, scale: (
        a.new_empty(a.shape),
        b.new_empty(b.shape),
    ),
)
"""The gradients of A and B; that of x is added to what the frozen layer gave."""
