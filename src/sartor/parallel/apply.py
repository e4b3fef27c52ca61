"""Apply a layout to a model: PyTorch's wrappers in their order."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from sartor.parallel.layout import Layout

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from sartor.parallel.pipeline import Stage


def parallelise(model: nn.Module, mesh: DeviceMesh, layout: Layout) -> nn.Module:
    """`model` with the layout's wrappers, in place. Raises JobError for what is not supported."""
    assert layout.pipeline == 1, "stages are cut first, and wrapped one by one (sartor.parallel.pipeline)"
    if layout.context > 1:
        from sartor.parallel.context import divide

        divide(model, mesh, layout)
    if layout.tensor > 1:
        from sartor.parallel.tensor import split

        split(model, mesh, layout)
    if layout.wrapped:
        from sartor.parallel.fsdp import shard

        shard(model, mesh, layout)
    return model


def parallelise_stage(stage: Stage, mesh: DeviceMesh, layout: Layout) -> Stage:
    """A pipeline stage with the layout's other wrappers, in place. Raises JobError for what is not supported."""
    if layout.sequence:
        stage.share_tokens(mesh["tensor"])
    if layout.tensor > 1:
        from sartor.parallel.tensor import split

        split(stage.model, mesh, layout)
    if layout.wrapped:
        from sartor.parallel.fsdp import shard

        shard(stage, mesh, layout)
    return stage
