"""What plain operators return, asked of the shape rules that PyTorch has for the meta device.

A fake tensor comes to the same rule in the end, after what could matter to any operator on any device: a millisecond. Results of
the operators named here follow from the rule alone, where all operands are dense tensors of one device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_META = torch.device("meta")

_NAMES = """
_foreach_add_.Scalar _foreach_copy_ _foreach_mul_.Tensor _foreach_norm.Scalar _fused_adamw_ _log_softmax
_log_softmax_backward_data _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention_for_cpu_backward
_softmax _softmax_backward_data _to_copy _unsafe_view add.Tensor add_.Tensor addmm all arange as_strided bmm cat clamp clone cos
cumsum detach div.Scalar div.Tensor embedding embedding_dense_backward empty.memory_format empty_like empty_strided eq.Scalar
expand gelu gelu_backward index.Tensor index_put linalg_vector_norm mean.dim mm mul.Scalar mul.Tensor mul_.Tensor ne.Scalar neg
new_zeros nll_loss_backward nll_loss_forward ones_like permute pow.Tensor_Scalar reciprocal rsqrt select.int silu silu_backward
sin slice.Tensor slice_backward split.Tensor split_with_sizes stack sub.Tensor sum.dim_IntList t tanh tanh_backward transpose.int
unsqueeze view zeros zeros_like
"""


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


PLAIN = frozenset(map(_overload, _NAMES.split()))


def ask(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The results of a plain operator on stand-ins for fake tensors, and these operands. They have the fake ones' storages.

    Raises what the operator raises.
    """
    known: dict[int, Tensor] = {}
    with torch._C._DisableTorchDispatch():
        operands = [_stand_in(arg, known) for arg in args]
        return func(*operands, **{name: _stand_in(value, known) for name, value in kwargs.items()}), operands


def _stand_in(value: Any, known: dict[int, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if id(value) not in known:
            inner = torch.empty(0, dtype=value.dtype, device=_META)
            known[id(value)] = inner.set_(value.untyped_storage(), value.storage_offset(), value.shape, value.stride())
        return known[id(value)]
    if isinstance(value, list | tuple):
        return type(value)([_stand_in(item, known) for item in value])
    return _META if isinstance(value, torch.device) else value


def is_fresh(result: Tensor) -> bool:
    """Whether a tensor without an operand's storage has one of its own, no larger than it needs."""
    with torch._C._DisableTorchDispatch():
        alone = torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device=_META)
    return result.storage_offset() == 0 and result.untyped_storage().nbytes() == alone.untyped_storage().nbytes()
