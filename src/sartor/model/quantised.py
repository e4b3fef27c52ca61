"""Stand-ins for bitsandbytes' quantised layers: their storage, and what their forward and backward passes allocate.

The forecast traces them without bitsandbytes and without weights. They allocate in the order of bitsandbytes 0.50
(nn/modules.py, autograd/_functions.py, backends/cuda/ops.py, backends/cpu/ops.py); values mean nothing. Where CUDA and the CPU
differ, `kind` says which device is meant.

Shapes: N outputs, K inputs of a layer; M tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 64
"""Weights that share a scale (`Params4bit`, blocksize)."""
NESTED_BLOCK = 256
"""Scales that share a scale, with double quantisation (`quantize_4bit`, compress_statistics)."""
FUSED_TOKENS = 4
"""Up to so many tokens CUDA always multiplies without dequantising (`_GEMM_4BIT_CUSTOM_FLOOR_M`). Up to 1536 it may, by a table
of cards and sizes, which is left out here: a temporary of forward that backward makes anyway."""


class QuantisedLinear(nn.Linear):
    """What both kinds have in common. Subclasses nn.Linear, as bitsandbytes' do: PEFT's `all-linear` finds them."""

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None, *, kind: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.kind = in_features, out_features, kind
        self.bias = bias  # type: ignore[assignment]

    def keep(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> None:
        """A tensor of the quantisation's state."""
        self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"), persistent=False)

    def settle_bias(self, dtype: torch.dtype) -> None:
        """bitsandbytes casts the bias for good when it first meets another format."""
        if self.bias is not None and self.bias.dtype != dtype:
            self.bias.data = self.bias.data.to(dtype)


class Linear4bit(QuantisedLinear):
    """`bitsandbytes.nn.Linear4bit` with NF4: packed weights, a scale for 64 of them, with `double` in 8 bits themselves."""

    absmax: Tensor
    code: Tensor
    nested_absmax: Tensor
    nested_code: Tensor
    offset: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: nn.Parameter | None,
        *,
        stored: torch.dtype,
        compute: torch.dtype,
        double: bool,
        kind: str,
    ) -> None:
        """`stored`: the format that the weights had before (backward dequantises to it)."""
        super().__init__(in_features, out_features, bias, kind=kind)
        self.stored, self.compute, self.nested = stored, compute, double
        numbers = in_features * out_features
        blocks = -(-numbers // BLOCK)
        packed = torch.empty(((numbers + 1) // 2, 1), dtype=torch.uint8, device="meta")
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.keep("code", 16)
        self.keep("absmax", blocks, dtype=torch.uint8 if double else torch.float32)
        if double:
            self.keep("nested_absmax", -(-blocks // NESTED_BLOCK))
            self.keep("nested_code", 256)
            self.keep("offset")

    def forward(self, input: Tensor) -> Tensor:
        given = input.dtype
        x = input.to(self.compute)
        bias = None
        if self.bias is not None:
            self.settle_bias(x.dtype)
            bias = self.bias.to(self.compute)
        if torch.is_grad_enabled() and x.requires_grad:
            product: Tensor = _MatMul4Bit.apply(x, bias, self)  # type: ignore[no-untyped-call]
        else:
            product = self.product(x, bias)
        return product.to(given)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`gemm_4bit`."""
        tokens = x.numel() // self.in_features
        if self.kind == "cuda" and tokens <= FUSED_TOKENS and self.in_features % BLOCK == 0:
            return torch.empty((*x.shape[:-1], self.out_features), dtype=x.dtype, device=x.device)
        scales = []
        if self.nested:
            scales.append(torch.empty_like(self.absmax, dtype=torch.float32))
            scales.append(scales[0] + self.offset)
            if self.kind != "cuda":
                del scales[0]
        output = F.linear(x, self._empty(x.dtype), bias)
        del scales
        return output

    def dequantised(self) -> Tensor:
        """`dequantize_4bit`: the weights in the format that they had."""
        scales = torch.empty_like(self.absmax, dtype=torch.float32).add_(self.offset) if self.nested else None
        weight = self._empty(self.stored)
        del scales
        return weight

    def _empty(self, dtype: torch.dtype) -> Tensor:
        return torch.empty((self.out_features, self.in_features), dtype=dtype, device=self.weight.device)


class _MatMul4Bit(torch.autograd.Function):
    """Keeps no activation; dequantises again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: Linear4bit) -> Tensor:
        ctx.layer = layer
        return layer.product(x, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return torch.matmul(gradient, ctx.layer.dequantised().to(gradient.dtype)), None, None


class Linear8bitLt(QuantisedLinear):
    """`bitsandbytes.nn.Linear8bitLt` without fp16 weights, with transformers' threshold for outliers (6.0).

    How many outliers there are depends on values; here there are none. They would cost a copy of their columns.
    """

    row_scales: Tensor

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None, *, kind: str) -> None:
        super().__init__(in_features, out_features, bias, kind=kind)
        numbers = torch.empty((out_features, in_features), dtype=torch.int8, device="meta")
        self.weight = nn.Parameter(numbers, requires_grad=False)
        self.keep("row_scales", out_features)

    def forward(self, input: Tensor) -> Tensor:
        self.settle_bias(input.dtype)
        if self.kind == "cuda":
            return _MatMul8bitLt.apply(input, self.bias, self)  # type: ignore[no-untyped-call,no-any-return]
        if not self.training:
            raise NotImplementedError("int8 layers that only infer are not traced for a CPU")
        return _MatMul8bitFp.apply(input, self.bias, self)  # type: ignore[no-untyped-call,no-any-return]

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        return self.weight.data.to(dtype, copy=True).mul_(self.row_scales.unsqueeze(1).mul(1.0 / 127.0))


class _MatMul8bitLt(torch.autograd.Function):
    """CUDA: the product of int8 numbers. Keeps its input where autograd's hooks do not see it: recomputation does not free it,
    and it lives for as long as the graph does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: Linear8bitLt) -> Tensor:
        ctx.shape, ctx.dtype, ctx.layer = x.shape, x.dtype, layer
        rows_MK = x.reshape(-1, x.shape[-1])
        quantised = _quantise_rows(rows_MK.to(torch.float16))
        outliers = torch.empty(0, dtype=rows_MK.dtype, device=x.device)
        output_MN = _scaled_product(quantised[0], layer, bias, x.dtype)
        ctx.tensors = (outliers, rows_MK) if ctx.needs_input_grad[0] else None
        return output_MN.reshape(*ctx.shape[:-1], layer.out_features)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _input_gradient(ctx, gradient), None, None


class _MatMul8bitFp(torch.autograd.Function):
    """CPU, in training: dequantises and multiplies. Keeps its input like the other one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: Linear8bitLt) -> Tensor:
        weight = layer.dequantised(x.dtype)
        output = F.linear(x, weight, bias)
        ctx.shape, ctx.dtype, ctx.layer, ctx.tensors = x.shape, x.dtype, layer, (x,)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _input_gradient(ctx, gradient), None, None


def _quantise_rows(half_MK: Tensor) -> tuple[Tensor, Tensor]:
    """`int8_vectorwise_quant`: the rows in int8 and their scales."""
    scales_M = torch.empty(half_MK.shape[0], dtype=torch.float32, device=half_MK.device)
    rows_MK = torch.empty(half_MK.shape, dtype=torch.int8, device=half_MK.device)
    outliers_MK = half_MK.abs() >= 6.0
    outliers_MK.any()
    return rows_MK, scales_M


def _scaled_product(rows_MK: Tensor, layer: Linear8bitLt, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`int8_scaled_mm`: an int32 product, then fp16, then the format of the input."""
    product_MN = torch.empty((rows_MK.shape[0], layer.out_features), dtype=torch.int32, device=rows_MK.device)
    output_MN = torch.empty_like(product_MN, dtype=torch.float16)
    if bias is not None and bias.dtype != torch.float16:
        output_MN.add_(bias)
    return output_MN.to(dtype)


def _input_gradient(ctx: Any, gradient: Tensor) -> Tensor:
    if gradient.dim() == 3:
        gradient = gradient.reshape(-1, gradient.shape[-1]).contiguous()
    weight = ctx.layer.dequantised(ctx.dtype)
    return torch.matmul(gradient.to(ctx.dtype), weight).view(ctx.shape)
