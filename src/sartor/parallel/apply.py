"""Apply a layout to a model: PyTorch's wrappers in their order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from sartor.errors import JobError
from sartor.parallel.layout import Layout

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def parallelise(model: nn.Module, mesh: DeviceMesh, layout: Layout) -> nn.Module:
    """`model` with the layout's wrappers, in place. Raises JobError for what is not supported."""
    if layout.pipeline > 1:
        raise JobError("pipeline parallelism is not forecast yet", remedy="strategy.pipeline=1")
    if layout.tensor > 1:
        from sartor.parallel.tensor import split

        split(model, mesh, layout)
    if layout.data > 1:
        from sartor.parallel.fsdp import shard

        shard(model, mesh, layout)
    return model
