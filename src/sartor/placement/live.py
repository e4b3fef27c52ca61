"""Rows that live: where their chunks are, and what watches over the first forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sartor.model.rows import Row
from sartor.placement.chunk import Chunk
from sartor.placement.gradients import AwayGradient
from sartor.plan.table import RowPlaces


class LiveRow:
    """A row, and where its chunks are. A chunk is None where the kind stays on the device."""

    def __init__(self, row: Row, places: RowPlaces) -> None:
        self.row, self.places = row, places
        self.weights: Chunk | None = None
        self.gradients: Chunk | None = None
        self.state: Chunk | None = None
        self.uses = 0
        self.pinned = False
        """Weights stay: something reads them at times that nobody announces."""
        self.expected = 0
        """Bytes of gradients that its backward pass is making."""

    @property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.row.parameters.values() if parameter.requires_grad]

    @property
    def name(self) -> str:
        return self.row.name


class Watch(TorchDispatchMode):
    """Brings weights that an operator reads while they are away."""

    def __init__(self, touched: Callable[[Tensor], LiveRow | None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._touched = touched

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten.detach.default:
            for leaf in pytree.tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor) and not isinstance(leaf, AwayGradient):
                    live = self._touched(leaf)
                    if live is not None and live.weights is not None and not live.weights.here:
                        live.pinned = True
                        live.weights.hold()
        return func(*args, **(kwargs or {}))
