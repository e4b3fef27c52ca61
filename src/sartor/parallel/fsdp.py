"""Data parallelism with sharding: FSDP2, one group a block and one for the rest."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from sartor.model import dissect
from sartor.parallel.layout import Layout

_FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def shard(model: nn.Module, mesh: DeviceMesh, layout: Layout) -> nn.Module:
    """`model` (on the meta device, or with its weights) under FSDP2 over the mesh's `shard` (with `context`) and `replicate`.

    Blocks are the members of the model's stacks; embeddings, final norm and head form the root's group,
    which FSDP2 keeps gathered between forward and backward.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy()
    if layout.gather != "as-stored":
        policy = MixedPrecisionPolicy(param_dtype=_FORMATS[layout.gather], reduce_dtype=torch.float32)
    where = mesh["shard", "context"]._flatten("shared") if layout.context > 1 else mesh["shard"]
    if layout.replicate > 1:
        where = DeviceMesh._concatenate([mesh["replicate"], where])
    for stack in dissect(model).stacks:
        for layer in model.get_submodule(stack.path).children():
            fully_shard(layer, mesh=where, reshard_after_forward=layout.zero == 3, mp_policy=policy)
    fully_shard(model, mesh=where, reshard_after_forward=None if layout.zero == 3 else False, mp_policy=policy)
    return model
