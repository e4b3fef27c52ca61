"""Skeletons that a plan looks at again and again, built once: whole ones to read, shortened ones to copy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from sartor.model.build import skeleton
from sartor.model.regions import EDGE, Reduction, reduce_depth
from sartor.model.source import ModelSource

_KEPT: WeakKeyDictionary[ModelSource, dict[Any, Any]] = WeakKeyDictionary()
"""What was built of a model, for as long as somebody plans with it."""


def outline(source: ModelSource, *, dtype: torch.dtype, attention: str | None = None) -> nn.Module:
    """The model's skeleton, to read only: everybody who asks gets the same one. Raises ModelError."""
    return _once(source, (dtype, attention), lambda: skeleton(source, dtype=dtype, attention=attention))  # type: ignore[no-any-return]


def short_skeleton(
    source: ModelSource, *, dtype: torch.dtype, attention: str | None = None, edge: int = EDGE, singles: bool = False
) -> tuple[nn.Module, Reduction]:
    """A skeleton of the caller's own without repeated layers, and what was left out, as by `reduce_depth`. Raises ModelError."""

    def build() -> tuple[nn.Module, Reduction]:
        model = skeleton(source, dtype=dtype, attention=attention)
        return model, reduce_depth(model, edge=edge, singles=singles)

    kept = _once(source, (dtype, attention, edge, singles), build)
    try:
        return copy.deepcopy(kept)  # type: ignore[no-any-return]
    except Exception:  # foreign code may hold what cannot be copied
        return build()


def _once(source: ModelSource, key: Any, build: Callable[[], Any]) -> Any:
    kept = _KEPT.setdefault(source, {})
    if key not in kept:
        kept[key] = build()
    return kept[key]
