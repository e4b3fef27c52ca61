"""What PyTorch does otherwise on a CUDA device, as far as it changes memory: which attention kernel runs and what that one takes,
what autocast computes in float32, what dropout keeps.

Followed from the sources of PyTorch 2.13 (2.11 is the same): aten/src/ATen/native/transformers/cuda/sdp_utils.cpp,
attention_backward.cu and mem_eff_attention/kernel_backward.h; aten/src/ATen/autocast_mode.h; aten/src/ATen/native/Dropout.cpp.
Not followed, since the sources do not decide it or the device's shared memory does: cuDNN's own workspace beside its frontend's,
the scratch memory of an embedding's gradient and of grouped products of experts, the fused `rms_norm` (transformers' models spell
theirs out), and the rows that pad the memory-efficient kernel's log-sum-exp and mask (at most 31 and 15).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.nn.attention import SDPBackend, sdpa_kernel

Kernel = Literal["cudnn", "flash", "efficient", "math"]

CUDNN_FIRST = (90, 100, 103)
"""Compute capabilities where cuDNN's attention is tried first (sdp_utils.cpp, check_prefer_cudnn_attention), with cuDNN 9.15.1 or
newer; with older ones flash attention runs, which differs by what lengths are rounded to."""

_HALVES = (torch.bfloat16, torch.float16)
_FLASH_NOT_192 = (86, 87, 89, 120, 121)

# aten/src/ATen/autocast_mode.h: AT_FORALL_FP32 and AT_FORALL_FP32_SET_OPT_DTYPE, less what CPU autocast casts to float32 as well.
_IN_FLOAT32 = (
    *("acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh", "tan"),
    *("pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm", "native_layer_norm", "rms_norm"),
    *("group_norm", "frobenius_norm.dim", "nuclear_norm", "nuclear_norm.dim", "cosine_similarity", "dist", "pdist", "renorm"),
    *("logsumexp", "upsample_nearest1d", "_upsample_nearest_exact1d", "upsample_nearest2d", "_upsample_nearest_exact2d"),
    *("upsample_nearest3d", "_upsample_nearest_exact3d", "upsample_linear1d", "upsample_bilinear2d", "_upsample_bilinear2d_aa"),
    *("upsample_trilinear3d", "upsample_bicubic2d", "_upsample_bicubic2d_aa"),
)
_TO_FLOAT32 = (
    *("softmax.int", "log_softmax.int", "cumprod", "cumsum", "sum", "sum.dim_IntList"),
    *("linalg_vector_norm", "linalg_matrix_norm", "linalg_matrix_norm.str_ord"),
)
"""Those whose result is float32 unless they are told another format."""


def attention_kernel(
    sm: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    masked: bool,
    dropout: float = 0.0,
    causal: bool = False,
    grouped: bool = False,
) -> Kernel:
    """Which kernel `scaled_dot_product_attention` runs on compute capability `sm`, training. `grouped`: its `enable_gqa`.

    Memory-efficient attention takes no grouped heads (up to 2.13), so grouped float32 is computed by plain operators.
    """
    width, value_width, dtype = query.shape[-1], value.shape[-1], query.dtype
    if query.dim() != 4:
        return "math"
    same_heads = query.shape[1] == key.shape[1] == value.shape[1]
    fits_groups = same_heads or (grouped and key.shape[1] == value.shape[1] and query.shape[1] % key.shape[1] == 0)
    low = dtype in _HALVES if sm >= 80 else dtype == torch.float16
    if (
        sm in CUDNN_FIRST
        and low
        and fits_groups
        and (16 * dropout).is_integer()
        and max(width, value_width) <= 128
        and width % 8 == value_width % 8 == 0
        and key.shape[2] != 1
    ):
        return "cudnn"
    square = not causal or query.shape[2] == key.shape[2]
    trains = sm not in _FLASH_NOT_192 or width <= 192 or (not dropout and width > 224)
    if sm >= 80 and low and fits_groups and not masked and square and trains and width == value_width <= 256:
        return "flash"
    alignment = (8 if dtype in _HALVES else 4) if sm >= 80 else 8 if dtype == torch.float16 and sm >= 70 else 1
    known = dtype in (torch.float32, torch.float16) or (sm >= 80 and dtype == torch.bfloat16)
    if known and same_heads and width == key.shape[-1] and width % alignment == value_width % alignment == 0:
        return "efficient"
    return "math"


def forward_scratch(kernel: Kernel, query: Tensor, value: Tensor) -> int:
    """Bytes of scratch memory in an attention's forward: memory-efficient heads wider than 128 are summed up in float32."""
    if kernel == "efficient" and value.shape[-1] > 128 and query.dtype in _HALVES:
        return 4 * math.prod(query.shape[:3]) * value.shape[-1]
    return 0


def backward_scratch(kernel: Kernel, query: Tensor, key: Tensor, value: Tensor) -> int:
    """Bytes of scratch memory in an attention's backward: all kernels sum up dQ in float32."""
    if kernel == "cudnn":
        return _cudnn_backward(query) + _expanded(query, key)
    if kernel == "efficient":
        return _efficient_backward(query, key, value)
    return _flash_backward(query) + _expanded(query, key)


def _expanded(query: Tensor, key: Tensor) -> int:
    """Grouped keys and values get a gradient per query head first.

    That is flash attention's way (flash_api.cpp, mha_bwd). Of cuDNN it is not known; it sums up over groups as well.
    """
    batch, heads, _, width = query.shape
    return 2 * batch * heads * key.shape[2] * width * key.element_size() if key.shape[1] != heads else 0


def _flash_backward(query: Tensor) -> int:
    """FlashAttention-2 (Dao 2023, arXiv 2307.08691; flash_attn/flash_api.cpp, mha_bwd): dQ and a row sum, rounded to 128 rows and
    32 columns."""
    batch, heads, length, width = query.shape
    rows = _round_up(length, 128)
    return 4 * batch * heads * rows * (_round_up(width, 32) + 1)


def _cudnn_backward(query: Tensor) -> int:
    """NVIDIA's cudnn-frontend, node/scaled_dot_product_flash_attention.h: `dQ_accum` and `softmax_sum`, as they are."""
    batch, heads, length, width = query.shape
    return 4 * batch * heads * length * (width + 1)


def _efficient_backward(query: Tensor, key: Tensor, value: Tensor) -> int:
    """mem_eff_attention/kernel_backward.h, `Params::workspace_size`, and `delta` in attention_backward.cu.

    Blocks are those of cutlassB.h for devices with enough shared memory; others differ in what lengths are rounded to.
    """
    batch, heads, length, width = query.shape
    wide = max(width, value.shape[-1])
    rows = 64 if wide <= 64 else 128
    columns = 128 if 64 < wide <= 128 else 64
    tiles = -(-length // rows) * -(-width // columns)
    floats = tiles * (rows * columns + 4)
    if query.dtype in _HALVES and wide > 128:  # dK and dV do not stay in registers
        splits = max(min(-(-key.shape[2] // columns), 200 // (batch * heads)), 1)
        floats += splits * columns * (_round_up(width, rows) + _round_up(value.shape[-1], rows))
    delta = 4 * batch * heads * length
    workspace = 4 * batch * heads * _round_up(floats, 4)
    # In float32, delta is the sum over a product that is written out before the workspace is there, and as large as that.
    return delta + workspace


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step


@contextlib.contextmanager
def cuda_rules(sm: int) -> Iterator[None]:
    """Within this context operators on CPU tensors (fake ones, say) take CUDA's way, as far as this file knows it.

    Kernels of PyTorch's dispatcher are replaced, in this process, for as long as the context lasts.
    """
    aten, autocast = torch.ops.aten, DispatchKeySet(DispatchKey.AutocastCPU)
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("scaled_dot_product_attention", _attention(sm), "AutogradCPU")
        library.impl("dropout", _dropout, "AutogradCPU")
        for names, rule in ((_IN_FLOAT32, _float32_arguments), (_TO_FLOAT32, _float32_result)):
            for name in names:
                if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "AutocastCPU"):
                    packet, _, overload = name.partition(".")
                    operator = getattr(getattr(aten, packet), overload or "default")
                    library.impl(name, rule(operator, autocast), "AutocastCPU")
        yield


def _attention(sm: int) -> Callable[..., Tensor]:
    """The choice of kernel: plain operators where CUDA has no other, and dropout inside of the kernel where it has one."""
    operator = torch.ops.aten.scaled_dot_product_attention.default

    def choose(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        kernel = attention_kernel(
            sm, query, key, value, masked=attn_mask is not None, dropout=dropout_p, causal=is_causal, grouped=enable_gqa
        )
        plain = kernel == "math"
        chance = dropout_p if plain else 0.0
        with sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext():
            result: Tensor = operator.decompose(
                query, key, value, attn_mask, chance, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        return result

    return choose


def _dropout(tensor: Tensor, p: float, train: bool) -> Tensor:
    """Keeps a mask of bytes (Dropout.cpp, is_fused_kernel_acceptable), where the CPU keeps noise in the tensor's own format."""
    if train and 0 < p < 1 and tensor.numel():
        return torch.native_dropout(tensor, p, train)[0]
    result: Tensor = torch.ops.aten.dropout.default.decompose(tensor, p, train)
    return result


def _float32_arguments(operator: Any, autocast: DispatchKeySet) -> Callable[..., Any]:
    def run(*args: Any, **options: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            args = tuple(arg.float() if _eligible(arg) else arg for arg in args)
            return operator(*args, **{name: arg.float() if _eligible(arg) else arg for name, arg in options.items()})

    return run


def _float32_result(operator: Any, autocast: DispatchKeySet) -> Callable[..., Any]:
    place = [argument.name for argument in operator._schema.arguments].index("dtype")

    def run(*args: Any, **options: Any) -> Any:
        told = options.get("dtype") is not None or (len(args) > place and args[place] is not None)
        if not told and _eligible(args[0]):
            args, options = args[:place], options | {"dtype": torch.float32}
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            return operator(*args, **options)

    return run


def _eligible(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
