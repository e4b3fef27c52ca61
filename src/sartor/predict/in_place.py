"""Where gradients meet: autograd adds them up in place, but not while a dispatch mode watches.

Of a tensor that was used twice, the engine adds the second gradient to the first, in the first one's memory, if nobody else holds
it (PyTorch 2.13, torch/csrc/autograd/input_buffer.cpp, can_accumulate_inplace). Under any dispatch mode it makes a third tensor
instead (isTensorSubclassLike), which no run has: for every residual connection one hidden state too many at that moment. So the
tracker adds in place where the engine would.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def adds_up_in_place(held: Any, other: Any) -> bool:
    """Whether an addition that a dispatch mode was asked for is autograd's of two gradients, and would be done in place."""
    if torch._C._current_graph_task_id() < 0 or torch.is_grad_enabled():
        return False  # no backward pass, or the forward pass that it computes again
    if not isinstance(other, torch.Tensor) or held.dtype != other.dtype or held.shape != other.shape:
        return False
    return bool(torch.ops.aten.is_non_overlapping_and_dense(held)) and _holders(held) == lone_holders()


def _holders(tensor: torch.Tensor) -> tuple[int, int]:
    """How many hold the tensor, and its storage, those who ask among them."""
    return tensor._use_count(), torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)  # type: ignore[attr-defined]


@functools.cache
def lone_holders() -> tuple[int, int]:
    """What `_holders` says of a gradient that only autograd holds, seen in a small backward pass."""
    seen: list[tuple[int, int]] = []

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.add.Tensor and torch._C._current_graph_task_id() >= 0:
                seen.append(_holders(args[0]))
            return func(*args, **(kwargs or {}))

    gate = torch.ones(2, requires_grad=True) * 1
    total = gate.sin() + gate.cos()
    with Look():  # type: ignore[no-untyped-call]
        total.backward(torch.ones(2))
    return seen[0]
