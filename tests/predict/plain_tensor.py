"""Tensor parallelism in plain PyTorch, after torchtitan and Megatron, for tests to hold the forecast against: Llama with its
layers split, LoRA beside them, Mixtral's experts in parts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor import parallel as tp

WHOLE, TOKENS = Replicate(), Shard(1)
COLUMNS = (*(f"self_attn.{name}_proj" for name in "qkv"), "mlp.gate_proj", "mlp.up_proj")
ROWS = ("self_attn.o_proj", "mlp.down_proj")
NORMS = ("model.norm", "model.layers.*.input_layernorm", "model.layers.*.post_attention_layernorm")


def plain_plan(model: nn.Module, mesh: DeviceMesh, *, sequence: bool, adapter: bool = False) -> None:
    """Split a Llama or a pipeline stage's part of it, with LoRA in all its linear layers if so wished; or a Mixtral, without
    sequence parallelism."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    stream: dict[str, Any] = {"output_layouts": TOKENS, "use_local_output": False} if sequence else {}
    base = ".base_layer" if adapter else ""
    plan: dict[str, Any] = {
        "model.embed_tokens": tp.RowwiseParallel(input_layouts=WHOLE, **stream),
        "lm_head": tp.ColwiseParallel(output_layouts=WHOLE),
        **{f"model.layers.*.{name}{base}": tp.ColwiseParallel() for name in COLUMNS},
        **{f"model.layers.*.{name}{base}": tp.RowwiseParallel(**stream) for name in ROWS},
    }
    for path, module in list(model.named_modules()):
        if path.endswith("mlp.experts"):
            model.set_submodule(path, PlainExperts(module, mesh))
        elif path.endswith("mlp.gate"):
            plan[path] = alike(module, mesh, outputs=3)
        elif path.endswith("norm") and not sequence:
            plan[path] = alike(module, mesh)
        elif adapter and path.endswith(".lora_A.default"):
            rows = path.startswith(tuple(f"model.layers.{path.split('.')[2]}.{name}." for name in ROWS))
            plan[path] = tp.RowwiseParallel(**stream) if rows else alike(module, mesh)
        elif adapter and path.endswith(".lora_B.default"):
            rows = path.startswith(tuple(f"model.layers.{path.split('.')[2]}.{name}." for name in ROWS))
            whole = tp.SequenceParallel() if sequence else alike(module, mesh) if rows else None
            plan[path] = whole if rows else tp.ColwiseParallel()
    if sequence:
        plan |= dict.fromkeys(NORMS, tp.SequenceParallel())
        plan["model.layers.*.self_attn"] = tp.PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": TOKENS}, desired_input_kwarg_layouts={"hidden_states": WHOLE}
        )
        plan["model.layers.*.mlp"] = tp.PrepareModuleInput(input_layouts=TOKENS, desired_input_layouts=WHOLE)
    there = {path for path, module in model.named_modules() if any(True for _ in module.parameters())}
    tp.parallelize_module(model, mesh, {path: style for path, style in plan.items() if path.replace("*", "0") in there})
    if sequence and "model.norm" in there:
        gathered = tp.PrepareModuleOutput(output_layouts=TOKENS, desired_output_layouts=WHOLE)
        tp.parallelize_module(model, mesh, {"model.norm": gathered})
    for path, module in model.named_modules():
        if path.endswith(".base_layer"):
            module.register_forward_hook(wait)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)


def wait(_: nn.Module, inputs: Any, output: Any) -> None:
    """For a sum that a recomputation would leave behind, and PyTorch would keep."""
    sum_ = getattr(output, "_local_tensor", output)
    if isinstance(sum_, collectives.AsyncCollectiveTensor):
        sum_.trigger_wait()


def alike(module: nn.Module, mesh: DeviceMesh, *, outputs: int = 1) -> tp.ParallelStyle:
    """Make the module's parameters whole on every rank; the style for what goes in and comes out."""
    distribute_module(module, mesh)
    given: Any = WHOLE if outputs == 1 else (WHOLE,) * outputs
    return tp.PrepareModuleInputOutput(
        input_layouts=WHOLE, desired_input_layouts=WHOLE, output_layouts=given, desired_output_layouts=given
    )


class PlainExperts(nn.Module):
    """Experts of which every rank has a part; here the rows of gate and up projection are split as they come, since only sizes
    matter."""

    def __init__(self, experts: nn.Module, mesh: DeviceMesh) -> None:
        super().__init__()
        self.experts, self.group = experts, mesh.get_group()
        for name, dim in (("gate_up_proj", 1), ("down_proj", 2)):
            whole = getattr(experts, name)
            setattr(experts, name, nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(dim)])))

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        local: dict[str, Any] = {name: value.to_local() for name, value in self.experts.named_parameters()}  # type: ignore[attr-defined]
        given = (_GradientSum.apply(hidden, self.group), index, _GradientSum.apply(weights, self.group))
        return _Sum.apply(torch.func.functional_call(self.experts, local, given), self.group)  # type: ignore[no-any-return, no-untyped-call]


class _GradientSum(torch.autograd.Function):
    """Megatron's f: nothing forward, the sum over the ranks backward."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return collectives.wait_tensor(collectives.all_reduce(gradient, "sum", ctx.group)), None


class _Sum(torch.autograd.Function):
    """Megatron's g: the sum over the ranks forward, nothing backward."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        return collectives.wait_tensor(collectives.all_reduce(value, "sum", group))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None
