"""Random weights without a model that is whole in memory: what fills a tensor is noted, and done again when its turn comes.

A model's constructor fills its parameters with random numbers, one after the other, from one generator. Here each is filled as
ever, so that the generator goes on as ever; then its memory is freed, and what filled it is kept with the state of the generator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

SMALLEST = 2**12
"""Bytes; what is smaller is kept as it is."""
_aten = torch.ops.aten
_EMPTY = frozenset([_aten.empty.memory_format, _aten.empty_strided.default, _aten.new_empty.default, _aten.empty_like.default])
_OVERWRITE = frozenset([_aten.normal_.default, _aten.uniform_.default, _aten.fill_.Scalar, _aten.zero_.default])


@dataclass
class _Noted:
    """A storage, and what is done to fill it."""

    storage: torch.UntypedStorage
    size: int
    steps: list[tuple[Callable[[], Any], Tensor]] = field(default_factory=list)
    """Each with the state of the generator that it begins with."""

    def fill(self) -> None:
        """Memory and values."""
        self.storage.resize_(self.size)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            for step, state in self.steps:
                torch.set_rng_state(state)
                step()


class LazyWeights(TorchDispatchMode):
    """While it is entered, tensors that are made empty and filled in place take no memory afterwards. Tensors that are read on
    the way are filled for good."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._noted: dict[int, _Noted] = {}

    def fill(self, tensor: Tensor) -> None:
        """Give a tensor its values, if they were only noted."""
        noted = self._noted.pop(tensor.untyped_storage()._cdata, None)
        if noted is not None:
            noted.fill()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _EMPTY:
            return self._emptied(func(*args, **kwargs))
        if func is _aten.detach.default:
            return func(*args, **kwargs)
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = [self._noted.get(tensor.untyped_storage()._cdata) for tensor in tensors]
        if func.is_view and known[0] is not None:
            known[0].storage.resize_(known[0].size)
            view = func(*args, **kwargs)
            known[0].storage.resize_(0)
            return view
        target = known[0] if known and func._schema.is_mutable and args[0] is tensors[0] else None
        if target is not None and all(tensor.nbytes < SMALLEST for tensor in tensors[1:]):
            return self._note(target, func, args, kwargs)
        for tensor in tensors:
            self.fill(tensor)
        return func(*args, **kwargs)

    def _emptied(self, made: Tensor) -> Tensor:
        storage = made.untyped_storage()
        if made.device.type == "cpu" and storage.nbytes() >= SMALLEST:
            self._noted[storage._cdata] = _Noted(storage, storage.nbytes())
            storage.resize_(0)
        return made

    def _note(self, noted: _Noted, func: Any, args: Any, kwargs: Any) -> Any:
        state = torch.get_rng_state()
        noted.storage.resize_(noted.size)
        result = func(*args, **kwargs)
        if func in _OVERWRITE and args[0].nbytes == noted.size:
            noted.steps.clear()
        noted.steps.append((lambda: func(*args, **kwargs), state))
        noted.storage.resize_(0)
        return result
