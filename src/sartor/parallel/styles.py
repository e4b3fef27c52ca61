"""How single modules are split over tensor parallel ranks, beside PyTorch's `ColwiseParallel` and `RowwiseParallel`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel
from torch.distributed.tensor.placement_types import _StridedShard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

COLWISE = ("colwise", "colwise_gather_output", "colwise_rep")
ROWWISE = ("rowwise", "rowwise_split_input", "rowwise_rep")
NORM_OF_HEADS = "replicated_with_grad_allreduce"
EXPERTS = "moe_tp_experts"
KNOWN = (*COLWISE, *ROWWISE, NORM_OF_HEADS, EXPERTS)
"""Rules of transformers' plans for modules."""
TOKENS = Shard(1)
"""Of a residual stream of rows x tokens x width."""
_GATE_AND_UP = _StridedShard(1, split_factor=2)
"""Of a weight that holds two matrices, one above the other: every rank has a part of both."""


def style_of(rule: str, stream: Placement) -> ParallelStyle:
    """The style for a rule of transformers. What rowwise layers give goes to the residual stream."""
    if rule == EXPERTS:
        return Experts()
    if rule == NORM_OF_HEADS:
        # of rows x tokens x heads x width, or with heads before tokens: which one is split, is the same here
        return Whole(TOKENS)
    if rule in COLWISE:
        return ColwiseParallel(output_layouts=Shard(-1) if rule == "colwise" else Replicate())
    given = Shard(-1) if rule == "rowwise" else Replicate()
    return RowwiseParallel(input_layouts=given, output_layouts=stream, use_local_output=stream.is_replicate())


def adapter_styles(rule: str, stream: Placement) -> tuple[ParallelStyle, ParallelStyle]:
    """Of LoRA's two matrices beside a layer with this rule: the one next to what is split is split, the other is whole."""
    if rule in COLWISE:
        return Whole(Replicate()), style_of(rule, stream)
    return style_of(rule, stream), Whole(stream, local=stream.is_replicate())


def settle(_: nn.Module, inputs: Any, output: torch.Tensor) -> None:
    """Hook of a layer beside an adapter: wait for the sum that is on its way. A recomputation may end before anybody needs it,
    and what nobody waited for PyTorch keeps (2.13)."""
    local = output._local_tensor if isinstance(output, DTensor) else output
    if isinstance(local, AsyncCollectiveTensor):
        local.trigger_wait()


class Whole(ParallelStyle):
    """A module whose parameters are whole on every rank, its input and output laid out alike.

    What PyTorch's `SequenceParallel` is for any layout of the input, and with parameters that keep whether they train.
    """

    def __init__(self, layout: Placement, *, output: Placement | None = None, local: bool = True) -> None:
        self.layout, self.output, self.local = layout, output or layout, local

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _distribute(module, device_mesh, Replicate())

        def spread(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            return (_laid_out(inputs[0], device_mesh, self.layout), *inputs[1:])

        def collect(_: nn.Module, inputs: Any, output: DTensor) -> torch.Tensor:
            output = output.redistribute(placements=[self.output])
            return output.to_local() if self.local else output

        module.register_forward_pre_hook(spread)
        module.register_forward_hook(collect)
        return module


class GatherTokens(ParallelStyle):
    """A module that gets the residual stream, split over the tokens, and works on all of them.

    `scatter`: inside of it nothing is split over the tokens, and what it gives is whole on every rank, of which each goes on with
    its own tokens.
    """

    def __init__(self, *, scatter: bool = False) -> None:
        self.scatter = scatter

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def gather(value: Any) -> Any:
            if not (isinstance(value, DTensor) and value.placements == (TOKENS,)):
                return value
            value = value.redistribute(placements=[Replicate()])
            return value.to_local() if self.scatter else value

        def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return tuple(gather(value) for value in inputs), {name: gather(value) for name, value in named.items()}

        def part(_: nn.Module, inputs: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (_laid_out(output[0], device_mesh, Replicate()).redistribute(placements=[TOKENS]), *output[1:])
            return _laid_out(output, device_mesh, Replicate()).redistribute(placements=[TOKENS])

        module.register_forward_pre_hook(hook, with_kwargs=True)
        if self.scatter:
            module.register_forward_hook(part)
        return module


class Alike(ParallelStyle):
    """A module that computes the same on every rank, with parameters that are whole there: its code sees plain tensors only."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _distribute(module, device_mesh, Replicate())
        _run_locally(module)
        return module


class Experts(ParallelStyle):
    """Experts whose weights are stacked (`gate_up_proj` [experts, 2 x inner, width], `down_proj` [experts, width, inner]): every
    rank has a part of each one's inner width, and the parts of the result are added up, as of a dense MLP."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _distribute(module, device_mesh, Shard(2), gate_up_proj=_GATE_AND_UP)

        def spread(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return tuple(_in_parts(value, device_mesh) for value in inputs), {
                name: _in_parts(value, device_mesh) for name, value in named.items()
            }

        def add_up(_: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            parts = DTensor.from_local(output, device_mesh, [Partial()], run_check=False)
            return parts.redistribute(placements=[Replicate()]).to_local()

        _run_locally(module)
        module.register_forward_pre_hook(spread, with_kwargs=True)
        module.register_forward_hook(add_up)
        return module


def _distribute(module: nn.Module, mesh: DeviceMesh, placement: Placement, **others: Placement) -> None:
    """Make DTensors of the module's own parameters, by name or all alike; what trains still does."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        spread = distribute_tensor(parameter.detach(), mesh, [others.get(name, placement)], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(spread, requires_grad=parameter.requires_grad))


def _laid_out(value: Any, mesh: DeviceMesh, layout: Placement) -> DTensor:
    """A plain tensor is taken to be laid out like this already."""
    if not isinstance(value, DTensor):
        return DTensor.from_local(value, mesh, [layout], run_check=False)
    return value.redistribute(placements=[layout])


def _in_parts(value: Any, mesh: DeviceMesh) -> Any:
    """A tensor that is the same on every rank, for a computation that every rank does in part: its gradient comes in parts."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    return _laid_out(value, mesh, Replicate()).to_local(grad_placements=[Partial()])


def _run_locally(module: nn.Module) -> None:
    """Let the module's own code see the local parts of its parameters."""
    forward = module.forward

    def locally(*args: Any, **named: Any) -> Any:
        with _local_parameters(module):
            return forward(*args, **named)

    module.forward = locally


@contextlib.contextmanager
def _local_parameters(module: nn.Module) -> Iterator[None]:
    spread = {name: value for name, value in module.named_parameters(recurse=False) if isinstance(value, DTensor)}
    module._parameters.update({name: value.to_local() for name, value in spread.items()})  # type: ignore[misc]
    try:
        yield
    finally:
        module._parameters.update(spread)
