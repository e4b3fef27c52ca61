"""The element-wise work between a block's products, in one pass over memory each: root-mean-square norms, rotary positions, the
gate of an MLP, and softmax over what a query sees.

PyTorch takes up to eight passes for one of them, most over float32 copies that backward then keeps. These keep their inputs and
compute the rest again. `native.py` compiles them; `fuse.py` puts them into models. Rounding is that of the models' own code, but
for rotary positions, which are rounded once instead of three times.

Shapes: R rows, T positions, H heads, D size of a head, N all positions, C channels.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sartor.kernels.calls import call, in_one_call
from sartor.kernels.native import PLAIN, Operator, apply, library


class _Norm(ctypes.Structure):
    """`struct to_norm` of fused.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "y", "inverse", "gradient", "more", "to_weight")),
        *((name, ctypes.c_int64) for name in ("rows", "width", "threads")),
        *((name, ctypes.c_float) for name in ("epsilon", "offset")),
    )


class _Turn(ctypes.Structure):
    """`struct to_turn` of fused.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "cosine", "sine", "y")),
        *((name, ctypes.c_int64) for name in ("rows", "positions", "heads", "size", "angle_rows", "back", "threads")),
    )


class _Gate(ctypes.Structure):
    """`struct to_gate` of fused.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("gradient", "gate", "up", "result", "also")),
        *((name, ctypes.c_int64) for name in ("count", "threads")),
    )


_PARTS = 8
"""Of the rows, in fused.cpp, at most: each has sums of its own."""
FORMATS = {torch.bfloat16: "bf16", torch.float32: "f32"}


def suited(*tensors: Tensor) -> bool:
    """Whether the compiled loops take these: formats that they know, all alike, plain tensors on a CPU."""
    dtype = tensors[0].dtype
    return dtype in FORMATS and all(
        tensor.dtype == dtype and tensor.is_cpu and (type(tensor) in PLAIN or not is_traceable_wrapper_subclass(tensor))
        for tensor in tensors
    )


def rms_norm(x: Tensor, weight_C: Tensor, *, epsilon: float, offset: float = 0.0) -> Tensor:
    """(weight + offset) * x / rms(x) over the last dimension. Where the offset is 0, x / rms(x) is rounded first."""
    result: Tensor = apply(_RMSNorm, x, weight_C, epsilon, offset)
    return result


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    result: Tensor = apply(_SiluMul, gate, up)
    return result


def rotary(query_RHTD: Tensor, key_RHTD: Tensor, cosine_RTD: Tensor, sine_RTD: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by the angles of their positions (Su et al. 2021, arXiv 2104.09864), halves of a head as pairs."""
    result: tuple[Tensor, Tensor] = apply(_Rotary, query_RHTD, key_RHTD, cosine_RTD, sine_RTD)
    return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_C: Tensor, epsilon: float, offset: float) -> Tensor:
        x = x.contiguous()
        y: Tensor
        y, scale_N = norm(x, weight_C, epsilon, offset)
        ctx.save_for_backward(x, weight_C, scale_N)
        ctx.offset = offset
        return y

    @staticmethod
    def backward(ctx: Any, *given: Any) -> Any:
        x, weight_C, scale_N = ctx.saved_tensors
        to_x, to_weight_C = norm_backward(given[0].contiguous(), x, weight_C, scale_N, ctx.offset, ctx.needs_input_grad[1])
        return to_x, to_weight_C if ctx.needs_input_grad[1] else None, None, None


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        result: Tensor = gated(gate, up)
        return result

    @staticmethod
    def backward(ctx: Any, *given: Any) -> Any:
        return gated_backward(given[0].contiguous(), *ctx.saved_tensors)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, ...]:
        cosine, sine = cosine.contiguous(), sine.contiguous()
        ctx.save_for_backward(cosine, sine)
        return _turned((query, key), cosine, sine, back=False)

    @staticmethod
    def backward(ctx: Any, *given: Any) -> Any:
        return *_turned(given, *ctx.saved_tensors, back=True), None, None


def _turned(tensors_RHTD: tuple[Tensor, ...], cosine: Tensor, sine: Tensor, *, back: bool) -> tuple[Tensor, ...]:
    """Positions lie outside of heads in memory, as projections leave them and attention wants them."""
    with in_one_call(cosine):
        return tuple(turn(tensor.transpose(1, 2).contiguous(), cosine, sine, back).transpose(1, 2) for tensor in tensors_RHTD)


def _native(tensor: Tensor, name: str) -> Any:
    loaded = library()
    if loaded is None:
        raise RuntimeError(f"sartor::{name} has to be compiled, and there is no C++ compiler")
    return getattr(loaded, f"{name}_{FORMATS[tensor.dtype]}")


def _norm(x: Tensor, weight_C: Tensor, epsilon: float, offset: float) -> tuple[Tensor, Tensor]:
    y, scale_N = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)
    tensors = x, weight_C, y, scale_N
    places = *(tensor.data_ptr() for tensor in tensors), None, None, None
    of = _Norm(*places, scale_N.numel(), x.shape[-1], torch.get_num_threads(), epsilon, offset)
    call(_native(x, "rms_norm"), of, None, 0, *tensors)
    return y, scale_N


def _norm_backward(
    gradient: Tensor,
    x: Tensor,
    weight_C: Tensor,
    scale_N: Tensor,
    offset: float,
    trained: bool,
    more: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    to_x = torch.empty_like(x)
    to_weight_C = torch.zeros(len(weight_C) if trained else 0, dtype=torch.float32)
    tensors = x, weight_C, to_x, scale_N, gradient, more, to_weight_C if trained else None
    places = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    rows, width = scale_N.numel(), x.shape[-1]
    of = _Norm(*places, rows, width, torch.get_num_threads(), 0.0, offset)
    call(_native(x, "rms_norm_backward"), of, None, 4 * _PARTS * width if trained else 0, *tensors)
    return to_x, to_weight_C


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty_like(gate)
    places = None, gate.data_ptr(), up.data_ptr(), y.data_ptr(), None
    call(_native(gate, "silu_mul"), _Gate(*places, y.numel(), torch.get_num_threads()), None, 0, gate, up, y)
    return y


def _gated_backward(gradient: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    to_gate, to_up = torch.empty_like(gate), torch.empty_like(up)
    tensors = gradient, gate, up, to_gate, to_up
    of = _Gate(*(tensor.data_ptr() for tensor in tensors), gate.numel(), torch.get_num_threads())
    call(_native(gate, "silu_mul_backward"), of, None, 0, *tensors)
    return to_gate, to_up


def _turn(x_RTHD: Tensor, cosine: Tensor, sine: Tensor, back: bool) -> Tensor:
    y = torch.empty_like(x_RTHD)
    tensors = x_RTHD, cosine, sine, y
    of = _Turn(*(tensor.data_ptr() for tensor in tensors), *y.shape, len(cosine), back, torch.get_num_threads())
    call(_native(y, "rotate"), of, None, 0, *tensors)
    return y


def _native_softmax(scores: Tensor, queries: int, offset: int, window: int) -> None:
    """Rows of scores become probabilities. The rows are `queries` of them again and again; the first sees the keys up to
    `offset`, with a window only the last ones of these."""
    loaded = library() if scores.is_cpu and scores.is_contiguous() and scores.dtype in FORMATS else None
    if loaded is None:
        _softmax(scores, queries, offset, window)
        return
    kernel, keys = getattr(loaded, f"causal_softmax_{FORMATS[scores.dtype]}"), scores.shape[-1]
    if kernel(scores.data_ptr(), scores.numel() // keys, queries, keys, offset, window, torch.get_num_threads()):
        raise MemoryError("no memory for a row of scores")


def _softmax(scores: Tensor, queries: int, offset: int, window: int) -> None:
    """The same by PyTorch's operators."""
    hidden = torch.ones((queries, scores.shape[-1]), dtype=torch.bool, device=scores.device).triu_(offset + 1)
    if window:
        hidden |= torch.ones_like(hidden).tril_(offset - window)
    scores.view(-1, *hidden.shape).masked_fill_(hidden, float("-inf"))
    scores.copy_(torch.softmax(scores, -1))


def _native_softmax_backward(gradient: Tensor, probabilities: Tensor) -> None:
    """Gradients of probabilities become those of scores."""
    known = gradient.dtype in FORMATS and gradient.dtype == probabilities.dtype
    loaded = library() if gradient.is_cpu and known and gradient.is_contiguous() and probabilities.is_contiguous() else None
    if loaded is None:
        gradient.copy_(torch._softmax_backward_data(gradient, probabilities, -1, probabilities.dtype))
        return
    kernel, keys = getattr(loaded, f"softmax_backward_{FORMATS[gradient.dtype]}"), gradient.shape[-1]
    kernel(gradient.data_ptr(), probabilities.data_ptr(), gradient.numel() // keys, keys, torch.get_num_threads())


norm = Operator(
    "rms_norm(Tensor x, Tensor weight, float epsilon, float offset) -> (Tensor, Tensor)",
    _norm,
    lambda x, weight, epsilon, offset: (torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)),
)
norm_backward = Operator(
    "rms_norm_backward(Tensor gradient, Tensor x, Tensor weight, Tensor scale, float offset, bool trained, Tensor? more=None) "
    "-> (Tensor, Tensor)",
    _norm_backward,
    lambda gradient, x, weight, scale, offset, trained, more=None: (
        torch.empty_like(x),
        scale.new_empty(len(weight) if trained else 0),
    ),
)
gated = Operator("silu_mul(Tensor gate, Tensor up) -> Tensor", _gated, lambda gate, up: torch.empty_like(gate))
gated_backward = Operator(
    "silu_mul_backward(Tensor gradient, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    _gated_backward,
    lambda gradient, gate, up: (torch.empty_like(gate), torch.empty_like(up)),
)
turn = Operator(
    "rotate(Tensor x, Tensor cosine, Tensor sine, bool back) -> Tensor",
    _turn,
    lambda x, cosine, sine, back: torch.empty_like(x),
)
causal_softmax_ = Operator(
    "causal_softmax_(Tensor(a!) scores, int queries, int offset, int window) -> ()",
    _native_softmax,
    lambda scores, queries, offset, window: None,
)
softmax_backward_ = Operator(
    "softmax_backward_(Tensor(a!) gradient, Tensor probabilities) -> ()",
    _native_softmax_backward,
    lambda gradient, probabilities: None,
)
