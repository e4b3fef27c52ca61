"""Attention of short examples in compiled loops (`attention.cpp`), which write into a result that longer ones share.

Products of a few dozen rows are so small that what is around them takes most of the time: gathering, padding, one call for each
product. Here an example and the heads that share its keys are one piece of work, in float32 and within a core's caches.

Shapes: P positions of all rows, H query heads, G heads of keys and values, D size of a head (of values: E).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sartor.kernels.native import Operator, products_library

LONGEST = 512
"""Positions of an example: from about twice as many on, products in bfloat16 by PyTorch are as fast."""
NUMBERS = 5
"""That say where an example is, as `struct example` of attention.cpp has them: its first position and length, those of the
beginning that it continues (0 and 0 where there is none), and the first row of its gradients of that beginning."""
_FORMATS = {torch.bfloat16: "bf16", torch.float32: "f32"}


class _Shape(ctypes.Structure):
    """`struct shape` of attention.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("heads", "groups", "size", "value_size", "window")),
        *((name, ctypes.c_int64) for name in ("query_row", "key_row", "value_row")),
        ("scale", ctypes.c_float),
    )


def suits(query: Tensor) -> bool:
    """Whether these loops serve tensors like this one."""
    return query.dtype in _FORMATS and query.device.type == "cpu" and products_library() is not None


def _call(
    name: str, tensors: Sequence[Tensor], sources: Sequence[Tensor], where: Sequence[int], scale: float, window: int
) -> None:
    """`sources`: queries, keys and values among the tensors."""
    query, key, value = sources
    shape = _Shape(query.shape[1], key.shape[1], query.shape[2], value.shape[2], window, *(t.stride(0) for t in sources), scale)
    loaded = products_library()
    if loaded is None:
        raise RuntimeError(f"sartor::{name}_ has to be compiled, and there is no C++ compiler")
    kernel = getattr(loaded, f"{name}_{_FORMATS[query.dtype]}")
    places = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    examples = (ctypes.c_int64 * len(where))(*where)
    count, threads = ctypes.c_int64(len(where) // NUMBERS), ctypes.c_int(torch.get_num_threads())
    if kernel(*places, examples, count, ctypes.byref(shape), threads):
        raise MemoryError("no memory for the scores of a block of queries")


def _rows(tensor_PHD: Tensor) -> Tensor:
    """Heads beside each other; rows may lie apart."""
    dense = tensor_PHD.stride(2) == 1 and tensor_PHD.stride(1) == tensor_PHD.shape[2]
    return tensor_PHD if dense else tensor_PHD.contiguous()


def _attend(query: Tensor, key: Tensor, value: Tensor, result: Tensor, where: Sequence[int], scale: float, window: int) -> None:
    sources = [_rows(tensor) for tensor in (query, key, value)]
    _call("attend", [*sources, result], sources, where, scale, window)


def _attend_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    to_query: Tensor,
    to_key: Tensor,
    to_value: Tensor,
    more_key: Tensor,
    more_value: Tensor,
    where: Sequence[int],
    scale: float,
    window: int,
) -> None:
    sources = [_rows(tensor) for tensor in (query, key, value)]
    tensors = [gradient.contiguous(), *sources, to_query, to_key, to_value, more_key, more_value]
    _call("attend_backward", tensors, sources, where, scale, window)


def _nothing(*_: Any) -> None:
    return None


attend_ = Operator(
    "attend_(Tensor query, Tensor key, Tensor value, Tensor(a!) result, int[] where, float scale, int window) -> ()",
    _attend,
    _nothing,
)
"""Causal softmax attention of the examples `where` (`NUMBERS` for each) of query P H D, key P G D and value P G E,
written to the first positions of result, dense. Results do not depend on the number of threads."""
attend_backward_ = Operator(
    "attend_backward_(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor(a!) to_query, Tensor(b!) to_key, "
    "Tensor(c!) to_value, Tensor(d!) more_key, Tensor(e!) more_value, int[] where, float scale, int window) -> ()",
    _attend_backward,
    _nothing,
)
"""The gradients of queries, keys and values. Those of beginnings are in float32 and for each example by itself, rows x G x D and
rows x G x E."""
