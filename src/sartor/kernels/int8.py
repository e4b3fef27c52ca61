"""Products with frozen weights in int8: weights rounded once, with a scale for each output channel; inputs and gradients as they
come, with a scale for each row. PyTorch multiplies (`_int_mm`: oneDNN's int8 products, summed in int32).

Not exact: a row of inputs or gradients keeps 127 steps on either side of zero (as in LLM.int8(), Dettmers et al. 2022, arXiv
2208.07339, without its exceptions for outliers). What that does to a run is measured in docs/cpu.md.

Shapes: M rows, K input channels, N output channels.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sartor.kernels.native import Operator, apply, library

FAST_INT8 = ("avx512_vnni", "avx_vnni", "amx_int8")
"""Instruction sets with which a CPU multiplies int8 without losing sums to saturation, and several times as fast as float32."""
_LARGEST = 127.0
_FORMATS = {torch.bfloat16: "bf16", torch.float32: "f32"}


class Int8Linear(nn.Module):
    """A frozen linear layer."""

    weight: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight_NK = layer.weight.detach()
        if weight_NK.is_meta:
            rounded_NK, scale_N = torch.empty_like(weight_NK, dtype=torch.int8), weight_NK.new_empty(len(weight_NK)).float()
        else:
            rounded_NK, scale_N = quantise_rows(weight_NK, None)
        self.register_buffer("weight", rounded_NK, persistent=False)
        self.register_buffer("scale", scale_N, persistent=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = apply(_Int8Product, x, self.weight, self.scale)
        return result if self.bias is None else result + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def quantise_frozen(stack: nn.Module) -> int:
    """Replace every frozen linear layer below `stack` by its int8 self; how many there were."""
    found = [
        (module, name, child)
        for module in stack.modules()
        for name, child in module.named_children()
        if type(child) is nn.Linear and not any(parameter.requires_grad for parameter in child.parameters())
    ]
    for module, name, child in found:
        setattr(module, name, Int8Linear(child))
    return len(found)


class _Int8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_NK: Tensor, scale_N: Tensor) -> Tensor:
        ctx.save_for_backward(weight_NK, scale_N)
        rounded_MK, scale_M = quantise_rows(x.reshape(-1, x.shape[-1]).contiguous(), None)
        sums_MN = torch._int_mm(rounded_MK, weight_NK.t())
        result: Tensor = dequantise(sums_MN, scale_M, scale_N, x.dtype)
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *given: Any) -> Any:
        weight_NK, scale_N = ctx.saved_tensors
        gradient = given[0]
        # The channels' scales belong to the dimension that is summed over: they go into the gradient before it is rounded.
        rounded_MN, scale_M = quantise_rows(gradient.reshape(-1, gradient.shape[-1]).contiguous(), scale_N)
        sums_MK = torch._int_mm(rounded_MN, weight_NK)
        return dequantise(sums_MK, scale_M, None, gradient.dtype).view(*gradient.shape[:-1], -1), None, None


def _quantise(x_MK: Tensor, factor_K: Tensor | None) -> tuple[Tensor, Tensor]:
    loaded = library() if x_MK.is_cpu and x_MK.dtype in _FORMATS and x_MK.is_contiguous() else None
    if loaded is None:
        wide_MK = x_MK.float() if factor_K is None else x_MK.float() * factor_K
        scale_M = wide_MK.abs().amax(1) / _LARGEST
        inverse_M = torch.where(scale_M > 0, 1 / scale_M, 0.0)
        return (wide_MK * inverse_M[:, None]).round().to(torch.int8), scale_M
    rounded_MK, scale_M = torch.empty_like(x_MK, dtype=torch.int8), x_MK.new_empty(len(x_MK), dtype=torch.float32)
    kernel = getattr(loaded, f"quantise_rows_{_FORMATS[x_MK.dtype]}")
    _call(kernel, (x_MK, factor_K, rounded_MK, scale_M), x_MK.shape)
    return rounded_MK, scale_M


def _dequantise(sums_MN: Tensor, scale_M: Tensor, factor_N: Tensor | None, dtype: torch.dtype) -> Tensor:
    loaded = library() if sums_MN.is_cpu and dtype in _FORMATS and sums_MN.is_contiguous() else None
    if loaded is None:
        wide_MN = sums_MN.float() * scale_M[:, None]
        return (wide_MN if factor_N is None else wide_MN * factor_N).to(dtype)
    result_MN = torch.empty_like(sums_MN, dtype=dtype)
    kernel = getattr(loaded, f"dequantise_{_FORMATS[dtype]}")
    _call(kernel, (sums_MN, scale_M, factor_N, result_MN), sums_MN.shape)
    return result_MN


def _call(kernel: Any, tensors: Sequence[Tensor | None], shape: Sequence[int]) -> None:
    places = [None if tensor is None else ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    kernel(*places, *map(ctypes.c_int64, shape), ctypes.c_int(torch.get_num_threads()))


quantise_rows = Operator(
    "quantise_rows(Tensor x, Tensor? factor) -> (Tensor, Tensor)",
    _quantise,
    lambda x, factor: (torch.empty_like(x, dtype=torch.int8), x.new_empty(len(x), dtype=torch.float32)),
)
"""(x * factor) as int8 and the scale of each row: factor has one number a column."""
dequantise = Operator(
    "dequantise(Tensor sums, Tensor rows, Tensor? columns, ScalarType dtype) -> Tensor",
    _dequantise,
    lambda sums, rows, columns, dtype: torch.empty_like(sums, dtype=dtype),
)
"""sums * rows * columns, scales of rows and of columns."""
