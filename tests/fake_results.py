"""What can be told of operators' results on fake tensors, to compare them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def told(result: Any, operands: list[Any]) -> Any:
    """Everything that a trace can see of a result; its storage by the operand that it shares it with."""
    if isinstance(result, list | tuple):
        return type(result), [told(one, operands) for one in result]
    if not isinstance(result, Tensor):
        return result
    given = [operand.untyped_storage()._cdata if isinstance(operand, Tensor) else None for operand in operands]
    storage = result.untyped_storage()
    return (
        next((place for place, operand in enumerate(operands) if operand is result), None),
        given.index(storage._cdata) if storage._cdata in given else None,
        (result.shape, result.stride(), result.storage_offset(), result.dtype, result.device),
        (storage.nbytes(), storage.device.type, result.requires_grad, torch._C._dispatch_key_set(result)),
    )
