"""A world of many ranks, of which one is traced: PyTorch's own parallel wrappers run over a process group that sends nothing."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sartor.errors import JobError
from sartor.parallel import Layout
from sartor.predict.tracker import StorageTracker

DIMENSIONS = ("pipeline", "replicate", "shard", "context", "tensor")


def make_mesh(layout: Layout, device_kind: str) -> DeviceMesh:
    """The layout's mesh over the ranks of the running process group."""
    sizes = tuple(getattr(layout, name) for name in DIMENSIONS)
    return init_device_mesh(device_kind, sizes, mesh_dim_names=DIMENSIONS)


@contextlib.contextmanager
def fake_world(layout: Layout, *, rank: int = 0) -> Iterator[DeviceMesh | None]:
    """As rank `rank` of the layout's devices; nothing for one device. Raises JobError inside of a distributed run."""
    if layout.devices == 1:
        yield None
        return
    if dist.is_initialized():
        raise JobError(
            "a forecast for several devices cannot be made inside a distributed run",
            why="it simulates a process group, and this process has one already",
            remedy="make the plan before the processes start",
        )
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=layout.devices, store=FakeStore())
    try:
        with _empty_parts_shared():
            yield make_mesh(layout, "cpu")
    finally:
        dist.destroy_process_group()
        forget_meshes()


@contextlib.contextmanager
def _empty_parts_shared() -> Iterator[None]:
    """FSDP2 cuts each parameter into parts for all ranks and keeps that of its own. Of hundreds of ranks most get nothing of a
    small parameter; here all these have one empty part together."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    def cut(tensor: torch.Tensor, num_chunks: int, dim: int) -> list[torch.Tensor]:
        parts = list(torch.chunk(tensor, num_chunks, dim=dim))
        return parts if len(parts) == num_chunks else parts + [parts[0].new_empty(0)] * (num_chunks - len(parts))

    owner, name = _fsdp_param, "_chunk_with_empty"
    usual = getattr(owner, name)
    setattr(owner, name, cut)
    try:
        yield
    finally:
        setattr(owner, name, usual)


def forget_meshes() -> None:
    """DTensor keeps the mesh with how it sharded an operator; an equal mesh of the next world has other process groups."""
    from torch.distributed.tensor import _redistribute, debug

    for owner, name in ((debug, "_clear_sharding_prop_cache"), (_redistribute, "clear_redistribute_planner_cache")):
        if hasattr(owner, name):
            getattr(owner, name)()


@contextlib.contextmanager
def wrappers_watched(tracker: StorageTracker) -> Iterator[None]:
    """Tell the tracker what PyTorch's wrappers do behind its back, for as long as the context lasts.

    FSDP2 gives gathered weights back by resizing their storages to nothing. DTensor asks for the shapes of results by computing
    them on fake tensors, which have no memory; its advice on how to make collectives faster is kept out of a forecast's output.
    """
    from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    def resizing(original: Any) -> Any:
        def change(tensor: torch.Tensor) -> None:
            original(tensor)
            tracker.resized(tensor)

        return change

    def unseen(original: Any) -> Any:
        def propagate(propagator: Any, schema: Any) -> Any:
            if not schema.op._schema.returns:
                return None  # optimizers update lists of hundreds of tensors, and nothing is returned
            with tracker.unseen():
                return original(propagator, schema)

        return propagate

    with contextlib.ExitStack() as patches:
        for owner, name, change in (
            (_fsdp_param, "alloc_storage", resizing),
            (_fsdp_param, "free_storage", resizing),
            (_fsdp_param_group, "alloc_storage", resizing),
            (ShardingPropagator, "_propagate_tensor_meta_non_cached", unseen),
        ):
            original = getattr(owner, name)
            patches.callback(setattr, owner, name, original)
            setattr(owner, name, change(original))
        advice = logging.getLogger("torch.distributed.tensor._redistribute")
        patches.callback(advice.setLevel, advice.level)
        advice.setLevel(logging.ERROR)
        yield
