"""Tensor parallelism (Shoeybi et al. 2019, arXiv 1909.08053): a transformers model's own plan, applied with PyTorch's DTensor.

Every parameter becomes a DTensor: split where the plan says so, else replicated, because optimizers and clipping cannot mix
DTensors with plain ones. Embedding and head are split over the vocabulary, the logits are whole on every rank.

With sequence parallelism (Korthikanti et al. 2022, arXiv 2205.05198) the residual stream is a DTensor split over the tokens: it
knows its whole length, so positions and masks are those of the whole row, and rows of any length do. Blocks gather it on the way
into attention and MLP, and scatter what comes out.
"""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from sartor.errors import JobError
from sartor.model import dissect
from sartor.parallel.layout import Layout

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_COLWISE = ("colwise", "colwise_gather_output", "colwise_rep")
_ROWWISE = ("rowwise", "rowwise_split_input", "rowwise_rep")
_NORM_OF_HEADS = "replicated_with_grad_allreduce"
_KNOWN = (*_COLWISE, *_ROWWISE, _NORM_OF_HEADS)
_WITHOUT = "strategy.tensor=1, and strategy.shard for more devices"
_TOKENS = Shard(1)
"""Of a residual stream of rows x tokens x width."""


class Whole(ParallelStyle):
    """A module whose parameters are whole on every rank, its input and output laid out alike.

    What PyTorch's `SequenceParallel` is for any layout of the input, and with parameters that keep whether they train.
    """

    def __init__(self, layout: Placement, *, output: Placement | None = None, local: bool = True) -> None:
        self.layout, self.output, self.local = layout, output or layout, local

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, parameter in list(module.named_parameters(recurse=False)):
            whole = distribute_tensor(parameter.detach(), device_mesh, [Replicate()], src_data_rank=self.src_data_rank)
            module.register_parameter(name, nn.Parameter(whole, requires_grad=parameter.requires_grad))

        def spread(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            first = inputs[0]
            if not isinstance(first, DTensor):
                first = DTensor.from_local(first, device_mesh, [self.layout], run_check=False)
            return (first.redistribute(placements=[self.layout]), *inputs[1:])

        def collect(_: nn.Module, inputs: Any, output: DTensor) -> torch.Tensor:
            output = output.redistribute(placements=[self.output])
            return output.to_local() if self.local else output

        module.register_forward_pre_hook(spread)
        module.register_forward_hook(collect)
        return module


class GatherTokens(ParallelStyle):
    """A module that gets the residual stream, split over the tokens, and works on all of them."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def gather(value: Any) -> Any:
            split = isinstance(value, DTensor) and value.placements == (_TOKENS,)
            return value.redistribute(placements=[Replicate()]) if split else value

        def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return tuple(gather(value) for value in inputs), {name: gather(value) for name, value in named.items()}

        module.register_forward_pre_hook(hook, with_kwargs=True)
        return module


def check_split(model: nn.Module, layout: Layout) -> None:
    """Raises JobError where `split` would, before there is a mesh."""
    plan = _read_plan(model)
    _check_sizes(model, plan, layout)
    _styles(model, plan, layout)


def split(model: nn.Module, mesh: DeviceMesh, layout: Layout) -> nn.Module:
    """`model` (on the meta device, or the same weights on every rank), split over the mesh's `tensor` dimension, in place.

    Raises JobError for what is not supported.
    """
    from torch.distributed.tensor.parallel import parallelize_module

    plan = _read_plan(model)
    _check_sizes(model, plan, layout)
    styles = _styles(model, plan, layout)
    anatomy = dissect(model)
    for path, style in styles.items():
        module = model.get_submodule(path)
        trains = {name: parameter.requires_grad for name, parameter in module.named_parameters(recurse=False)}
        parallelize_module(module, mesh["tensor"], style, src_data_rank=None)
        for name, trained in trains.items():
            module.get_parameter(name).requires_grad_(trained)
    if layout.data > 1:  # FSDP2 says so of any local part of a DTensor; nobody writes into the logits in place
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
    if anatomy.tied:
        model.get_submodule(anatomy.head).weight = model.get_submodule(anatomy.embeddings).weight  # type: ignore[arg-type]
    return model


def refuse_adapters(adapter: bool) -> None:
    """Raises JobError for a model with adapters."""
    if adapter:
        raise JobError(
            "adapters are not split over tensor parallel ranks",
            why="the model's plan names the layers that an adapter wraps, not the adapter's own",
            remedy=f"method=full, or {_WITHOUT}",
        )


def _read_plan(model: nn.Module) -> dict[str, str]:
    """Path of a module in the blocks → its style, from the model's own plan."""
    refuse_adapters(bool(getattr(model, "peft_config", None)))
    rules: dict[str, str] = getattr(model, "_tp_plan", None) or {}
    strange = next((rule for rule, style in rules.items() if style not in _KNOWN and "embed" not in rule), None)
    if strange is not None:
        raise _unsuited(
            model, f"its plan has the style {rules[strange]} ({strange}); experts and latent attention are not split yet"
        )
    blocks = tuple(f"{stack.path}." for stack in dissect(model).stacks)
    inside = {
        path: rules[rule]
        for path, _ in model.named_modules()
        if path.startswith(blocks) and (rule := re.sub(r"\.\d+(?=\.|$)", ".*", path)) in rules
    }
    if not inside:
        raise _unsuited(model, "its class in transformers has no tensor parallel plan for its blocks")
    _check_rest(model, inside)
    return inside


def _check_rest(model: nn.Module, plan: dict[str, str]) -> None:
    """Whatever the plan does not name gets whole inputs, so it may not stand beside a layer whose output is split."""
    for path, module in model.named_modules():
        parent, _, name = path.rpartition(".")
        if path in plan:
            if not isinstance(module, nn.Linear) and plan[path] != _NORM_OF_HEADS:
                raise _unsuited(model, f"{path} is a {type(module).__name__}, not a linear layer")
        elif any(True for _ in module.parameters(recurse=False)):
            if any(True for _ in module.children()):
                raise _unsuited(model, f"{path or 'the model'} holds parameters of its own beside its layers")
            if any(plan.get(f"{parent}.{sibling}") == "colwise" for sibling, _ in model.get_submodule(parent).named_children()):
                raise _unsuited(model, f"its plan has no rule for {name} in {parent}, beside layers that are split")


def _unsuited(model: nn.Module, why: str) -> JobError:
    return JobError(f"{type(model).__name__} cannot be split over tensor parallel ranks", why=why, remedy=_WITHOUT)


def _check_sizes(model: nn.Module, plan: dict[str, str], layout: Layout) -> None:
    """Heads and widths must divide by the ranks."""
    ranks = layout.tensor
    counts: dict[str, int] = {}
    if any((style == "colwise" and "attn" in path) or "attention" in path for path, style in plan.items()):
        config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
        for key in ("num_attention_heads", "num_key_value_heads"):
            heads = getattr(config, key, None)
            counts |= {key: heads} if isinstance(heads, int) else {}
    for path, style in plan.items():
        module, owner = model.get_submodule(path), model.get_submodule(path.rpartition(".")[0])
        if style == "colwise" and isinstance(getattr(owner, "head_dim", None), int):
            counts[f"the heads of {path}"] = module.out_features // owner.head_dim  # type: ignore[operator, assignment]
        if style in _COLWISE:
            counts[f"the width of {path}"] = module.out_features  # type: ignore[assignment]
        elif style in _ROWWISE:
            counts[f"the width of {path}"] = module.in_features  # type: ignore[assignment]
    for what, count in counts.items():
        if count % ranks:
            most = max(size for size in range(1, ranks) if all(each % size == 0 for each in counts.values()))
            raise JobError(
                f"{type(model).__name__} cannot be split over {ranks} tensor parallel ranks",
                why=f"{what} ({count}) does not divide by {ranks}",
                remedy=f"strategy.tensor={most}",
            )


def _styles(model: nn.Module, plan: dict[str, str], layout: Layout) -> dict[str, ParallelStyle]:
    """Path of every module that is wrapped → its style."""
    anatomy = dissect(model)
    stream: Placement = _TOKENS if layout.sequence else Replicate()
    styles: dict[str, ParallelStyle] = {path: _style(rule, stream) for path, rule in plan.items()}
    if anatomy.embeddings is not None:
        styles[anatomy.embeddings] = RowwiseParallel(
            input_layouts=Replicate(), output_layouts=stream, use_local_output=not layout.sequence
        )
    if anatomy.head is not None:
        styles[anatomy.head] = ColwiseParallel(output_layouts=Replicate())
    regions = _gathering(model, plan) if layout.sequence else []
    styles |= {path: GatherTokens() for path in regions}
    blocks = tuple(f"{stack.path}." for stack in anatomy.stacks)
    for path, module in model.named_modules():
        if path in styles or not any(True for _ in module.parameters(recurse=False)):
            continue
        if not layout.sequence:
            styles[path] = Whole(Replicate())
        elif not path.startswith(blocks):  # the final norm: behind it, everybody sees all tokens
            styles[path] = Whole(_TOKENS, output=Replicate())
        elif path.startswith(tuple(f"{region}." for region in regions)):
            styles[path] = Whole(Replicate())
        else:
            styles[path] = Whole(_TOKENS, local=False)
    return styles


def _style(rule: str, stream: Placement) -> ParallelStyle:
    """PyTorch's style for a rule of transformers. What rowwise layers give goes to the residual stream."""
    if (
        rule == _NORM_OF_HEADS
    ):  # of rows x tokens x heads x width, or with heads before tokens: which one is split, is the same here
        return Whole(_TOKENS)
    if rule in _COLWISE:
        return ColwiseParallel(output_layouts=Shard(-1) if rule == "colwise" else Replicate())
    given = Shard(-1) if rule == "rowwise" else Replicate()
    return RowwiseParallel(input_layouts=given, output_layouts=stream, use_local_output=stream.is_replicate())


def _gathering(model: nn.Module, plan: dict[str, str]) -> list[str]:
    """The parts of every block that need all tokens: those that hold layers of the plan. Raises JobError for other blocks than
    norms around such parts."""
    anatomy = dissect(model)
    regions = []
    for stack in anatomy.stacks:
        for block in stack.block_paths():
            for name, part in model.get_submodule(block).named_children():
                path = f"{block}.{name}"
                rules = [rule for inner, rule in plan.items() if inner.startswith(f"{path}.")]
                if any(rule in _ROWWISE for rule in rules):
                    regions.append(path)
                elif rules or (any(True for _ in part.parameters()) and any(True for _ in part.children())):
                    raise _no_sequence(model, f"{path} does not end in a layer that its plan splits by rows")
    known = (anatomy.embeddings, anatomy.head)
    blocks = tuple(f"{stack.path}." for stack in anatomy.stacks)
    rest = [
        path
        for path, module in model.named_modules()
        if path not in known and not path.startswith(blocks) and any(True for _ in module.parameters(recurse=False))
    ]
    if len(rest) != 1:
        raise _no_sequence(model, f"beside its blocks it should have one norm, and has {', '.join(rest) or 'none'}")
    return regions


def _no_sequence(model: nn.Module, why: str) -> JobError:
    return JobError(
        f"the tokens of {type(model).__name__} cannot be split (sequence parallelism)", why=why, remedy="strategy.sequence=false"
    )
