"""What stands in `parameter.grad` for a gradient that lives on a lower tier.

It has the gradient's shape and format and no memory. An operator that touches it, `torch.nn.utils.clip_grad_norm_` for one,
brings the gradients of its row, works on them, and sends them back where it changed them. Lists of gradients are worked on one by
one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sartor.placement.chunk import Chunk


class AwayGradient(torch.Tensor):
    """A gradient whose values are elsewhere."""

    home: Chunk
    held: Tensor
    known_norm: Any
    """What the gradient's norm was when it left; None where that is not known, or it has changed since."""

    @staticmethod
    def __new__(cls, chunk: Chunk, real: Tensor, norm: Any = None) -> AwayGradient:
        made = torch.Tensor._make_wrapper_subclass(cls, real.shape, strides=real.stride(), dtype=real.dtype, device=real.device)
        made.home, made.held, made.known_norm = chunk, real, norm
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"AwayGradient({tuple(self.shape)}, {self.dtype}, on {self.home.tier.name})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func is torch.ops.aten.detach.default:
            return args[0]
        lists = [place for place, arg in enumerate(args) if isinstance(arg, list | tuple) and any(map(_is_away, arg))]
        if lists and func.__name__.startswith("_foreach"):
            return _one_by_one(func, args, kwargs, lists)
        away = [arg for arg in args if _is_away(arg)]
        changed = func._schema.is_mutable and bool(args) and _is_away(args[0])
        result = _with_real(away, changed, lambda: func(*map(_real, args), **{key: _real(arg) for key, arg in kwargs.items()}))
        return args[0] if changed and result is args[0].held else result


def _is_away(value: Any) -> bool:
    return isinstance(value, AwayGradient)


def _real(value: Any) -> Any:
    return value.held if isinstance(value, AwayGradient) else value


def _with_real(away: list[AwayGradient], changed: bool, work: Callable[[], Any]) -> Any:
    """`work` done while these gradients are on the device."""
    absent = list({id(gradient.home): gradient.home for gradient in away if not gradient.home.here}.values())
    for chunk in absent:
        chunk.hold()
    try:
        return work()
    finally:
        if changed:
            away[0].known_norm = None
        for chunk in absent:
            if changed and chunk is away[0].home:
                chunk.store()
            else:
                chunk.drop()


def _one_by_one(func: Any, args: Any, kwargs: Any, lists: list[int]) -> Any:
    """An operator over lists, for one member of every list after the other."""
    count = len(args[lists[0]])
    results: list[Any] = []
    for member in range(count):
        chosen = [[arg[member]] if isinstance(arg, list | tuple) and len(arg) == count else arg for place, arg in enumerate(args)]
        away = [arg[0] for arg in chosen if isinstance(arg, list) and _is_away(arg[0])]
        real = [[_real(item) for item in arg] if isinstance(arg, list) else arg for arg in chosen]
        changed = func._schema.is_mutable and _is_away(chosen[0][0])
        result = _with_real(away, changed, lambda real=real: func(*real, **kwargs))  # type: ignore[misc]
        results += result or []
    return results or None
