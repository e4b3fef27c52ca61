"""What stands in `parameter.grad` for a gradient that lives on a lower tier.

It has the gradient's shape and format and no memory. An operator that touches it, `torch.nn.utils.clip_grad_norm_` for one,
brings the gradients of its row, works on them, and sends them back where it changed them. Lists of gradients are worked on one by
one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sartor.placement.chunk import Chunk, Visits


class AwayGradient(torch.Tensor):
    """A gradient whose values are elsewhere."""

    home: Chunk
    visits: Visits
    held: Tensor
    """The gradient itself, whose storage is empty while its chunk is away."""
    known_norm: Any
    """What the gradient's norm was when it left; None where that is not known, or it has changed since."""

    @staticmethod
    def __new__(cls, home: Chunk, visits: Visits, held: Tensor, norm: Any = None) -> AwayGradient:
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, strides=held.stride(), dtype=held.dtype, device=held.device)
        made.home, made.visits, made.held, made.known_norm = home, visits, held, norm
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"AwayGradient({tuple(self.shape)}, {self.dtype}, on {self.home.tier.name})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return args[0]
        lists = [place for place, arg in enumerate(args) if isinstance(arg, list | tuple) and any(map(_is_away, arg))]
        if lists and func.__name__.startswith("_foreach"):
            return _one_by_one(func, args, kwargs or {}, len(args[lists[0]]))
        return _run(func, args, kwargs or {})


def _is_away(value: Any) -> bool:
    return isinstance(value, AwayGradient)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """An operator on gradients that are brought for it."""
    changes = func._schema.is_mutable
    first = args[0][0] if isinstance(args[0], list | tuple) else args[0]
    away = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, AwayGradient)]
    away[0].visits.hold(*(leaf.home for leaf in away))
    if changes and isinstance(first, AwayGradient):
        first.known_norm = None
        first.home.changed()
    real_args, real_kwargs = pytree.tree_map_only(AwayGradient, lambda away: away.held, (args, kwargs))
    result = func(*real_args, **real_kwargs)
    return first if isinstance(first, AwayGradient) and result is first.held else result


def _one_by_one(func: Any, args: Any, kwargs: Any, count: int) -> Any:
    """An operator over lists, for one member of every list after the other."""
    results: list[Any] = []
    for member in range(count):
        chosen = [[arg[member]] if isinstance(arg, list | tuple) and len(arg) == count else arg for arg in args]
        results += _run(func, chosen, kwargs) or []
    return results or None
